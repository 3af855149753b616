"""RawDisk: an image file or block device, used as it is.

Locking: an exclusive open-file-description lock on the whole image for as long as it is open, and the bytes that QEMU
locks when it has an image open (block/file-posix.c: RAW_LOCK_PERM_BASE 100, RAW_LOCK_SHARED_BASE 200) are inside it,
so a running QEMU and fusemig refuse each other's images. Images are opened without following links.

Syncing: the kernel reports that it lost pages once to each open file (errseq_t), so of two fdatasyncs at a time one may
fail and the other succeed without them. So one runs at a time, and a flush is answered by the first that *began* after
it was asked for, with the others that waited. A failure stays.

An image that somebody cuts is noticed by its size, which no write of ours restores: only one that ends where the disk
ends could, and such a write looks first. So what is behind the cut is never taken for zeros that a guest wrote.

A successor inherits the open file, and must not inherit its silence. That something failed is kept beside it. What the
kernel told a daemon that was killed before it could keep that, the kernel still owes to the kept file: daemons sync
through an open file of their own, and a successor's first flush through the kept one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fusemig.core.units import BLOCK_SIZE, MAX_DISK_SIZE, SECTOR_SIZE
from fusemig.disk.base import Disk, Extent
from fusemig.errors import ConfigError, DiskError
from fusemig.records.epoch import sync_directory
from fusemig.succession.fdstore import FAILED, identity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fusemig.disk.base import Buffer
    from fusemig.succession.fdstore import FdStore

_F_OFD_SETLK: Final = 37
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2
_FALLOC_FL_ZERO_RANGE: Final = 16
_MEMORY_FILE_SYSTEMS: Final = frozenset({"tmpfs", "ramfs", "devtmpfs"})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class RawDisk(Disk):
    """An open, locked image."""

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        read_only: bool = False,
        store: FdStore | None = None,
        role: str = "file",
        known_size: int = 0,
    ) -> None:
        """Open and lock ``path``.

        With a ``store`` the lock outlives this process, as ``role``, until the disk is closed in order: nobody else
        gets the image while a successor of ours may come for it. A descriptor that a predecessor left so is used, and
        the size that it had then, ``known_size`` (0: not known), stays that of a file which was cut since.

        Raises:
            ConfigError: it does not exist, is no file or block device, is a link, has a size that is no multiple of
                512 bytes or above 16 TiB, is in use by another process, or ``store`` is full.
        """
        self.name = name
        self.path = path
        self.read_only = read_only
        self._store = store
        inherited = None if store is None else store.take(_kept_as(role, path))
        self.is_inherited = inherited is not None
        """Whether a predecessor left it: nobody has locked it meanwhile, and its inode is the one that it served."""
        self._fd = _open_image(name, path, read_only=read_only) if inherited is None else inherited
        self._kept_as = f"{role}-{identity(self._fd)}"
        self._kept_failed = f"{FAILED}{self._kept_as}"
        self._syncing = threading.Condition()
        # Guarded by _syncing:
        self._is_syncing = False
        self._n_begun = 0
        self._n_synced = 0
        """The number of the last fdatasync that succeeded, counted by `_n_begun`."""
        self._flush_error: DiskError | None = None
        self._sync_fd = self._fd
        """What is synced next: the image, by this or an open file of our own."""
        self._own_fd: int | None = None
        try:
            self.is_regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            is_cut = inherited is not None and self.is_regular and os.fstat(self._fd).st_size < known_size
            self.size = known_size if is_cut else _image_size(name, path, self._fd)
            _lock_image(name, path, self._fd, read_only=read_only)
            self._is_memory = file_system_of(self._fd) in _MEMORY_FILE_SYSTEMS
            self._has_nowait = self._probe_nowait()
            if store is not None and inherited is None:
                store.keep(self._kept_as, self._fd)
            if store is not None and (failed := store.take(self._kept_failed)) is not None:
                os.close(failed)
                self._flush_error = self._error(errno.EIO, "fdatasync, under an earlier daemon,", 0, self.size)
            if store is not None and store.is_on and not read_only:
                self._own_fd = self._open_again()
                if inherited is None and self._own_fd is not None:
                    self._sync_fd = self._own_fd
        except BaseException:
            os.close(self._fd)
            raise

    def _open_again(self) -> int | None:
        """Return an open file of our own of the image; None where the system does not give one, and we do without."""
        try:
            return os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None

    def _probe_nowait(self) -> bool:
        try:
            os.preadv(self._fd, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from the image.

        Raises:
            DiskError: the store's error; EIO if the image has become shorter.
        """
        done, length = 0, len(buffer)
        while done < length:
            try:
                n = os.preadv(self._fd, [buffer[done:] if done else buffer], offset + done)
            except OSError as exc:
                raise self._error(exc.errno or errno.EIO, "read", offset, length) from exc
            if n == 0:
                raise self._error(errno.EIO, "short read", offset, length)
            done += n

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        """Fill ``buffer`` if all of it is in memory."""
        if not self._has_nowait:
            if not self._is_memory:
                return False
            self.pread_into(buffer, offset)
            return True
        try:
            return os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT) == len(buffer)
        except OSError:
            return False  # EAGAIN; or a real error, which the sleeping read will meet again and report

    def read_ahead(self, offset: int, length: int) -> None:
        """Have the kernel read the range into its page cache; it takes no more than about 1 MiB at a time."""
        if not self._is_memory:
            with suppress(OSError):
                os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def pwrite_may_sleep(self, offset: int, length: int) -> bool:
        """Tell whether the write covers a part of a page that is not in memory, which the kernel would have to read."""
        if self._is_memory:
            return False
        first, last = offset - offset % BLOCK_SIZE, offset + length - 1
        edges = {first, last - last % BLOCK_SIZE} if length % BLOCK_SIZE or offset != first else ()
        probe = memoryview(bytearray(1))
        return any(not self.pread_nowait(probe, edge) for edge in edges)

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of ``data``.

        Raises:
            DiskError: the store's error; ENOSPC when it is full; EIO for the end of an image that was cut.
        """
        done, length = 0, len(data)
        if offset + length == self.size:
            self._check_whole()
        while done < length:
            try:
                done += os.pwrite(self._fd, memoryview(data)[done:] if done else data, offset + done)
            except OSError as exc:
                raise self._error(exc.errno or errno.EIO, "write", offset, length) from exc

    def write_zeroes(self, offset: int, length: int) -> None:
        """Punch a hole; where the store cannot, write zeros.

        Raises:
            DiskError: the store's error.
        """
        if not self._fallocate(_FALLOC_FL_PUNCH_HOLE, offset, length):
            super().zero_allocated(offset, length)

    def zero_allocated(self, offset: int, length: int) -> None:
        """Make the range zeros that are not written; where the store cannot, write them.

        Raises:
            DiskError: the store's error.
        """
        if not self._fallocate(_FALLOC_FL_ZERO_RANGE, offset, length):
            super().zero_allocated(offset, length)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """Call fallocate; False if the store has no such mode."""
        while _libc.fallocate(self._fd, mode | _FALLOC_FL_KEEP_SIZE, offset, length):
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL):
                raise self._error(code, "punch hole" if mode == _FALLOC_FL_PUNCH_HOLE else "zero", offset, length)
            return False
        return True

    def flush(self) -> None:
        """Return when every finished write is durable (fdatasync).

        Raises:
            DiskError: it failed, now or earlier: a failed fdatasync may have dropped the pages, so its error stays.
        """
        with self._syncing:
            wanted = self._n_begun + 1
            self._syncing.wait_for(lambda: not self._is_syncing or self._n_synced >= wanted)
            if self._flush_error is not None:
                raise self._flush_error
            if self._n_synced >= wanted:
                return
            if self._fd < 0:
                raise self._error(errno.EBADF, "fdatasync after it was closed", 0, self.size)
            self._check_whole()
            self._n_begun += 1
            self._is_syncing = True
        try:
            os.fdatasync(self._sync_fd)
        except OSError as exc:
            error = self._error(exc.errno or errno.EIO, "fdatasync", 0, self.size)
            self._fail(error)
            raise error from exc
        else:
            with self._syncing:
                self._n_synced = self._n_begun
                self._sync_fd = self._fd if self._own_fd is None else self._own_fd
        finally:
            with self._syncing:
                self._is_syncing = False
                self._syncing.notify_all()

    def _fail(self, error: DiskError) -> None:
        """Have every later flush fail, those of successors too, before anybody hears of the first."""
        with self._syncing:
            self._flush_error = error
        if self._store is not None:
            self._store.keep(self._kept_failed, self._fd)

    def drop_cache(self) -> None:
        """Flush, and have later reads come from the store: a page that it lost may still be in memory.

        Raises:
            DiskError: the flush failed.
        """
        self.flush()
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def io_error(self) -> DiskError | None:
        """The failed fdatasync that made this disk untrustworthy, if one did, or that the image is cut now."""
        return self._flush_error or self._cut_error()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield data and holes as SEEK_DATA and SEEK_HOLE tell them; all data where the store cannot."""
        self._check_whole()  # what is behind the end of the file is not a hole, but lost
        at, end = offset, offset + length
        while at < end:
            data = self._seek(at, os.SEEK_DATA, end)
            if data > at:
                yield Extent(at, min(data, end) - at, is_data=False)
            if data >= end:
                return
            at = min(self._seek(data, os.SEEK_HOLE, end), end)
            yield Extent(data, at - data, is_data=True)

    def is_hole(self, offset: int, length: int) -> bool:
        """Ask for the next data only: to ask for the next hole may walk over all that lies before it."""
        self._check_whole()
        return self._seek(offset, os.SEEK_DATA, offset + length) >= offset + length

    def _check_whole(self) -> None:
        """Raise `DiskError` (EIO) if somebody has cut the image since it was opened."""
        if (error := self._cut_error()) is not None:
            raise error

    def _cut_error(self) -> DiskError | None:
        if not self.is_regular or self._fd < 0 or (size := os.fstat(self._fd).st_size) >= self.size:
            return None
        what = f"disk '{self.name}' ({self.path}): the image was cut from {self.size} to {size} bytes, restore it"
        return DiskError(errno.EIO, what, size, self.size - size)

    def check_in_place(self) -> None:
        """Raise `DiskError` (ENOENT) if somebody has removed the image or put another file in its place."""
        if _kept_as("image", self.path) != f"image-{identity(self._fd)}":
            what = f"disk '{self.name}' ({self.path}): the image was removed or replaced, serve it anew there"
            raise DiskError(errno.ENOENT, what, 0, self.size)

    def _seek(self, at: int, whence: int, end: int) -> int:
        """Seek from ``at``; the file position this moves is used by nothing else."""
        try:
            return os.lseek(self._fd, at, whence)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return end
            if exc.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return at if whence == os.SEEK_DATA else end
            raise self._error(exc.errno or errno.EIO, "seek", at, 0) from exc

    def stat(self) -> os.stat_result:
        """Return the image's own stat."""
        return os.fstat(self._fd)

    def statvfs(self) -> os.statvfs_result:
        """Return the statvfs of the file system that holds the image."""
        return os.fstatvfs(self._fd)

    def close(self) -> None:
        """Close the image, which unlocks it, when a sync that is under way has ended; idempotent.

        Whoever asked for that sync may not wait for it any more, and what it finds still has to be kept.
        """
        with self._syncing:
            self._syncing.wait_for(lambda: not self._is_syncing)
            if self._fd >= 0:
                if self._store is not None:
                    is_over = self._store.release(self._kept_as)
                    if is_over and self._flush_error is not None:
                        self._store.forget(self._kept_failed)  # as long as the open file lives on, so does its mark
                os.close(self._fd)
                if self._own_fd is not None:
                    os.close(self._own_fd)
                self._fd = self._sync_fd = -1
                self._own_fd = None

    def _error(self, code: int, what: str, offset: int, length: int) -> DiskError:
        return DiskError(code, f"disk '{self.name}' ({self.path}): {what} at {offset}+{length}", offset, length)


