"""Backoff."""

from __future__ import annotations

from fusemig.backoff import Backoff


def test_the_wait_doubles_up_to_the_longest() -> None:
    """And stays there."""
    backoff = Backoff(0.25, 1.5)
    assert [backoff.next_s() for _ in range(5)] == [0.25, 0.5, 1.0, 1.5, 1.5]


def test_success_begins_anew() -> None:
    """The next failure is a first one."""
    backoff = Backoff(0.5, 30.0)
    for _ in range(4):
        backoff.next_s()
    backoff.reset()
    assert backoff.next_s() == 0.5
