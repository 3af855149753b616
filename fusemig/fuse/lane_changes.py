"""Changes: the guest's writes and fallocates of a lane that were not made at once, and those that the gate holds.

A change that meets a closed gate is *held*: its data is copied and its answer owed. It is made again, as if it were
new, each time the gate has changed. No thread waits for it. It is answered EINTR if its caller is being killed, because
the kernel lets nobody die while an answer is owed; a signal that does not kill changes nothing, for a disk's write is
not interruptible. ``_held`` decides who answers a held one: whoever takes it out.

FUSE_INTERRUPT (Documentation/filesystems/fuse/fuse.rst, "Interrupting filesystem operations"): it may be ignored, and
is for every request that is not held. It may be read by one thread while another still has the request in hand; its
number is therefore remembered, and looked up when a write is about to be held.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fusemig.errors import DiskError, GateClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fusemig.disk.tracked import TrackedDisk
    from fusemig.fuse.export import Export
    from fusemig.fuse.lane_answers import Answers
    from fusemig.fuse.pool import ExportPools

_SIGKILL_BIT: Final = 1 << 8


@dataclass(eq=False, slots=True)
class Change:
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


class Changes:
    """Makes changes, on any thread, and keeps those that cannot be made yet."""

    def __init__(self, answers: Answers, pools: Mapping[int, ExportPools]) -> None:
        """Answer with ``answers``; ``pools`` are the exports', by inode number."""
        self._answers = answers
        self._pools = pools
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._held: dict[int, Change] = {}
        self._interrupted: deque[int] = deque(maxlen=256)
        self._is_refusing = False
        self.written_bytes = 0

    def make(self, change: Change) -> None:
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
            self.written_bytes += change.n_written
        gate = change.disk.write_gate
        finish = partial(self._answers.guard, change.unique, partial(self._finish, change))
        if not gate.holds_replies or not gate.hold_reply(change.offset, change.length, finish):
            self._finish(change)

    def _finish(self, change: Change) -> None:
        """Answer a change that was made."""
        if change.is_durable:
            self.answer_flushed(change.export, change.disk, change.unique, change.answer)
        else:
            self._answers.give(change.answer)

    def _hold(self, change: Change, refused: GateClosedError) -> bool:
        """Keep a change until the gate changes; return False if it has changed already.

        Raises:
            DiskError: EIO, the mount ends; EAGAIN, too many are parked.
        """
        with self._lock:
            if self._is_refusing:
                raise DiskError(errno.EIO, f"write to disk '{change.disk.name}' at unmount")
            change.resume = resume = partial(self._resume, change)
            self._held[change.unique] = change
            is_interrupted = change.unique in self._interrupted
        self._answers.count("held")
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

    def _take(self, unique: int) -> Change | None:
        """Take a change out of the held ones; whoever gets it owes the answer."""
        with self._lock:
            return self._held.pop(unique, None)

    def _resume(self, change: Change) -> None:
        """Have a held change made again; called by whoever changed the gate."""
        if self._answers.is_leaving or self._take(change.unique) is None:
            return  # it is a successor's, or was answered EINTR or EIO: nothing is left to make
        pool = self._pools[change.export.inode].of_data(change.offset, change.length, is_write=True)
        again = partial(self._answers.hand_over, pool, change.unique, partial(self.make, change))
        self._answers.guard(change.unique, again)

    def interrupt(self, unique: int) -> None:
        """Give up a held change whose caller is being killed, or one that is about to be held."""
        with self._lock:
            change = self._held.get(unique)
            if change is None:
                self._interrupted.append(unique)
                return
        self._answer_interrupted(change)

    def _answer_interrupted(self, change: Change) -> None:
        """Give up a held change whose caller is being killed."""
        if _is_dying(change.pid) and self._take(change.unique) is not None:
            self._answers.count("interrupted")
            self._answer_held(change, errno.EINTR)

    def _answer_held(self, change: Change, code: int) -> None:
        """Answer a change that was taken out of the held ones, and give its place at the disk back."""
        if change.resume is not None:
            change.disk.write_gate.unpark(change.resume)
        self._answers.give_error(change.unique, code)

    def answer_flushed(self, export: Export, disk: TrackedDisk, unique: int, answer: bytes) -> None:
        """Answer a request after a flush that begins now."""
        self._answers.hand_over(self._pools[export.inode].flush, unique, partial(self._flush, disk, answer))

    def _flush(self, disk: TrackedDisk, answer: bytes) -> None:
        disk.flush()
        self._answers.give(answer)

    def refuse(self) -> None:
        """Answer every held write, and every write that would have to be held from now on, with EIO.

        For the end of a mount only: the guest is told that its write was not made.
        """
        with self._lock:
            self._is_refusing = True
            changes = list(self._held.values())
            self._held.clear()
        for change in changes:
            self._answer_held(change, errno.EIO)


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
