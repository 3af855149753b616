"""DataLane: threads that answer the data requests of a mount straight from /dev/fuse.

    kernel ──readv──> lane thread ──> TrackedDisk ──> write(reply)         memory copies, answered at once
                        │  └────────> SleepPool of the disk ──> reply      what may wait for the store
                        │  └────────> held (the write gate is closed) ···> SleepPool when it changes ──> reply
                        └───────────> forward                              every request that is not about an open file

Rules:

1. A lane thread never waits for a store and never ends by an error. A request that may sleep (a cold read, a flush, a
   write over cold pages, fallocate, lseek, getattr) is handed to the disk's pool; the lane goes on. `DiskError` is
   answered as its errno; anything else is a bug: EIO, logged and counted.
2. A write whose own flags say O_DSYNC or O_SYNC is answered after a flush that began when it had ended. So the kernel,
   which sends no FSYNC after such a write to a file opened with FOPEN_DIRECT_IO, need not send one.
3. FSYNC needs no ordering of ours: it covers writes that have *returned* to the guest, those were answered, and they
   were answered after they had ended. `Disk.flush` makes every ended write durable.
4. A write that meets a closed gate is *held*: its data is copied and its answer owed. It is made again, as if it were
   new, each time the gate has changed. No thread waits for it. It is answered EINTR if its caller is being killed,
   because the kernel lets nobody die while an answer is owed; a signal that does not kill changes nothing, for a disk's
   write is not interruptible. A migration's brake (`fusemig.core.admission`) refuses a write as a closed gate does, and
   keeps the answer of one that was made: `WriteGate.hold_reply` calls back, on any thread, within a deadline.
5. A request is answered exactly once, on the descriptor that it was read from. `_held` decides who answers a held one:
   whoever takes it out.
6. Nothing here outlives the process: a node id is an export's inode number, and file handles are not looked at. A
   request that a predecessor left unanswered comes again, with a bit more in its unique (`abi.UNIQUE_RESEND`); it is
   like any other, and interrupts name it so too.

The end for a successor (`leave`): the threads sleep in a read, and must take no further request, at once and without an
answer to anybody. So they read from a number of their own, which comes to mean /dev/null, and a signal has them look
again: a read that a signal ends has taken no request (fs/fuse/dev.c, fuse_dev_do_read), and Python repeats it on the
same number (PEP 475), which says that there is nothing more. What was read by then is answered, or will be sent again.

A request's data is in its thread's buffer until the next request is read, so what is handed over copies it.

FUSE_INTERRUPT (Documentation/filesystems/fuse/fuse.rst, "Interrupting filesystem operations"): it may be ignored, and
is for every request that is not held. It may be read by one thread while another still has the request in hand; its
number is therefore remembered, and looked up when a write is about to be held.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from fusemig.errors import DiskError, GateClosedError, StateError
from fusemig.fuse import abi, device
from fusemig.fuse.abi import AbiError, Opcode
from fusemig.fuse.attributes import attributes_of
from fusemig.fuse.export import ROOT_INODE
from fusemig.fuse.pool import SleepPool

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.disk.tracked import TrackedDisk
    from fusemig.fuse.abi import InHeader
    from fusemig.fuse.export import Export, Exports

MAX_WRITE: Final = 1 << 20
MAX_READ: Final = 1 << 20
"""The kernel's default limit of 256 pages a request (fs.fuse.max_pages_limit), which the INIT reply keeps."""
IO_THREADS: Final = 8
"""Reads and writes of one disk that may sleep at a time."""
AWAY_THREADS: Final = 32
"""Requests of one disk that may wait for another host at a time, apart from the others: it may be out of reach."""
FLUSH_THREADS: Final = 2
"""Flushes of one disk that may sleep at a time, apart from the others: a flush may take long."""

_ENDED: Final = frozenset({errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED, errno.EBADF, errno.EPERM})
"""Reading says the mount is gone: unmounted, aborted, or never made (EPERM)."""
_TRANSIENT: Final = frozenset({errno.EINTR, errno.EAGAIN, errno.ENOENT})
"""Reading found nothing: a signal, another thread was faster, or the caller took its request back."""
_UNWANTED: Final = _ENDED | {errno.ENOENT}
"""Answering says that nobody waits any more."""
_LEAVE_SIGNAL: Final = signal.SIGURG
"""Ignored where it comes from anywhere else."""
_N_OPCODES: Final = 64
_SIGKILL_BIT: Final = 1 << 8
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
_READ: Final = int(Opcode.READ)
_WRITE: Final = int(Opcode.WRITE)

