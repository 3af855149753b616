"""Brake: which guests' writes may be made now, and which of those that were made may be answered now.

A migration lays a brake on a disk when guests write faster than it can follow. There are three ways, and none blocks a
thread or takes a write back:

    window      a write to a mirrored chunk waits until no more than the window of mirrored blocks is missing at the
                destination. So what a switchover has to send is bounded, and a guest writes as fast as the link sends.
    blocking    besides, a write that was made is answered when the destination has acknowledged a read of its blocks
                that began after it had ended: both sides have it.
    rate        every write waits until the disk's share of bytes per second allows it (a token bucket).

With a window and a rate a write to a mirrored chunk waits for both, and any other for the rate alone.

Who waits is kept in the order of arrival and gets a *turn*: when there is room the write is tried again, and is let
through because its turn is noted. So later ones that wait for the same cannot overtake it, and a write that is as large
as the window comes to its turn too. Those that need no room pass those that wait for it, though not a write to the same
place. What was refused here has not happened; the lane keeps it as it keeps a write at a closed gate.

Whoever lays the brake owes every waiting write its turn, and every held reply its answer, before a deadline (`late`),
and releases it when it ends. Pure, with time as ``now``; guarded by the disk's lock. What is to be called is returned,
for the caller to call without the lock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE, chunks_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.core.tracker import ChunkTracker

    Call = Callable[[], None]

BURST_S: Final = 0.02
"""What a rate allows in this time, in seconds, may be written at once."""
TURN_S: Final = 1.0
"""A turn that nobody took for so long is forgotten: its write was given up (its caller was killed)."""


@dataclass(slots=True)
class _Waiting:
    """A write that was refused and is kept for later."""

    resume: Call
    offset: int
    length: int
    since: float

    def overlaps(self, offset: int, length: int) -> bool:
        """Tell whether it writes to some of a range."""
        return self.offset < offset + length and offset < self.offset + self.length


@dataclass(slots=True, eq=False)
class _Held:
    """A write that was made and is not answered."""

    answer: Call
    since: float
    n_left: int = 0
    """Chunks of it that the destination has not acknowledged."""


class Brake:
    """What holds back the writes to one disk."""

    def __init__(self, tracker: ChunkTracker, now: float) -> None:
        """Hold nothing back; ``tracker`` is the migration's."""
        self._tracker = tracker
        self._now = now
        self.window_bytes: int | None = None
        """How much of the mirrored chunks may be missing at the destination; None: any amount."""
        self.is_blocking = False
        """Whether replies wait for the destination."""
        self._rate = 0.0
        self._tokens = 0.0
        self._waiting: deque[_Waiting] = deque()
        self._is_mixed = False
        """Whether there may be some among them that need no room."""
        self._turns: dict[tuple[int, int], list[int]] = {}
        """Turns that were given and not taken, by offset and length of the write: the room that each has."""
        self._turn_bytes = 0
        """The sum of that room."""
        self._turn_given_at = now
        self._before: dict[int, list[_Held]] = {}
        """Made writes by chunk, for which the chunk has to be taken once more."""
        self._under_way: dict[int, list[_Held]] = {}
        """By chunk, what the acknowledgement of the chunk in flight is for."""
        self._held: dict[_Held, None] = {}
        self._answerable: list[Call] = []

    @property
    def n_waiting(self) -> int:
        """Writes that wait for their turn."""
        return len(self._waiting)

    @property
    def n_held(self) -> int:
        """Writes that were made and are not answered."""
        return len(self._held)

    @property
    def waits_for_pass(self) -> bool:
        """Whether something waits that what is sent helps, and not time alone."""
        if self._held or not self._rate:
            return bool(self._held or self._waiting)
        return any(self._needs_room(one.offset, one.length) and not self._has_room(one.length) for one in self._waiting)

    # Writes

    def admit(self, offset: int, length: int) -> bool:
        """Tell whether a write may be made now; if so it counts as made."""
        key = offset, length
        if key in self._turns:
            self._turn_bytes -= self._turns[key].pop()
            if not self._turns[key]:
                del self._turns[key]
            return True
        if not self._may_pass(offset, length):
            return False
        if self._rate:
            self._tokens -= length
        return True

    def wait(self, resume: Call, offset: int, length: int) -> bool:
        """Keep a refused write for its turn; False if it may be made now."""
        if self._may_pass(offset, length):
            return False
        self._is_mixed = bool(self._rate) or (self._is_mixed and bool(self._waiting))
        self._waiting.append(_Waiting(resume, offset, length, self._now))
        return True

    def forget(self, resume: Call) -> None:
        """Give up a write that waits; harmless if it does not."""
        for one in self._waiting:
            if one.resume == resume:
                self._waiting.remove(one)
                return

    def hold(self, offset: int, length: int, answer: Call) -> bool:
        """Keep the answer of a write that has ended; False if it may be given now."""
        mirror, tracker = self._tracker.mirror, self._tracker
        if not self.is_blocking or mirror is None:
            return False
        held = _Held(answer, self._now)
        for chunk in chunks_of(offset, length):
            if chunk not in mirror:
                continue  # the passes send it
            first = max(offset - chunk * CHUNK_SIZE, 0) // BLOCK_SIZE
            stop = -(-min(offset + length - chunk * CHUNK_SIZE, CHUNK_SIZE) // BLOCK_SIZE)
            blocks = (1 << stop) - (1 << first)
            if tracker.dirty_mask(chunk) & blocks:
                self._before.setdefault(chunk, []).append(held)
            elif tracker.in_flight_mask(chunk) & blocks:  # they were dirty when the write had ended, and taken since
                self._under_way.setdefault(chunk, []).append(held)
            else:
                continue
            held.n_left += 1
        if not held.n_left:
            return False
        self._held[held] = None
        return True

    def _may_pass(self, offset: int, length: int) -> bool:
        if self._rate and self._tokens <= 0:
            return False
        if self._needs_room(offset, length):
            return not self._waiting and self._has_room(length)
        return not any(
            (self._rate and not self._needs_room(one.offset, one.length)) or one.overlaps(offset, length)
            for one in self._waiting
        )

    def _needs_room(self, offset: int, length: int) -> bool:
        mirror = self._tracker.mirror
        if self.window_bytes is None or mirror is None:
            return False
        return any(chunk in mirror for chunk in chunks_of(offset, length))

    def _has_room(self, length: int) -> bool:
        assert self._tracker.mirror is not None
        assert self.window_bytes is not None
        used = self._tracker.mirror.pending_blocks * BLOCK_SIZE + self._turn_bytes
        return not used or used + length <= self.window_bytes

    # The migration

    def note_taken(self, chunk: int) -> None:
        """A chunk's dirty blocks are read from now on."""
        if chunk in self._before:
            self._under_way.setdefault(chunk, []).extend(self._before.pop(chunk))

    def note_acknowledged(self, chunk: int) -> None:
        """What was taken of a chunk arrived."""
        for held in self._under_way.pop(chunk, ()):
            held.n_left -= 1
            if not held.n_left and held in self._held:
                del self._held[held]
                self._answerable.append(held.answer)

    def set_rate(self, bytes_per_s: float) -> None:
        """Let no more be written per second; 0: any amount."""
        self._rate = bytes_per_s
        self._tokens = min(self._tokens, bytes_per_s * BURST_S)

    def advance(self, now: float) -> None:
        """Take note of the time."""
        if self._rate:
            self._tokens = min(self._tokens + self._rate * (now - self._now), self._rate * BURST_S)
        self._now = now
        if self._turns and now - self._turn_given_at > TURN_S:
            self._turns.clear()
            self._turn_bytes = 0

    def due(self) -> list[Call]:
        """Return what is to be called now: for writes whose turn it is, and for replies that may be given."""
        calls, self._answerable = self._answerable, []
        kept: deque[_Waiting] = deque()
        is_full = False
        while self._waiting and not (self._rate and self._tokens <= 0):
            one = self._waiting.popleft()
            if self._needs_room(one.offset, one.length):
                is_full = is_full or not self._has_room(one.length)  # then it is for the first that waits for it
                may_pass = not is_full
            else:
                may_pass = not any(other.overlaps(one.offset, one.length) for other in kept)
            if not may_pass:
                kept.append(one)
                if not self._is_mixed:
                    break
                continue
            if self._rate:
                self._tokens -= one.length
            calls.append(self._give_turn(one))
        self._waiting.extendleft(reversed(kept))
        return calls

    def late(self, deadline_s: float) -> list[Call]:
        """Return what has waited ``deadline_s`` seconds, to be called now whether there is room or not."""
        calls = []
        while self._waiting and self._now - self._waiting[0].since >= deadline_s:
            calls.append(self._give_turn(self._waiting.popleft()))
        while self._held and self._now - (first := next(iter(self._held))).since >= deadline_s:
            del self._held[first]
            calls.append(first.answer)
        return calls

    def longest_wait_s(self) -> float:
        """Return how long the oldest waiting write or held reply has waited, in seconds."""
        held = next(iter(self._held), None)
        since = self._now if held is None else held.since
        return self._now - (min(since, self._waiting[0].since) if self._waiting else since)

    def release_waiting(self) -> list[Call]:
        """Forget the turns; return what every waiting write is to be tried again with."""
        calls = [one.resume for one in self._waiting]
        self._waiting.clear()
        self._turns.clear()
        self._turn_bytes = 0
        return calls

    def release(self) -> list[Call]:
        """Hold nothing back any more; return what is to be called for everything that waits."""
        self.window_bytes, self.is_blocking = None, False
        self.set_rate(0)
        calls = self.release_waiting() + self._answerable + [held.answer for held in self._held]
        self._answerable = []
        self._held.clear()
        self._before.clear()
        self._under_way.clear()
        return calls

    def _give_turn(self, one: _Waiting) -> Call:
        room = one.length if self._needs_room(one.offset, one.length) else 0
        self._turns.setdefault((one.offset, one.length), []).append(room)
        self._turn_bytes += room
        self._turn_given_at = self._now
        return one.resume
