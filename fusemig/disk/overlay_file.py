"""OverlayFile: an overlay in files, and the check that its base is the one that it was made over.

    IMAGE                what differs from the base, exclusively locked
    IMAGE.fusemig-map    what of it counts (`fusemig.disk.allocation`), and the base's size and digest
    BASE                 read-only, under a shared lock

The three are opened together or not at all. A new map gets its name only when it is whole and durable; before that the
image holds no data, so a crash in between leaves what is taken for a new overlay.

All of the base is read when its stamp does not tell that it is the same. A successor has no time for that while guests
wait, and they were served from this base already. So it goes on with the base if it is the open file that its
predecessor left, its lock never given up, with the size as it was. It blesses nothing by that: the old stamp is kept,
and whoever opens the overlay anew later reads the base. If the time of its last write is not what it was when it was
found to be the right one, the base is to be read beside the guests (`OverlayFile.prove_base`): one that differs is an
I/O error from then on.
"""

from __future__ import annotations

import errno
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_128

from fusemig.core.units import CHUNK_SIZE, chunks_of
from fusemig.disk.allocation import AllocationMap, BaseIdentity, boot_id, map_size, write_header
from fusemig.disk.overlay import OverlayDisk, check_sizes
from fusemig.disk.raw import RawDisk, create_image
from fusemig.disk.stamp import stamp_of
from fusemig.errors import ConfigError, DiskError
from fusemig.records.epoch import sync_directory

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path

    from fusemig.disk.base import Disk
    from fusemig.succession.fdstore import FdStore

_CONTENTS: Final = "its contents differ"
_ZEROS: Final = bytes(CHUNK_SIZE)
_YOUNG_NS: Final = 2_000_000_000
"""A base that changed so lately may change again without its times telling."""


class OverlayFile(OverlayDisk):
    """An overlay in files: an image, its map and a base."""

    def __init__(
        self,
        name: str,
        path: Path,
        base_path: Path,
        map_path: Path,
        *,
        read_only: bool = False,
        store: FdStore | None = None,
        known_size: int = 0,
    ) -> None:
        """Open and lock ``path`` over ``base_path``.

        An overlay that does not exist is made, as large as its base; so is the map of an image without any data
        (``truncate -s SIZE``), which may be larger than the base. May read all of the base; for a mount that lives on,
        only a base that was replaced.

        ``store`` and ``known_size`` are as `RawDisk` has them.

        Raises:
            ConfigError: a file cannot be used, they do not belong together, or the base has changed.
            DiskError: a store failed.
        """
        self.path = path
        self.read_only = read_only
        with ExitStack() as opened:
            self._base_file = base = opened.enter_context(_open_base(name, path, base_path, store))
            if not read_only and not path.exists() and not map_path.exists():
                create_image(path, base.size)
            if map_path.exists() and not path.exists():
                raise ConfigError(
                    f"overlay {path} of disk '{name}' is missing and its map {map_path} is there: restore the image, "
                    "or delete the map too to begin anew"
                )
            image = RawDisk(name, path, read_only=read_only, store=store, role="image", known_size=known_size)
            self._raw = opened.enter_context(image)
            if not self._raw.is_regular:
                raise ConfigError(f"overlay {path} of disk '{name}' is a device: an overlay is a file")
            if not map_path.exists():
                self._make_map(map_path, base, base_path)
            map_file = opened.enter_context(RawDisk(name, map_path, read_only=read_only, store=store))
            allocation = AllocationMap(map_file, self._raw.size, boot_id(), is_inherited=map_file.is_inherited)
            served = _likeness(base)
            is_adopted = store is not None and store.has_mount and base.is_inherited
            self._base_path = base_path
            self.is_base_proved = not is_adopted or served == allocation.served
            if is_adopted:
                _check_size(base, base_path, path, allocation)
                stamp, served = allocation.stamp, allocation.served
            else:
                stamp = _check_base(base, base_path, path, allocation)
            super().__init__(self._raw, base, allocation)
            if not read_only:
                allocation.resume(self._raw, stamp, served)
            opened.pop_all()

    def prove_base(self, between: Callable[[], None] = lambda: None) -> None:
        """Read all of a base that may have been written; one that is another makes this disk one with an `io_error`.

        That it is the right one is not kept: the next daemon reads it too, until the overlay is opened anew.

        Args:
            between: called between chunks; what it raises ends the reading, and nothing is found.

        Raises:
            DiskError: it cannot be read, which is that `io_error` too.
        """
        base, allocation = self._base_file, self._allocation
        try:
            digest = content_digest(base, between)
        except DiskError as exc:
            self.distrust(exc)
            raise
        if digest != allocation.base.digest:
            self.distrust(
                DiskError(errno.EIO, _another(base, self._base_path, self.path, allocation, _CONTENTS), 0, base.size)
            )
        else:
            self.is_base_proved = True

    def _make_map(self, map_path: Path, base: RawDisk, base_path: Path) -> None:
        image = self._raw
        if self.read_only or any(extent.is_data for extent in image.extents(0, image.size)):
            raise ConfigError(
                f"image {image.path} of disk '{image.name}' has no map {map_path}, so it is no overlay: serve it "
                "without a base, restore its map, or name an image that does not exist"
            )
        check_sizes(image, base)
        identity = BaseIdentity(size=base.size, digest=content_digest(base), path=str(base_path))
        new = map_path.with_name(f"{map_path.name}.new")
        with suppress(FileNotFoundError):
            new.unlink()
        create_image(new, map_size(image.size))
        with RawDisk(image.name, new) as store:
            write_header(store, image.size, identity)
        try:
            new.rename(map_path)
            for directory in {image.path.parent, map_path.parent}:
                sync_directory(directory)
        except OSError as exc:
            raise ConfigError(f"cannot make the map {map_path}: {exc.strerror}") from exc

    def stat(self) -> os.stat_result:
        """Return the image's own stat."""
        return self._raw.stat()

    def statvfs(self) -> os.statvfs_result:
        """Return the statvfs of the file system that holds the image."""
        return self._raw.statvfs()