log = structlog.get_logger()


@dataclass(frozen=True)
class LaneStatistics:
    """What a lane has done since it was started."""

    requests: dict[str, int]
    """Requests read, by the name of their opcode."""
    forwarded: int
    read_bytes: int
    written_bytes: int
    errors: int
    """Requests that the lane answered with an errno."""
    bugs: int
    """Requests answered EIO because of a bug of ours; the log has them."""
    held: int
    """Writes that met a closed gate."""
    interrupted: int
    """Held writes answered EINTR because their caller was being killed."""
    handed_over: int
    """Requests given to a pool because they might have slept."""


class _Counters:
    """One lane thread's counters, so that counting the common requests needs no lock."""

    def __init__(self) -> None:
        self.requests = [0] * _N_OPCODES
        self.read_bytes = self.written_bytes = 0


@dataclass(eq=False, slots=True)
class _Change:
    """A guest's write or fallocate that was not made at once."""

    export: Export
    disk: TrackedDisk
    unique: int
    pid: int
    offset: int
    length: int
    make: Callable[[], None]
    """Makes it; raises as `TrackedDisk.pwrite` does."""
    answer: bytes
    n_written: int = 0
    is_durable: bool = False
    resume: Callable[[], None] | None = None
    """What the disk was given to call when the gate has changed; set while it is held."""


class _Pools:
    """The threads of one export."""

    def __init__(self, name: str) -> None:
        self.io = SleepPool(f"lane-{name}-io", IO_THREADS)
        self.away = SleepPool(f"lane-{name}-away", AWAY_THREADS)
        self.flush = SleepPool(f"lane-{name}-flush", FLUSH_THREADS)
        self.stat = SleepPool(f"lane-{name}-stat", 1)  # a file that can be looked at though its reads all wait


