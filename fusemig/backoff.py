"""Backoff: how long to wait before the next try of something that failed."""

from __future__ import annotations


class Backoff:
    """Doubles the wait from the first to the longest, until `reset`; pure, the caller sleeps."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        """Wait ``first_s`` seconds after the first failure, and never more than ``longest_s``."""
        self._first_s = first_s
        self._longest_s = longest_s
        self._next_s = first_s

    def next_s(self) -> float:
        """Return how many seconds to wait now."""
        wait_s = self._next_s
        self._next_s = min(2 * wait_s, self._longest_s)
        return wait_s

    def reset(self) -> None:
        """Something went well: the next failure is a first one."""
        self._next_s = self._first_s