def content_digest(disk: Disk, between: Callable[[], None] = lambda: None) -> str:
    """Return a digest of a disk's bytes; holes and zeros are the same. Reads all of its data, ``between`` after chunks.

    It tells accidents, not attackers: xxh3 is no cryptographic hash.
    """
    digest, buffer, next_chunk = xxh3_128(), memoryview(bytearray(CHUNK_SIZE)), 0
    for extent in disk.extents(0, disk.size):
        if not extent.is_data:
            continue
        for chunk in chunks_of(extent.offset, extent.length):
            if chunk < next_chunk:
                continue
            next_chunk = chunk + 1
            offset = chunk * CHUNK_SIZE
            view = buffer[: min(CHUNK_SIZE, disk.size - offset)]
            disk.pread_into(view, offset)
            between()
            if not _ZEROS.startswith(view):
                digest.update(chunk.to_bytes(8, "little"))
                digest.update(view)
    return digest.hexdigest()


def _open_base(name: str, path: Path, base_path: Path, store: FdStore | None) -> RawDisk:
    if not base_path.exists():
        raise ConfigError(
            f"base {base_path} of disk '{name}' does not exist: name the image that the overlay lies over"
        )
    if path.exists() and path.samefile(base_path):
        raise ConfigError(f"disk '{name}': {path} cannot be its own base; name another image")
    # Several overlays of a daemon may lie over one base, each with a descriptor of its own.
    return RawDisk(name, base_path, read_only=True, store=store, role=f"base-{name}")


def _check_base(base: RawDisk, base_path: Path, path: Path, allocation: AllocationMap) -> str:
    """See that the base is the one that the overlay was made over; return its stamp, for the next time.

    Its contents are read only if its times or its inode differ from those of the last time.
    """
    _check_size(base, base_path, path, allocation)
    stamp = _stamp_of(base)
    if (not stamp or stamp != allocation.stamp) and content_digest(base) != allocation.base.digest:
        raise ConfigError(_another(base, base_path, path, allocation, _CONTENTS))
    return stamp


def _check_size(base: RawDisk, base_path: Path, path: Path, allocation: AllocationMap) -> None:
    known = allocation.base.size
    if base.size != known:
        raise ConfigError(_another(base, base_path, path, allocation, f"it has {base.size} bytes, not {known}"))


def _another(base: RawDisk, base_path: Path, path: Path, allocation: AllocationMap, how: str) -> str:
    return (
        f"base {base_path} of disk '{base.name}' is not the one that {path} was made over ({allocation.base.path}): "
        f"{how}; restore it: the overlay holds nothing but what differs from it"
    )


def _stamp_of(base: RawDisk) -> str:
    """Return what changes whenever a file does, or nothing where that cannot be told."""
    found = base.stat()
    return stamp_of(found) if time.time_ns() - found.st_ctime_ns >= _YOUNG_NS else ""


def _likeness(base: RawDisk) -> str:
    """Return what stays as long as nobody writes or replaces the base, whatever becomes of its names and rights."""
    found = base.stat()
    return f"{found.st_dev:x}-{found.st_ino:x}:{base.size}:{found.st_mtime_ns}"