class DataLane:
    """The lane threads of one mount, and the requests that they owe an answer."""

    def __init__(
        self,
        descriptor: int,
        exports: Exports,
        forward: Callable[[int, int, bytes], None],
        *,
        n_threads: int,
        ended: Callable[[], None],
    ) -> None:
        """Serve ``exports`` on an open and mounted ``descriptor`` of /dev/fuse, which stays its owner's.

        Args:
            descriptor: of /dev/fuse; blocking.
            exports: the fixed set of files.
            forward: takes every request that the lane does not answer: opcode, unique, the whole message. Called by
                lane threads; must not wait long, and sees to the answer.
            n_threads: not more than there are processors: threads that wait for each other's lock make it slower.
            ended: called once, by the last thread to end.
        """
        self._device = descriptor
        self._reading = -1
        """What the threads read from; of them alone, and closed by the last."""
        self._exports = {export.inode: export for export in exports}
        self._pools = {export.inode: _Pools(export.name) for export in exports}
        self._forward_to = forward
        self._ended = ended
        self._is_stopping = False
        self._is_leaving = False
        self._threads: list[threading.Thread] = []
        self._counters = [_Counters() for _ in range(n_threads)]
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._n_alive = n_threads
        self._held: dict[int, _Change] = {}
        self._interrupted: deque[int] = deque(maxlen=256)
        self._is_refusing = False
        self._counts = dict.fromkeys(("forwarded", "errors", "bugs", "held", "interrupted", "handed_over"), 0)
        self._pool_bytes = [0, 0]  # read, written

    # For the mount

    def start(self) -> None:
        """Start the threads."""
        self._reading = os.dup(self._device)
        for number, counters in enumerate(self._counters):
            thread = threading.Thread(target=self._run, args=(counters,), name=f"lane-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def refuse_held(self) -> None:
        """Answer every held write, and every write that would have to be held from now on, with EIO.

        For the end of a mount only: the guest is told that its write was not made.
        """
        with self._lock:
            self._is_refusing = True
            changes = list(self._held.values())
            self._held.clear()
        for change in changes:
            self._answer_held(change, errno.EIO)

    def stop(self) -> None:
        """Have each thread end after the request it has in hand, or after the next one it reads."""
        self._is_stopping = True

    def leave(self, timeout_s: float) -> bool:
        """Read no more requests, and answer those that were read; False if one is left when the time is out.

        For a successor, to which the kernel sends what has no answer: held changes, and what a store has not done yet.
        Only from the main thread; `ended` is not called. May wait ``timeout_s`` seconds.
        """
        self._is_leaving = True
        former = signal.signal(_LEAVE_SIGNAL, lambda *_: None)  # by default a signal would not end a read
        try:
            self._stop_reading()
            for thread in self._threads:
                if thread.ident is not None and thread.is_alive():
                    with suppress(ProcessLookupError):  # it has just ended
                        signal.pthread_kill(thread.ident, _LEAVE_SIGNAL)
            return self.join(timeout_s)
        finally:
            signal.signal(_LEAVE_SIGNAL, former)

    def abandon(self) -> None:
        """Let go of the descriptor, while threads still run: a store does not answer."""
        self._stop_reading()

    def _stop_reading(self) -> None:
        with self._lock:
            if self._n_alive:
                device.replace_by_null(self._reading)

    @property
    def n_alive(self) -> int:
        """How many lane threads run; the descriptor must stay open until none does."""
        return sum(thread.is_alive() for thread in self._threads)

    def join(self, timeout_s: float) -> bool:
        """Wait for the lane threads, then for what the pools still have in hand; False if something is left."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self.n_alive:
            return False
        for pools in self._pools.values():  # first these: their jobs submit flushes
            pools.io.close()
            pools.away.close()
            is_idle = pools.io.join(deadline) and pools.away.join(deadline)
            pools.flush.close()
            pools.stat.close()
            if not pools.flush.join(deadline) or not pools.stat.join(deadline) or not is_idle:
                return False
        return True

    def count_requests(self) -> int:
        """Return how many reads and writes were read from the kernel."""
        return sum(one.requests[_READ] + one.requests[_WRITE] for one in self._counters)

    def statistics(self) -> LaneStatistics:
        """Return the counters as they are now."""
        requests = [sum(column) for column in zip(*(one.requests for one in self._counters), strict=True)]
        with self._lock:
            read_bytes, written_bytes = self._pool_bytes
            counts = dict(self._counts)
        return LaneStatistics(
            requests={opcode.name.lower(): requests[opcode] for opcode in Opcode if requests[opcode]},
            read_bytes=read_bytes + sum(one.read_bytes for one in self._counters),
            written_bytes=written_bytes + sum(one.written_bytes for one in self._counters),
            **counts,
        )

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    # A lane thread

    def _run(self, counters: _Counters) -> None:
        try:
            self._serve(counters)
        finally:
            with self._lock:
                self._n_alive -= 1
                is_last = not self._n_alive
                if is_last:
                    os.close(self._reading)
            if is_last and not self._is_leaving:
                self._ended()

    def _serve(self, counters: _Counters) -> None:
        """Read requests and answer them; the common READ and WRITE are spelled out here, because calls cost."""
        reading, replies, export_of = self._reading, self._device, self._exports.get
        readv, write, time_ns = os.readv, os.write, time.time_ns
        unpack, pack_header = abi.IO_REQUEST.unpack_from, abi.OUT_HEADER.pack_into
        pack_written = abi.WRITE_REPLY.pack
        head, body = bytearray(abi.IO_HEAD_SIZE), memoryview(bytearray(MAX_WRITE + 4096))
        reply = memoryview(bytearray(abi.OUT_HEADER_SIZE + MAX_READ))
        reply_data = reply[abi.OUT_HEADER_SIZE :]
        buffers: list[bytearray | memoryview] = [head, body]
        requests = counters.requests
        while not self._is_stopping:
            try:
                n = readv(reading, buffers)
            except OSError as exc:
                if exc.errno in _TRANSIENT:
                    continue
                if exc.errno not in _ENDED:
                    log.error("reading /dev/fuse failed, this lane ends", error=str(exc))
                return
            if not n:  # left (`leave`)
                return
            opcode, unique, nodeid, _, offset, size, flags = unpack(head)
            requests[opcode & 63] += 1
            try:
                if opcode == _READ:
                    export = export_of(nodeid)
                    if n == 80 and export is not None and (disk := export.disk) is not None:
                        if offset + size > disk.size:
                            size = max(0, disk.size - offset)
                        if size <= MAX_READ and disk.pread_nowait(reply_data[:size], offset):
                            counters.read_bytes += size
                            pack_header(reply, 0, 16 + size, 0, unique)
                            write(replies, reply[: 16 + size])
                            continue
                elif opcode == _WRITE and not flags & os.O_DSYNC:
                    export = export_of(nodeid)
                    if (
                        n - 80 == size
                        and export is not None
                        and (disk := export.disk) is not None
                        and not export.read_only
                        and offset + size <= disk.size
                        and not disk.write_may_sleep(body[:size], offset)
                    ):
                        disk.pwrite(body[:size], offset)
                        export.mtime_ns = time_ns()
                        counters.written_bytes += size
                        answer = pack_written(24, 0, unique, size, 0)
                        gate = disk.write_gate
                        if gate.holds_replies and gate.hold_reply(offset, size, partial(self._give, unique, answer)):
                            continue
                        write(replies, answer)
                        continue
                self._dispatch(head, body, n)
            except GateClosedError:
                self._guard(unique, partial(self._dispatch, head, body, n))
            except Exception as exc:
                self._answer_exception(unique, exc)

    def _guard(self, unique: int, request: Callable[[], None]) -> None:
        """Run what answers a request; if it raises, answer for it."""
        try:
            request()
        except Exception as exc:
            self._answer_exception(unique, exc)

    def _dispatch(self, head: bytearray, body: memoryview, n: int) -> None:
        """Answer, hand over or forward a request of ``n`` bytes that was not answered at once."""
        header = abi.parse_in_header(memoryview(head)[:n])
        opcode, unique = header.opcode, header.unique
        message = bytes(head[:n])
        if opcode != Opcode.WRITE and n > len(head):
            message += bytes(body[: n - len(head)])
        if opcode == Opcode.INTERRUPT:
            self._interrupt(abi.parse_interrupt(message))
        elif self._is_stopping and opcode not in abi.WITHOUT_REPLY:
            self._answer_error(unique, errno.ENOTCONN)
        elif opcode not in _ANSWERED_HERE or header.nodeid == ROOT_INODE:
            self._count("forwarded")
            self._forward_to(opcode, unique, message)
        elif (export := self._exports.get(header.nodeid)) is None:
            self._answer_error(unique, errno.ENOENT)
        elif opcode == Opcode.FLUSH:
            self._answer(abi.reply(unique))  # of a close, which promises nothing; and nobody waits for pyfuse3 then
        elif opcode == Opcode.GETATTR:
            self._hand_over(self._pools[export.inode].stat, unique, partial(self._getattr, export, unique))
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
        self._answer(abi.attr_reply(unique, found))

    # The requests about data, where they cannot be answered at once

    def _read(self, export: Export, header: InHeader, message: bytes) -> None:
        request = abi.parse_read_write(message)
        disk = export.disk
        length = 0 if disk is None else min(request.size, disk.size - request.offset)
        if disk is None or length <= 0:
            self._answer(abi.reply(header.unique))
            return
        read = partial(self._read_slowly, disk, header.unique, request.offset, length)
        self._hand_over(self._pool(export, request.offset, length, is_write=False), header.unique, read)

    def _read_slowly(self, disk: TrackedDisk, unique: int, offset: int, length: int) -> None:
        reply = bytearray(abi.OUT_HEADER_SIZE + length)
        abi.OUT_HEADER.pack_into(reply, 0, len(reply), 0, unique)
        disk.pread_into(memoryview(reply)[abi.OUT_HEADER_SIZE :], offset)
        with self._lock:
            self._pool_bytes[0] += length
        self._answer(reply)

    def _write(self, export: Export, header: InHeader, message: bytes, data: memoryview) -> None:
        request = abi.parse_read_write(message)
        if request.size != len(data):
            raise AbiError(f"WRITE of {request.size} bytes came with {len(data)}")
        disk = _writable(export)
        length = min(request.size, disk.size - request.offset)  # what lies beyond the end is not written,
        if length <= 0 < request.size:
            self._answer_error(header.unique, errno.ENOSPC)  # as on a block device
            return
        copy = bytes(data[:length])
        change = _Change(
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
            pool = self._pool(export, request.offset, length, is_write=True)
            self._hand_over(pool, header.unique, partial(self._make, change))
        else:
            self._make(change)

    def _fsync(self, export: Export, header: InHeader, message: bytes) -> None:
        abi.parse_fsync(message)
        if export.disk is None:
            self._answer(abi.reply(header.unique))
            return
        flush = partial(self._flush, export.disk, abi.reply(header.unique))
        self._hand_over(self._pools[export.inode].flush, header.unique, flush)

    def _flush(self, disk: TrackedDisk, answer: bytes) -> None:
        disk.flush()
        self._answer(answer)

    def _fallocate(self, export: Export, header: InHeader, message: bytes) -> None:
        request = abi.parse_fallocate(message)
        if request.mode not in _ZEROING_MODES:
            self._answer_error(header.unique, errno.EOPNOTSUPP)
            return
        disk = _writable(export)
        length = min(request.length, disk.size - request.offset)
        if length < request.length and not request.mode & abi.FALLOC_KEEP_SIZE:
            self._answer_error(header.unique, errno.ENOSPC)  # a disk does not grow
            return
        answer = abi.reply(header.unique)
        if length <= 0:
            self._answer(answer)
            return
        make = partial(disk.write_zeroes, request.offset, length)
        change = _Change(export, disk, header.unique, header.pid, request.offset, length, make, answer)
        pool = self._pool(export, request.offset, length, is_write=True)
        self._hand_over(pool, header.unique, partial(self._make, change))

    def _lseek(self, export: Export, header: InHeader, message: bytes) -> None:
        request = abi.parse_lseek(message)
        disk = export.disk
        if request.whence not in (os.SEEK_DATA, os.SEEK_HOLE):  # the kernel answers the others itself
            self._answer_error(header.unique, errno.EINVAL)
        elif disk is None or request.offset >= disk.size:
            self._answer_error(header.unique, errno.ENXIO)
        else:
            seek = partial(self._seek, disk, header.unique, request.offset, is_data=request.whence == os.SEEK_DATA)
            self._hand_over(self._pools[export.inode].io, header.unique, seek)

    def _seek(self, disk: TrackedDisk, unique: int, offset: int, *, is_data: bool) -> None:
        found = (extent.offset for extent in disk.extents(offset, disk.size - offset) if extent.is_data == is_data)
        at = next(found, None)
        if at is None:
            if is_data:
                self._answer_error(unique, errno.ENXIO)
                return
            at = disk.size  # there is a hole behind the end of every file
        self._answer(abi.LSEEK_REPLY.pack(abi.LSEEK_REPLY.size, 0, unique, at))

    def _pool(self, export: Export, offset: int, length: int, *, is_write: bool) -> SleepPool:
        pools = self._pools[export.inode]
        waits = export.disk is not None and export.disk.waits_for_peer(offset, length, is_write=is_write)
        return pools.away if waits else pools.io

    def _hand_over(self, pool: SleepPool, unique: int, request: Callable[[], None]) -> None:
        self._count("handed_over")
        pool.submit(partial(self._guard, unique, request))

    # Changes, which the gate may hold

    def _make(self, change: _Change) -> None:
        """Make a change and answer it, or hold it."""
        while True:
            try:
                change.make()
            except GateClosedError as refused:
                if self._hold(change, refused):
                    return
            else:
                break
        change.export.mtime_ns = time.time_ns()
        with self._lock:
            self._pool_bytes[1] += change.n_written
        gate, finish = change.disk.write_gate, partial(self._guard, change.unique, partial(self._finish, change))
        if not gate.holds_replies or not gate.hold_reply(change.offset, change.length, finish):
            self._finish(change)

    def _finish(self, change: _Change) -> None:
        """Answer a change that was made."""
        if change.is_durable:
            flush = partial(self._flush, change.disk, change.answer)
            self._hand_over(self._pools[change.export.inode].flush, change.unique, flush)
        else:
            self._answer(change.answer)

    def _hold(self, change: _Change, refused: GateClosedError) -> bool:
        """Keep a change until the gate changes; return False if it has changed already.

        Raises:
            DiskError: EIO, the mount ends; EAGAIN, too many are parked.
        """
        with self._lock:
            if self._is_refusing:
                raise DiskError(errno.EIO, f"write to disk '{change.disk.name}' at unmount")
            change.resume = resume = partial(self._resume, change)
            self._held[change.unique] = change
            self._counts["held"] += 1
            is_interrupted = change.unique in self._interrupted
        if is_interrupted:
            self._answer_interrupted(change)
        try:
            is_parked = change.disk.write_gate.park(resume, refused)
        except DiskError:
            if self._take(change.unique) is None:
                return True
            raise
        if not is_parked:
            return self._take(change.unique) is None  # None: answered in the meantime
        with self._lock:
            is_held = self._held.get(change.unique) is change and change.resume is resume
        if not is_held:  # answered before it was parked, so that nobody has given the place back; or resumed
            change.disk.write_gate.unpark(resume)
        return True

    def _take(self, unique: int) -> _Change | None:
        """Take a change out of the held ones; whoever gets it owes the answer."""
        with self._lock:
            return self._held.pop(unique, None)

    def _resume(self, change: _Change) -> None:
        """Have a held change made again; called by whoever changed the gate."""
        if self._is_leaving or self._take(change.unique) is None:
            return  # it is a successor's, or was answered EINTR or EIO: nothing is left to make
        pool = self._pools[change.export.inode].io
        self._guard(change.unique, partial(self._hand_over, pool, change.unique, partial(self._make, change)))

    def _interrupt(self, unique: int) -> None:
        with self._lock:
            change = self._held.get(unique)
            if change is None:
                self._interrupted.append(unique)
                return
        self._answer_interrupted(change)

    def _answer_interrupted(self, change: _Change) -> None:
        """Give up a held change whose caller is being killed."""
        if _is_dying(change.pid) and self._take(change.unique) is not None:
            self._count("interrupted")
            self._answer_held(change, errno.EINTR)

    def _answer_held(self, change: _Change, code: int) -> None:
        """Answer a change that was taken out of the held ones, and give its place at the disk back."""
        if change.resume is not None:
            change.disk.write_gate.unpark(change.resume)
        self._answer_error(change.unique, code)

    # Answers

    def _answer(self, reply: bytes | bytearray) -> None:
        try:
            os.write(self._device, reply)
        except OSError as exc:
            if exc.errno not in _UNWANTED:
                raise

    def _give(self, unique: int, reply: bytes) -> None:
        """Answer what was held, on whichever thread; never raises."""
        self._guard(unique, partial(self._answer, reply))

    def _answer_error(self, unique: int, code: int) -> None:
        self._count("errors")
        self._answer(abi.error_reply(unique, code))

    def _answer_exception(self, unique: int, exc: Exception) -> None:
        """Answer a request that raised; never raises itself."""
        if self._is_leaving and isinstance(exc, StateError):
            return  # its pool has ended before it was done: it is sent to the successor
        try:
            if isinstance(exc, DiskError):
                self._answer_error(unique, exc.errno)
            elif not (isinstance(exc, OSError) and exc.errno in _UNWANTED):  # it was the answer that failed
                self._count("bugs")
                log.error("request failed by a bug, answered EIO", exc_info=exc)
                self._answer_error(unique, errno.EIO)
        except Exception as second:
            log.error("a request could not be answered", error=repr(second))


def _writable(export: Export) -> TrackedDisk:
    """Return the disk of an export that takes writes."""
    if export.disk is None or export.read_only:
        raise DiskError(errno.EROFS, f"write to disk '{export.name}'")
    return export.disk


def _is_dying(pid: int) -> bool:
    """Tell whether a thread has a SIGKILL pending, which it has whatever signal ends its process.

    (kernel/signal.c, complete_signal: a fatal signal becomes SIGKILL for every thread of the group.) A thread that has
    no number in our pid namespace cannot be asked; it is taken to be dying, because waiting on would be worse.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    pending = (line.split()[1] for line in status.splitlines() if line.startswith(("SigPnd:", "ShdPnd:")))
    return any(int(mask, 16) & _SIGKILL_BIT for mask in pending)
