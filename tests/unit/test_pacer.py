"""Pacer: what is done to guests around a switchover that is lost, and beside a throttle."""

from __future__ import annotations

from typing import Final

import pytest
import trio
import trio.testing

from fusemig.core.mirror import Reach
from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.tracked import TrackedDisk
from fusemig.errors import GateClosedError
from fusemig.migration.pacer import HOLD_DEADLINE_S, SILENCE_S, TICK_S, Pacer
from fusemig.migration.reader import OutgoingDisk
from fusemig.migration.stats import MigrationParameters

SIZE: Final = 8 * CHUNK_SIZE
LINK: Final = 1.0 * CHUNK_SIZE
"""Bytes per second."""


class Paced:
    """A disk that is written twice as fast as the link carries, and the pacer of its migration."""

    def __init__(self, **parameters: int) -> None:
        self.parameters = MigrationParameters(**parameters)  # type: ignore[arg-type]
        self.disk = TrackedDisk(MemoryDisk("a", SIZE))
        self.outgoing = OutgoingDisk(0, self.disk, self.disk.start_tracking())
        self.told: list[tuple[Reach, int]] = []
        self.pacer = Pacer(
            self.parameters,
            lambda: [self.outgoing],
            lambda: LINK,
            lambda reach, percent: self.told.append((reach, percent)),
            can_mirror=True,
        )

    async def guest(self) -> None:
        """Write blocks that nobody holds back."""
        for at in range(0, SIZE, 4096):
            self.outgoing.disk.pwrite(b"x" * 4096, at)
            await trio.sleep(4096 / (2 * LINK))

    async def stall(self) -> None:
        """Make a pass that does not help."""
        self.pacer.begin_pass(SIZE)
        await trio.sleep(3.0)
        self.pacer.end_pass(SIZE, is_over_limit=True)

    def mirror_chunks(self, n: int) -> None:
        """Have the destination hold the first chunks, of which everything written from now on is mirrored."""
        assert self.pacer.shorten_freeze()
        self.pacer.begin_pass(CHUNK_SIZE)
        for chunk in range(n):
            self.outgoing.tracking.mark(chunk * CHUNK_SIZE, CHUNK_SIZE)
            assert self.outgoing.tracking.take_next(chunk) is not None
            self.outgoing.tracking.acknowledge([chunk])

    async def have_one_wait(self) -> None:
        """Write more than the rate allows for long; the last write waits, and is not made when it is resumed."""
        await trio.sleep(TICK_S / 2)
        self.outgoing.tracking.pacing.advance(trio.current_time(), HOLD_DEADLINE_S)
        try:
            while True:
                self.disk.pwrite(b"x" * CHUNK_SIZE, 0)
                assert self.outgoing.tracking.take_next(0) is not None
                self.outgoing.tracking.acknowledge([0])
        except GateClosedError as exc:
            refused = exc
        assert self.disk.write_gate.park(lambda: None, refused)

    def is_throttled(self) -> bool:
        """Tell whether a write after another has to wait for its turn, whatever the window."""
        self.outgoing.tracking.pacing.set_window(SIZE, is_blocking=False)
        brake = self.disk._admission.brake
        return brake is not None and not all(brake.admit(0, CHUNK_SIZE) for _ in range(3))


async def throttled(**parameters: int) -> Paced:
    """Return one whose guests are throttled by 20 %, because a pass did not help."""
    paced = Paced(**parameters)
    paced.pacer.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(paced.pacer.run)
        nursery.start_soon(paced.guest)
        await trio.sleep(1.0)
        await paced.stall()
        nursery.cancel_scope.cancel()
    assert paced.told == [(Reach.NONE, 20)]
    assert paced.is_throttled()
    return paced


