"""Pacing: how a migration mirrors a disk and holds its guests back; the other side of the disk's brake.

Every call is one short step under the disk's lock. What then is to be called, for writes whose turn it is and for
replies that may be given, is called after it, on the caller's thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusemig.core.admission import Brake
from fusemig.core.units import BLOCK_SIZE

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from fusemig.core.mirror import Reach
    from fusemig.core.tracker import ChunkTracker
    from fusemig.disk.gate import WriteGate


class Pacing:
    """Lays the brake of one migration on one disk, and takes it off."""

    def __init__(self, gate: WriteGate, lock: threading.Lock, tracker: ChunkTracker) -> None:
        """Made by `fusemig.disk.tracking.Tracking`; nothing is held back."""
        self._gate = gate
        self._lock = lock
        self._tracker = tracker
        self._brake: Brake | None = None

    def mirror(self, reach: Reach, now: float, on_waiting: Callable[[], None]) -> None:
        """Mirror chunks; how much of them may be missing at the destination is `set_window`'s.

        Args:
            reach: which; what is dirty or in flight comes in when it is acknowledged.
            now: the time.
            on_waiting: called on any thread, without a lock, when something begins to wait.
        """
        with self._lock:
            self._tracker.begin_mirror(reach)
        self._lay(now, on_waiting)

    def set_window(self, window_bytes: int, *, is_blocking: bool) -> None:
        """Have writes wait while more than this is missing, and replies too until their writes are there."""
        brake = self._brake
        if brake is None:
            return
        with self._lock:
            brake.window_bytes = window_bytes
            self._gate.holds_replies = brake.is_blocking = is_blocking
            calls = brake.due()
        _call(calls)

    def limit_rate(self, bytes_per_s: float, now: float, on_waiting: Callable[[], None]) -> None:
        """Let guests write no faster than this, or as fast as they like (0).

        ``now`` and ``on_waiting`` are as `mirror` has them.
        """
        if not bytes_per_s and self._brake is None:
            return
        brake = self._lay(now, on_waiting)
        with self._lock:
            brake.set_rate(bytes_per_s)
            calls = brake.due()
        _call(calls)

    def note_acknowledged(self, chunks: Sequence[int]) -> None:
        """Go on with what waited for chunks that arrived; the tracker knows of them."""
        brake = self._brake
        if brake is None:
            return
        with self._lock:
            for chunk in chunks:
                brake.note_acknowledged(chunk)
            calls = brake.due()
        _call(calls)

    def advance(self, now: float, deadline_s: float) -> float:
        """Let time pass for what waits, and nothing wait longer than ``deadline_s`` seconds.

        Returns:
            How long the oldest of what still waits has waited, in seconds.
        """
        brake = self._brake
        if brake is None:
            return 0.0
        with self._lock:
            brake.advance(now)
            calls = brake.late(deadline_s) + brake.due()
            longest_s = brake.longest_wait_s()
        _call(calls)
        return longest_s

    def open_window(self) -> None:
        """Have no write wait for its turn any more; replies are still held.

        For the freeze: writes are tried again and parked at the closed gate.
        """
        brake = self._brake
        if brake is None:
            return
        with self._lock:
            brake.window_bytes = None
            brake.set_rate(0)
            calls = brake.release_waiting()
        _call(calls)

    def release(self) -> None:
        """Mirror and hold back nothing any more: what waits is tried again or answered. Idempotent."""
        brake, self._brake = self._brake, None
        if brake is None:
            return
        self._gate.lay_brake(None)
        with self._lock:
            self._tracker.mirror = None
            calls = brake.release()
        _call(calls)

    def _lay(self, now: float, on_waiting: Callable[[], None]) -> Brake:
        brake = self._brake
        if brake is None:
            brake = self._brake = Brake(self._tracker, now)
            self._gate.lay_brake(brake, on_waiting)
        return brake

    @property
    def mirrored_chunks(self) -> int:
        """How many chunks are mirrored."""
        mirror = self._tracker.mirror
        return 0 if mirror is None else mirror.n_chunks

    @property
    def pending_bytes(self) -> int:
        """How much of the mirrored chunks the destination does not have."""
        mirror = self._tracker.mirror
        return 0 if mirror is None else mirror.pending_blocks * BLOCK_SIZE

    @property
    def held_replies(self) -> int:
        """Writes that were made and wait for the destination before they are answered."""
        return 0 if self._brake is None else self._brake.n_held

    @property
    def waits_for_pass(self) -> bool:
        """Whether a write or a reply waits until what is dirty is sent."""
        brake = self._brake
        if brake is None:
            return False
        with self._lock:
            return brake.waits_for_pass


def _call(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
