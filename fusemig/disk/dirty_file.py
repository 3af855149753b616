"""DirtyFile: both dirty maps of a disk in their file, and the disk that notes its writes there.

The file is ``PATH.fusemig-dirty``, beside the image or in ``--state-dir``. It is made when the first map is begun; a
disk that never moved has none. Nothing here may keep a disk from being served: what fails costs a map, and is logged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog

from fusemig.disk.dirty_map import DirtyMap, Since, dirty_file_size
from fusemig.disk.raw import RawDisk, create_image
from fusemig.disk.stamp import stamp_of
from fusemig.errors import ConfigError, DiskError, StateError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path

    from fusemig.core.bitmap import ChunkBitmap
    from fusemig.disk.base import Disk
    from fusemig.disk.dirty_map import MapBase
    from fusemig.disk.tracked import TrackedDisk
    from fusemig.succession.fdstore import FdStore

log = structlog.get_logger(__name__)

BEGIN_DEADLINE_S: Final = 10.0
"""How long a map waits for the writes that were under way when it was begun."""


class DirtyFile:
    """The maps of one disk."""

    def __init__(
        self,
        disk: TrackedDisk,
        boot: str,
        store: Disk | None,
        make_store: Callable[[], Disk],
        stamp: Callable[[], str] = lambda: "",
    ) -> None:
        """Go on with the maps in ``store`` that can be trusted; before guests may write.

        Args:
            disk: notes its writes.
            boot: names the host's present boot.
            store: the file, if there is one; it is closed by `close`.
            make_store: makes a blank one of `dirty_file_size` bytes.
            stamp: returns what changes whenever the image does, or nothing where that cannot be told.

        Raises:
            DiskError: the store failed.
        """
        self._disk = disk
        self._boot = boot
        self._store = store
        self._make_store = make_store
        self._stamp = stamp
        self._maps: dict[Since, DirtyMap] = {}
        if store is not None:
            self._read(store, stamp())
            for one in self._maps.values():
                if one.base is not None:
                    disk.attach_map(one)

    def _read(self, store: Disk, stamp: str) -> None:
        for since in Since:
            self._maps[since] = DirtyMap(store, self._disk.size, since, self._boot, stamp)

    def base(self, since: Since) -> MapBase | None:
        """Return since when a map counts; None where there is none that can be trusted."""
        one = self._maps.get(since)
        return None if one is None else one.base

    def written(self, since: Since) -> ChunkBitmap:
        """Return the chunks that may have been written since the base of a map that has one; it goes on to change."""
        return self._maps[since].written

    def begin(self, since: Since, base: MapBase) -> bool:
        """Begin a map anew, with ``base`` as of now; may sleep. Return whether it counts.

        A file that cannot be written, or a write that does not end, costs the map and nothing else.
        """
        try:
            if self._store is None:
                self._store = self._make_store()
                self._read(self._store, "")
            if self._disk.begin_map(self._maps[since], base, BEGIN_DEADLINE_S):
                return True
            reason = f"a write has not ended for {BEGIN_DEADLINE_S:g} s"
        except (DiskError, ConfigError) as exc:
            reason = str(exc)
        log.warning("no map of written chunks is kept", disk=self._disk.name, reason=reason)
        return False

    def close(self, *, is_synced: bool) -> None:
        """End in order, with nobody writing the image any more; ``is_synced`` says that all of it is durable.

        An image that could not be synced may have lost what was written before the base: its maps prove nothing.
        """
        store, self._store = self._store, None
        if store is None:
            return
        try:
            for one in self._maps.values():
                if is_synced:
                    one.close(self._stamp())
                else:
                    one.drop()
        except DiskError as exc:
            log.warning("the map of written chunks was not closed", disk=self._disk.name, reason=str(exc))
        finally:
            store.close()


def open_dirty_file(
    disk: TrackedDisk, path: Path, boot: str, stat: Callable[[], os.stat_result], kept: FdStore | None = None
) -> DirtyFile:
    """Return the maps that ``disk`` has in ``path``, which need not exist; ``kept`` keeps its lock (`RawDisk`).

    A file that cannot be used is logged and replaced when a map is begun.

    Raises:
        StateError: it may not be believed, and can be neither read nor removed.
    """
    size = dirty_file_size(disk.size)

    def make() -> RawDisk:
        new = path.with_name(f"{path.name}.new")
        try:
            new.unlink(missing_ok=True)
            create_image(new, size)
            store = RawDisk(disk.name, new, store=kept)
            new.rename(path)
        except OSError as exc:
            raise ConfigError(f"cannot make {path}: {exc.strerror}") from exc
        return store

    def stamp() -> str:
        return stamp_of(stat())

    store = None
    if path.exists() or path.is_symlink():
        try:
            store = RawDisk(disk.name, path, store=kept)
            if store.size == size:
                return DirtyFile(disk, boot, store, make, stamp)
            reason = f"{path} is for a disk of another size"
        except (ConfigError, DiskError) as exc:
            reason = str(exc)
        if store is not None:
            store.close()
        log.warning("the map of written chunks cannot be used", disk=disk.name, reason=reason)
        try:
            path.unlink()
        except OSError as exc:
            raise StateError(f"cannot remove {path}, which tells wrong things of the image: {exc.strerror}") from exc
    return DirtyFile(disk, boot, None, make, stamp)
