"""Whether a lost connection is made again, and when; decided without one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from fusemig.core.phase import MigrationPhase as P
from fusemig.errors import (
    AuthenticationError,
    ConnectionLostError,
    MigrationError,
    PeerBusyError,
    PeerRefusedError,
    RemoteProtocolError,
)
from fusemig.migration.reconnection import MAX_LOST_SWITCHOVERS, MAX_RETRY_S, Reconnection
from fusemig.migration.stats import MigrationParameters

if TYPE_CHECKING:
    from fusemig.errors import FusemigError

LOST = ConnectionLostError("lost")


def reconnection(*, limit_s: float = 60.0, waiting: str = "") -> Reconnection:
    """Return that of a migration whose destination was there once."""
    one = Reconnection(MigrationParameters(reconnect_limit_s=limit_s), waiting=waiting)
    one.note_connected()
    return one


def may_follow(one: Reconnection, failure: FusemigError, phase: P, **but: bool) -> bool:
    """Ask as a migration does whose destination keeps account of what it has."""
    return one.may_follow(failure, phase, **{"may_thaw": True, "can_resume": True, "is_resumed": False, **but})


def test_passes_go_on_over_another_connection() -> None:
    """If it was the connection that failed, the destination knows what it has, and it was asked for."""
    one = reconnection()
    for phase in (P.BULK, P.DIRTY, P.PRE_SWITCHOVER, P.FROZEN):
        assert may_follow(one, LOST, phase)
        assert may_follow(one, RemoteProtocolError("damaged"), phase)
        assert not may_follow(one, MigrationError("the disk is full"), phase)
        assert not may_follow(one, LOST, phase, can_resume=False)
        assert not may_follow(reconnection(limit_s=0.0), LOST, phase)
    for phase in (P.COMMITTED, P.PLEDGED, P.CANCELLING, P.POSTCOPY):
        assert not may_follow(one, LOST, phase), "the disks may not be ours"


def test_a_switchover_is_lost_a_few_times_at_most_and_never_once_the_disks_are_given_away() -> None:
    """Each costs the guests a pause."""
    one = reconnection()
    assert not may_follow(one, LOST, P.FROZEN, may_thaw=False)
    for _ in range(MAX_LOST_SWITCHOVERS):
        assert may_follow(one, LOST, P.FROZEN)
        one.note_lost_switchover()
    assert not may_follow(one, LOST, P.FROZEN)
    assert may_follow(one, LOST, P.DIRTY)


def test_what_has_not_begun_is_tried_again_where_somebody_was_before() -> None:
    """Not at a wrong address, and not where it was refused."""
    assert may_follow(reconnection(), LOST, P.SETUP, can_resume=False)
    assert not Reconnection(MigrationParameters(reconnect_limit_s=60.0)).may_follow(
        LOST, P.SETUP, may_thaw=True, can_resume=False, is_resumed=False
    )
    for failure in (AuthenticationError("who?"), PeerRefusedError("no"), RemoteProtocolError("garbage")):
        assert not may_follow(reconnection(waiting="lost"), failure, P.SETUP)
    busy = PeerBusyError("the old connection is still there")
    assert not may_follow(reconnection(), busy, P.SETUP)
    assert may_follow(reconnection(), busy, P.SETUP, is_resumed=True)
    assert may_follow(reconnection(waiting="restarted"), busy, P.SETUP)


async def test_pauses_grow_until_there_was_no_progress_for_too_long(autojump_clock: trio.testing.MockClock) -> None:
    """And what arrives begins the time anew."""
    one = reconnection(limit_s=30.0)
    pauses = []
    began_at = trio.current_time()
    with pytest.raises(ConnectionLostError, match="for 30 s nothing could be sent"):
        while True:
            before = trio.current_time()
            await one.put_off(LOST)
            pauses.append(trio.current_time() - before)
    assert pauses == sorted(pauses)
    assert pauses[-1] <= MAX_RETRY_S
    assert trio.current_time() - began_at <= 30.0
    one.note_progress()
    before = trio.current_time()
    await one.put_off(LOST)
    assert trio.current_time() - before == pytest.approx(pauses[0])


async def test_a_connection_that_is_back_is_counted(autojump_clock: trio.testing.MockClock) -> None:
    """The first one is not."""
    one = reconnection()
    one.note_agreed()
    assert (one.n_reconnects, one.waiting) == (0, "")
    await one.put_off(LOST)
    assert one.waiting == "lost"
    one.note_agreed()
    assert (one.n_reconnects, one.waiting) == (1, "")
