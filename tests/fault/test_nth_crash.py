"""Kill a side at its nth call that is seen from outside, and cancel at the nth step, for n = 1, 2, 3 ... to the end.

The calls of a side are its writes, zeroings and syncs of stores, its writes of epoch files and its sends; the last one
is made wholly, in part or not at all. Each run is checked as every run of the fault matrix (`support.promises`).
"""

from __future__ import annotations

import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from fusemig.errors import StateError
from fusemig.phase import MigrationPhase
from support.aftermath import go_on
from support.matrix import MATRIX, Fault, Moment, Outcome
from support.promises import check_promises
from support.simulation import simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.simhost import SimHost
    from support.simulation import SimWorld

MAX_CALLS = 500
MAX_STEPS = 5000
N_WRITES = 12


@pytest.fixture
def fast_directory() -> Iterator[Path]:
    """Give a directory whose fdatasync costs nothing, where there is one."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def journals_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the destination write its journals in these short migrations, too: a step of that can be the nth."""
    monkeypatch.setattr("fusemig.migration.receipt.JOURNAL_INTERVAL_S", 0.002)


def run_once(directory: Path, number: int, prepare: Callable[[SimWorld], None], fault: Fault) -> set[Outcome]:
    """Make one run with one fault, which `prepare` arms; return how the disks came out."""
    ends: list[set[Outcome]] = []

    async def main(world: SimWorld) -> None:
        prepare(world)
        world.nursery.start_soon(world.source.live, lambda: world.guest(world.source, N_WRITES, 0.002))
        await world.migrate()
        outcomes = await check_promises(world)
        ends.append(set(outcomes.values()))
        await go_on(world, outcomes)

    try:
        world = simulate(main, directory, 11)
        allowed = {Outcome.COMPLETES} if world.struck_at is None else MATRIX[fault][world.struck_at].outcomes
        assert ends[0] <= allowed, f"at {world.struck_at}"
    except BaseException as exc:
        exc.add_note(f"n = {number}")
        raise
    hit_at.append(world.struck_at)
    return ends[0]


hit_at: list[Moment | None] = []
"""Where the fault of each run struck."""


@pytest.mark.parametrize("is_power_loss", [False, True], ids=["killed", "power"])
@pytest.mark.parametrize("side", ["source", "destination"])
def test_crash_at_the_nth_call(fast_directory: Path, side: str, is_power_loss: bool) -> None:
    """Of either side, until a run has fewer calls than that."""
    fault = {
        ("source", False): Fault.SOURCE_KILLED,
        ("source", True): Fault.SOURCE_POWER,
        ("destination", False): Fault.DESTINATION_KILLED,
        ("destination", True): Fault.DESTINATION_POWER,
    }[side, is_power_loss]
    hit_at.clear()
    found: Counter[Outcome] = Counter()
    for number in range(1, MAX_CALLS):

        def prepare(world: SimWorld, number: int = number) -> None:
            host: SimHost = getattr(world, side)
            host.fate.is_power_loss = is_power_loss
            host.fate.left = number - 1
            host.on_death = world.note_strike

        found.update(run_once(fast_directory / str(number), number, prepare, fault))
        if hit_at[-1] is None:
            break
    else:
        raise AssertionError(f"{MAX_CALLS} calls and no end")
    print(number - 1, "calls", dict(found))
    assert set(hit_at) >= {None, Moment.SETUP, Moment.BULK, Moment.DIRTY, Moment.FROZEN, Moment.COMMITTED}
    assert set(found) >= {Outcome.SOURCE_SERVES, Outcome.IN_DOUBT, Outcome.COMPLETES}


class AtStep(trio.abc.Instrument):
    """Does something once, after the nth step of any task."""

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        self._left = number
        self._act = act

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count."""
        self._left -= 1
        if not self._left:
            self._act()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("who", ["user", "source", "destination"])
def test_cancel_at_the_nth_step(fast_directory: Path, who: str, nightly: bool) -> None:
    """By the user, or as either daemon ends: called off with the source serving, or carried through."""
    fault = {"user": Fault.CANCELLED, "source": Fault.SOURCE_ENDED, "destination": Fault.DESTINATION_ENDED}[who]
    hit_at.clear()
    found: Counter[Outcome] = Counter()
    for number in range(1, MAX_STEPS, 1 if nightly else 3):

        def prepare(world: SimWorld, number: int = number) -> None:
            def act() -> None:
                if world.outgoing.is_over or world.outgoing.phase is MigrationPhase.NONE:
                    return
                world.note_strike()
                if who == "user":
                    with suppress(StateError):
                        world.outgoing.cancel()
                elif who == "source":
                    # The tasks themselves, which is less orderly than `wind_down`: the gates open all the same.
                    world.is_cut = True
                    world.source.end()
                else:
                    world.destination.end()

            trio.lowlevel.add_instrument(AtStep(number, act))

        found.update(run_once(fast_directory / str(number), number, prepare, fault))
        if hit_at[-1] is None and number > 100:
            break
    else:
        raise AssertionError(f"{MAX_STEPS} steps and no end")
    print(number, "steps", dict(found))
    assert set(found) >= {Outcome.SOURCE_SERVES, Outcome.COMPLETES}
