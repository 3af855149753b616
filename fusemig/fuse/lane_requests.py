"""Requests: what a lane does with a request that its thread has not answered at once.

It is answered here, where that takes no store; handed to a pool of the export, where it may sleep; or forwarded. What
is handed over copies its data, which is in the thread's buffer until that reads the next request.
"""

from __future__ import annotations

import errno
import os
import threading
from functools import partial
from typing import TYPE_CHECKING, Final

from fusemig.errors import DiskError
from fusemig.fuse import abi
from fusemig.fuse.abi import AbiError, Opcode
from fusemig.fuse.attributes import attributes_of
from fusemig.fuse.export import ROOT_INODE
from fusemig.fuse.lane_changes import Change

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fusemig.disk.tracked import TrackedDisk
    from fusemig.fuse.abi import InHeader
    from fusemig.fuse.export import Export, Exports
    from fusemig.fuse.lane_answers import Answers
    from fusemig.fuse.lane_changes import Changes
    from fusemig.fuse.pool import ExportPools

_ANSWERED_HERE: Final = frozenset(
    {Opcode.READ, Opcode.WRITE, Opcode.FSYNC, Opcode.FALLOCATE, Opcode.LSEEK, Opcode.FLUSH, Opcode.GETATTR}
)
_ZEROING_MODES: Final = frozenset(
    {
        abi.FALLOC_PUNCH_HOLE | abi.FALLOC_KEEP_SIZE,
        abi.FALLOC_ZERO_RANGE,
        abi.FALLOC_ZERO_RANGE | abi.FALLOC_KEEP_SIZE,
    }
)


