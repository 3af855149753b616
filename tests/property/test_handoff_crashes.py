"""Either side killed at each durable write and each message of a whole migration, then at each of the asking after it.

Every place is taken in turn, none is drawn at random: the first life of one side ends at its nth step, everything is
started again, and a second life, of either side, ends at the mth step of what follows. Then both live, and the disks
must have one owner, as a group, with every byte that a guest was told is durable.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from fusemig.records.epoch import Ownership
from support.mortal import Hosts, Life

if TYPE_CHECKING:
    from collections.abc import Iterator

ATTEMPTS = 6


@pytest.fixture
def fast_directory() -> Iterator[Path]:
    """Give a directory whose fdatasync costs nothing, where there is one."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


def live_and_die(
    directory: Path,
    first: tuple[str, int],
    second: tuple[str, int] | None = None,
    *,
    is_power_lost: bool = False,
    is_flight_lost: bool = False,
) -> tuple[str, bool, bool, bool]:
    """Make one run; return who owns the disks, whether each death came, and whether anything was in doubt."""
    directory.mkdir()
    result: list[tuple[str, bool, bool, bool]] = []

    async def main() -> None:
        hosts = Hosts(directory, is_power_lost=is_power_lost, is_flight_lost=is_flight_lost)
        side = hosts.source if first[0] == "source" else hosts.destination
        side.live(Life(first[1]))
        await hosts.migrate()
        has_died = side.life.is_over
        hosts.check()
        hosts.restart(Life(), Life())
        was_in_doubt = bool(hosts.in_doubt())
        if second is not None:
            side = hosts.source if second[0] == "source" else hosts.destination
            side.live(Life(second[1]))
        has_died_again = False
        for _ in range(ATTEMPTS):
            hosts.write()
            await hosts.settle_once()
            hosts.check()
            has_died_again |= hosts.source.life.is_over or hosts.destination.life.is_over
            hosts.restart(Life(), Life())
        assert not hosts.in_doubt(), "still in doubt"
        assert hosts.write() or hosts.write(), "nobody can write"
        owner = hosts.check()
        assert owner in ("source", "destination"), owner
        result.append((owner, has_died, has_died_again, was_in_doubt))

    try:
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    except BaseException as exc:
        exc.add_note(f"first death {first}, second {second}, {is_power_lost=}, {is_flight_lost=}")
        raise
    return result[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("is_flight_lost", [False, True], ids=["delivered", "lost"])
@pytest.mark.parametrize("is_power_lost", [False, True], ids=["killed", "power"])
@pytest.mark.parametrize("side", ["source", "destination"])
def test_each_death(fast_directory: Path, side: str, is_power_lost: bool, is_flight_lost: bool) -> None:
    """At every step of the migration: one owner, in the end, by itself."""
    owners: Counter[tuple[str, bool]] = Counter()
    for number in range(1000):
        owner, has_died, _, was_in_doubt = live_and_die(
            fast_directory / str(number), (side, number), is_power_lost=is_power_lost, is_flight_lost=is_flight_lost
        )
        if not has_died:
            break
        owners[owner, was_in_doubt] += 1
    print(dict(owners))
    assert owner == "destination"
    assert owners["source", False] > 5
    assert owners["destination", True] > 1
    if side == "source":
        assert owners["source", True] >= 1, "one disk of two was handed off"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("second", ["source", "destination"])
@pytest.mark.parametrize("first", ["source", "destination"])
def test_each_second_death(fast_directory: Path, first: str, second: str) -> None:
    """Wherever the first death left a doubt, the asking is cut short at each of its steps, and still ends well."""
    n_runs, owners = 0, Counter[str]()
    for number in range(1000):
        _, has_died, _, was_in_doubt = live_and_die(fast_directory / str(number), (first, number))
        if not has_died:
            break
        for again in range(1000) if was_in_doubt else ():
            n_runs += 1
            owner, _, has_died_again, _ = live_and_die(
                fast_directory / f"{number}-{again}", (first, number), (second, again)
            )
            owners[owner] += 1
            if not has_died_again:
                break
    print(n_runs, dict(owners))
    assert n_runs > 20
    assert owners["destination"] > 10


def test_a_half_written_release(fast_directory: Path) -> None:
    """Killed between the `released` of two disks: the other one is asked about, and released too."""
    for number in range(1000):
        directory = fast_directory / str(number)
        directory.mkdir()
        states: list[set[Ownership]] = []

        async def main(
            directory: Path = directory, number: int = number, states: list[set[Ownership]] = states
        ) -> None:
            hosts = Hosts(directory, is_power_lost=False, is_flight_lost=False)
            hosts.source.live(Life(number))
            await hosts.migrate()
            records = [hosts.source.durable(name) for name in ("a", "b")]
            states.append({record.state for record in records if record is not None})
            hosts.restart(Life(), Life())
            await hosts.settle_once()
            if states[0] == {Ownership.RELEASED, Ownership.HANDED_OFF}:
                assert not hosts.in_doubt()
                assert hosts.check() == "destination"

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
        if states[0] == {Ownership.RELEASED, Ownership.HANDED_OFF}:
            return
    raise AssertionError("that place was never met")