async def test_a_throttle_that_works_goes_on_beside_what_makes_the_freeze_shorter(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Else guests would dirty more in the last passes than in those that had converged."""
    paced = await throttled(throttle_max=50)
    assert paced.pacer.shorten_freeze()
    paced.pacer.begin_pass(CHUNK_SIZE)
    assert paced.told[-1] == (Reach.HOT, 20)
    assert paced.pacer.statistics().throttle_percent == 20
    assert paced.is_throttled()
    paced.pacer.release()
    assert paced.told[-1] == (Reach.NONE, 0)
    assert not paced.is_throttled()


async def test_a_lost_switchover_ends_what_was_mirrored_for_it_and_not_the_throttle(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """On the next connection passes go on as before; the next switchover may be made shorter anew."""
    paced = await throttled(throttle_max=50)
    assert paced.pacer.shorten_freeze()
    paced.pacer.begin_pass(CHUNK_SIZE)
    paced.pacer.freeze()
    paced.pacer.release()
    paced.pacer.start()
    paced.pacer.begin_pass(CHUNK_SIZE)
    assert paced.told[-1] == (Reach.NONE, 20)
    assert paced.is_throttled()
    assert paced.pacer.shorten_freeze()
    paced.pacer.begin_pass(CHUNK_SIZE)
    assert paced.told[-1] == (Reach.HOT, 20)


async def test_what_passes_need_is_still_done_after_a_lost_switchover(autojump_clock: trio.testing.MockClock) -> None:
    """Guests are as fast as they were."""
    paced = Paced()
    paced.pacer.start()
    await paced.stall()
    paced.pacer.begin_pass(SIZE)
    assert paced.told == [(Reach.HOT, 0)]
    paced.pacer.freeze()
    paced.pacer.release()
    paced.pacer.start()
    paced.pacer.begin_pass(SIZE)
    assert paced.told[-1] == (Reach.HOT, 0)


async def test_the_users_mirroring_ends_a_throttle_until_it_ends_itself(autojump_clock: trio.testing.MockClock) -> None:
    """Mirrored guests are held to the link already."""
    paced = await throttled(throttle_max=50)
    paced.parameters.mirrors = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(paced.pacer.run)
        await trio.sleep(2 * TICK_S)
        assert paced.told[-1] == (Reach.ALL, 0)
        assert not paced.is_throttled()
        paced.parameters.mirrors = False
        await trio.sleep(2 * TICK_S)
        assert paced.told[-1] == (Reach.NONE, 20)
        assert paced.is_throttled()
        nursery.cancel_scope.cancel()


async def test_who_waits_for_the_rate_alone_makes_no_pause_shorter(autojump_clock: trio.testing.MockClock) -> None:
    """No pass helps them: one after another was made, thousands in a second, and none had anything to send."""
    paced = await throttled(throttle_max=50)
    paced.mirror_chunks(1)
    await paced.have_one_wait()
    began_at = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(paced.have_one_wait)
        await paced.pacer.pause(TICK_S, trio.Event())
        assert trio.current_time() == pytest.approx(began_at + TICK_S)
    assert paced.disk.paced_writes == 2
    paced.pacer.release()


async def test_who_waits_for_room_ends_a_pause(autojump_clock: trio.testing.MockClock) -> None:
    """At once; and within a tick where it was the rate that it waited for to begin with."""
    paced = await throttled(throttle_max=50)
    paced.mirror_chunks(8)
    await paced.have_one_wait()

    async def fill_the_window() -> None:
        await trio.sleep(TICK_S / 2)
        paced.outgoing.tracking.mark(0, SIZE)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(paced.pacer.run)
        nursery.start_soon(fill_the_window)
        began_at = trio.current_time()
        await paced.pacer.pause(SILENCE_S / 2, trio.Event())
        assert began_at + TICK_S / 2 <= trio.current_time() < began_at + TICK_S
        await paced.pacer.pause(SILENCE_S / 2, trio.Event())
        assert trio.current_time() < began_at + TICK_S
        nursery.cancel_scope.cancel()
    paced.pacer.release()


@pytest.mark.parametrize("waits_for_room", [False, True])
async def test_silence_ends_mirroring_only_where_somebody_waits_for_it(
    autojump_clock: trio.testing.MockClock, *, waits_for_room: bool
) -> None:
    """Who waits for a low rate has nothing to be acknowledged, and the throttle is not to be lost by that."""
    paced = await throttled(throttle_max=50)
    paced.mirror_chunks(8)
    await trio.sleep(TICK_S)
    paced.outgoing.tracking.pacing.advance(trio.current_time(), HOLD_DEADLINE_S)
    paced.disk.pwrite(b"x" * SIZE, 0)  # for which the rate makes the next wait longer than anybody may
    if not waits_for_room:
        for chunk in range(8):
            assert paced.outgoing.tracking.take_next(chunk) is not None
        paced.outgoing.tracking.acknowledge(range(8))
    await paced.have_one_wait()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(paced.pacer.run)
        await trio.sleep(SILENCE_S + TICK_S)
        nursery.cancel_scope.cancel()
    assert paced.told[-1] == ((Reach.NONE, 0) if waits_for_room else (Reach.HOT, 20))
    paced.pacer.release()
