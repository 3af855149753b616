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
4. A write that meets a closed gate is *held* (`fusemig.fuse.lane_changes`): no thread waits for it. A migration's brake
   (`fusemig.core.admission`) refuses a write as a closed gate does, and keeps the answer of one that was made:
   `WriteGate.hold_reply` calls back, on any thread, within a deadline.
5. A request is answered exactly once, on the descriptor that it was read from (`fusemig.fuse.lane_answers`).
6. Nothing here outlives the process: a node id is an export's inode number, and file handles are not looked at. A
   request that a predecessor left unanswered comes again, with a bit more in its unique (`abi.UNIQUE_RESEND`); it is
   like any other, and interrupts name it so too.

The end for a successor (`leave`): the threads sleep in a read, and must take no further request, at once and without an
answer to anybody. So they read from a number of their own, which comes to mean /dev/null, and a signal has them look
again: a read that a signal ends has taken no request (fs/fuse/dev.c, fuse_dev_do_read), and Python repeats it on the
same number (PEP 475), which says that there is nothing more. What was read by then is answered, or will be sent again.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from fusemig.errors import GateClosedError
from fusemig.fuse import abi, device
from fusemig.fuse.abi import Opcode
from fusemig.fuse.lane_answers import ENDED, Answers
from fusemig.fuse.lane_changes import Changes
from fusemig.fuse.lane_requests import Requests
from fusemig.fuse.pool import ExportPools

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.fuse.export import Exports

MAX_WRITE: Final = 1 << 20
MAX_READ: Final = 1 << 20
"""The kernel's default limit of 256 pages a request (fs.fuse.max_pages_limit), which the INIT reply keeps."""
_TRANSIENT: Final = frozenset({errno.EINTR, errno.EAGAIN, errno.ENOENT})
"""Reading found nothing: a signal, another thread was faster, or the caller took its request back."""
_LEAVE_SIGNAL: Final = signal.SIGURG
"""Ignored where it comes from anywhere else."""
_N_OPCODES: Final = 64
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
        self._pools = {export.inode: ExportPools(export) for export in exports}
        self._answers = Answers(descriptor)
        self._changes = Changes(self._answers, self._pools)
        self._requests = Requests(exports, self._answers, self._changes, self._pools, forward)
        self._ended = ended
        self._threads: list[threading.Thread] = []
        self._counters = [_Counters() for _ in range(n_threads)]
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._n_alive = n_threads

    # For the mount

    def start(self) -> None:
        """Start the threads."""
        self._reading = os.dup(self._device)
        for number, counters in enumerate(self._counters):
            thread = threading.Thread(target=self._run, args=(counters,), name=f"lane-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def refuse_held(self) -> None:
        """Answer every held write, and every write that would have to be held from now on, with EIO."""
        self._changes.refuse()

    def stop(self) -> None:
        """Have each thread end after the request it has in hand, or after the next one it reads."""
        self._requests.is_stopping = True

    def leave(self, timeout_s: float) -> bool:
        """Read no more requests, and answer those that were read; False if one is left when the time is out.

        For a successor, to which the kernel sends what has no answer: held changes, and what a store has not done yet.
        Only from the main thread; `ended` is not called. May wait ``timeout_s`` seconds.
        """
        self._answers.is_leaving = True
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
        return all(pools.close(deadline) for pools in self._pools.values())

    def count_requests(self) -> int:
        """Return how many reads and writes were read from the kernel."""
        return sum(one.requests[_READ] + one.requests[_WRITE] for one in self._counters)

    def statistics(self) -> LaneStatistics:
        """Return the counters as they are now."""
        requests = [sum(column) for column in zip(*(one.requests for one in self._counters), strict=True)]
        return LaneStatistics(
            requests={opcode.name.lower(): requests[opcode] for opcode in Opcode if requests[opcode]},
            read_bytes=self._requests.read_bytes + sum(one.read_bytes for one in self._counters),
            written_bytes=self._changes.written_bytes + sum(one.written_bytes for one in self._counters),
            **self._answers.counts(),
        )

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
            if is_last and not self._answers.is_leaving:
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
        requests, answers, give, counts = self._requests, self._answers, self._answers.give_held, counters.requests
        while not requests.is_stopping:
            try:
                n = readv(reading, buffers)
            except OSError as exc:
                if exc.errno in _TRANSIENT:
                    continue
                if exc.errno not in ENDED:
                    log.error("reading /dev/fuse failed, this lane ends", error=str(exc))
                return
            if not n:  # left (`leave`)
                return
            opcode, unique, nodeid, _, offset, size, flags = unpack(head)
            counts[opcode & 63] += 1
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
                        if gate.holds_replies and gate.hold_reply(offset, size, partial(give, unique, answer)):
                            continue
                        write(replies, answer)
                        continue
                requests.dispatch(head, body, n)
            except GateClosedError:
                answers.guard(unique, partial(requests.dispatch, head, body, n))
            except Exception as exc:
                answers.give_exception(unique, exc)