class Requests:
    """Sorts the requests of one lane by what becomes of them; any lane thread calls it."""

    def __init__(
        self,
        exports: Exports,
        answers: Answers,
        changes: Changes,
        pools: Mapping[int, ExportPools],
        forward: Callable[[int, int, bytes], None],
    ) -> None:
        """Answer about ``exports``, whose pools are these; ``forward`` as `DataLane` has it."""
        self._exports = exports
        self._answers = answers
        self._changes = changes
        self._pools = pools
        self._forward_to = forward
        self.is_stopping = False
        """Whether requests are answered ENOTCONN from now on."""
        self._lock = threading.Lock()
        # Guarded by _lock:
        self.read_bytes = 0

    def dispatch(self, head: bytearray, body: memoryview, n: int) -> None:
        """Answer, hand over or forward a request of ``n`` bytes that was not answered at once."""
        header = abi.parse_in_header(memoryview(head)[:n])
        opcode, unique = header.opcode, header.unique
        message = bytes(head[:n])
        if opcode != Opcode.WRITE and n > len(head):
            message += bytes(body[: n - len(head)])
        if opcode == Opcode.INTERRUPT:
            self._changes.interrupt(abi.parse_interrupt(message))
        elif self.is_stopping and opcode not in abi.WITHOUT_REPLY:
            self._answers.give_error(unique, errno.ENOTCONN)
        elif opcode not in _ANSWERED_HERE or header.nodeid == ROOT_INODE:
            self._answers.count("forwarded")
            self._forward_to(opcode, unique, message)
        elif (export := self._exports.by_inode(header.nodeid)) is None:
            self._answers.give_error(unique, errno.ENOENT)
        elif opcode == Opcode.FLUSH:
            self._answers.give(abi.reply(unique))  # of a close, which promises nothing: nobody waits for pyfuse3
        elif opcode == Opcode.GETATTR:
            self._answers.hand_over(self._pools[export.inode].stat, unique, partial(self._getattr, export, unique))
        elif opcode == Opcode.READ:
            self._read(export, header, message)
        elif opcode == Opcode.WRITE:
            self._write(export, header, message, body[: max(0, n - abi.IO_HEAD_SIZE)])
        elif opcode == Opcode.FSYNC:
            self._fsync(export, header, message)
        elif opcode == Opcode.FALLOCATE:
            self._fallocate(export, header, message)
        else:
            self._lseek(export, header, message)

    def _getattr(self, export: Export, unique: int) -> None:
        try:
            found = attributes_of(export)
        except OSError as exc:
            raise DiskError(exc.errno or errno.EIO, f"stat of disk '{export.name}'") from exc
        self._answers.give(abi.attr_reply(unique, found))

    def _read(self, export: Export, header: InHeader, message: bytes) -> None:
        request = abi.parse_read_write(message)
        disk = export.disk
        length = 0 if disk is None else min(request.size, disk.size - request.offset)
        if disk is None or length <= 0:
            self._answers.give(abi.reply(header.unique))
            return
        read = partial(self._read_slowly, disk, header.unique, request.offset, length)
        pool = self._pools[export.inode].of_data(request.offset, length, is_write=False)
        self._answers.hand_over(pool, header.unique, read)

    def _read_slowly(self, disk: TrackedDisk, unique: int, offset: int, length: int) -> None:
        reply = bytearray(abi.OUT_HEADER_SIZE + length)
        abi.OUT_HEADER.pack_into(reply, 0, len(reply), 0, unique)
        disk.pread_into(memoryview(reply)[abi.OUT_HEADER_SIZE :], offset)
        with self._lock:
            self.read_bytes += length
        self._answers.give(reply)

    def _write(self, export: Export, header: InHeader, message: bytes, data: memoryview) -> None:
        request = abi.parse_read_write(message)
        if request.size != len(data):
            raise AbiError(f"WRITE of {request.size} bytes came with {len(data)}")
        disk = _writable(export)
        length = min(request.size, disk.size - request.offset)  # what lies beyond the end is not written,
        if length <= 0 < request.size:
            self._answers.give_error(header.unique, errno.ENOSPC)  # as on a block device
            return
        copy = bytes(data[:length])
        change = Change(
            export,
            disk,
            header.unique,
            header.pid,
            request.offset,
            length,
            partial(disk.pwrite, copy, request.offset),
            abi.WRITE_REPLY.pack(abi.WRITE_REPLY.size, 0, header.unique, length, 0),
            n_written=length,
            is_durable=bool(request.flags & os.O_DSYNC),  # O_SYNC contains O_DSYNC
        )
        if disk.write_may_sleep(copy, request.offset):
            pool = self._pools[export.inode].of_data(request.offset, length, is_write=True)
            self._answers.hand_over(pool, header.unique, partial(self._changes.make, change))
        else:
            self._changes.make(change)

    def _fsync(self, export: Export, header: InHeader, message: bytes) -> None:
        abi.parse_fsync(message)
        if export.disk is None:
            self._answers.give(abi.reply(header.unique))
            return
        self._changes.answer_flushed(export, export.disk, header.unique, abi.reply(header.unique))

    def _fallocate(self, export: Export, header: InHeader, message: bytes) -> None:
        request = abi.parse_fallocate(message)
        if request.mode not in _ZEROING_MODES:
            self._answers.give_error(header.unique, errno.EOPNOTSUPP)
            return
        disk = _writable(export)
        length = min(request.length, disk.size - request.offset)
        if length < request.length and not request.mode & abi.FALLOC_KEEP_SIZE:
            self._answers.give_error(header.unique, errno.ENOSPC)  # a disk does not grow
            return
        answer = abi.reply(header.unique)
        if length <= 0:
            self._answers.give(answer)
            return
        make = partial(disk.write_zeroes, request.offset, length)
        change = Change(export, disk, header.unique, header.pid, request.offset, length, make, answer)
        pool = self._pools[export.inode].of_data(request.offset, length, is_write=True)
        self._answers.hand_over(pool, header.unique, partial(self._changes.make, change))

    def _lseek(self, export: Export, header: InHeader, message: bytes) -> None:
        request = abi.parse_lseek(message)
        disk = export.disk
        if request.whence not in (os.SEEK_DATA, os.SEEK_HOLE):  # the kernel answers the others itself
            self._answers.give_error(header.unique, errno.EINVAL)
        elif disk is None or request.offset >= disk.size:
            self._answers.give_error(header.unique, errno.ENXIO)
        else:
            seek = partial(self._seek, disk, header.unique, request.offset, is_data=request.whence == os.SEEK_DATA)
            self._answers.hand_over(self._pools[export.inode].io, header.unique, seek)

    def _seek(self, disk: TrackedDisk, unique: int, offset: int, *, is_data: bool) -> None:
        found = (extent.offset for extent in disk.extents(offset, disk.size - offset) if extent.is_data == is_data)
        at = next(found, None)
        if at is None:
            if is_data:
                self._answers.give_error(unique, errno.ENXIO)
                return
            at = disk.size  # there is a hole behind the end of every file
        self._answers.give(abi.LSEEK_REPLY.pack(abi.LSEEK_REPLY.size, 0, unique, at))


def _writable(export: Export) -> TrackedDisk:
    """Return the disk of an export that takes writes."""
    if export.disk is None or export.read_only:
        raise DiskError(errno.EROFS, f"write to disk '{export.name}'")
    return export.disk