def create_image(path: Path, size: int) -> None:
    """Create a sparse image of ``size`` bytes.

    Raises:
        ConfigError: it exists, or cannot be created.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise ConfigError(f"cannot create image {path}: {exc.strerror}") from exc
    try:
        os.ftruncate(fd, size)
        sync_directory(path.parent)  # it is to be there after a power loss, as its epoch file is
    except OSError as exc:
        path.unlink()
        raise ConfigError(f"cannot make image {path} {size} bytes large: {exc.strerror}") from exc
    finally:
        os.close(fd)


def _kept_as(role: str, path: Path) -> str:
    """Return the name under which the descriptor of ``path`` is kept, if it is; empty if there is no such file."""
    try:
        status = path.lstat()
    except OSError:
        return ""
    return f"{role}-{status.st_dev:x}-{status.st_ino:x}"


def _open_image(name: str, path: Path, *, read_only: bool) -> int:
    try:
        return os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as exc:
        hint = {
            errno.ENOENT: "create it first (truncate -s SIZE), or add --incoming to receive it",
            errno.ELOOP: "it is a symbolic link: name the image itself",
            errno.EACCES: "check its permissions, or serve it with --readonly",
            errno.EROFS: "serve it with --readonly",
        }.get(exc.errno or 0, "check the path")
        raise ConfigError(f"cannot open image {path} of disk '{name}': {exc.strerror}; {hint}") from exc


def _image_size(name: str, path: Path, fd: int) -> int:
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise ConfigError(f"image {path} of disk '{name}' is neither a regular file nor a block device")
    size = os.lseek(fd, 0, os.SEEK_END)
    if size == 0 or size % SECTOR_SIZE or size > MAX_DISK_SIZE:
        raise ConfigError(
            f"image {path} of disk '{name}' has {size} bytes: "
            f"a disk is a multiple of {SECTOR_SIZE} bytes, larger than 0 and at most 16 TiB"
        )
    return size


def _lock_image(name: str, path: Path, fd: int, *, read_only: bool) -> None:
    """Take the OFD lock; a read-only image takes a shared one, so that several readers can serve it."""
    kind = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
    flock = struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, flock)
    except OSError as exc:
        if exc.errno in (errno.EAGAIN, errno.EACCES):
            raise ConfigError(
                f"image {path} of disk '{name}' is in use by another process (a running QEMU or fusemig); stop it first"
            ) from exc
        raise ConfigError(f"cannot lock image {path} of disk '{name}': {exc.strerror}") from exc


def file_system_of(fd: int) -> str:
    """Return the type of the file system that holds an open file, or ``""`` where /proc does not tell."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        fields = line.split()
        if fields[2] == wanted and "-" in fields:
            return fields[fields.index("-") + 1]
    return ""
