"""A group of two pairs, with the coordinator or a source killed at each of its steps, and the daemons started again.

The coordinator is `fusemig.cli.group.coordinate`, the daemons are real migrations over memory, and what a restarted one
does is `fusemig.daemon.doubt.Doubts`. Every place is taken in turn: each durable write, message, proposal and command.
In the end all disks have moved or none has, and every byte that a guest was told is durable is with the owner.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
import trio.testing

from fusemig.cli.group import coordinate
from fusemig.core.group import Standing
from fusemig.core.phase import MigrationPhase
from fusemig.daemon.doubt import Doubts
from fusemig.disk.tracked import Gate
from fusemig.errors import FusemigError, StateError
from fusemig.records.decision import DecisionFile
from support.crash import KilledError
from support.mortal import Hosts, Life
from support.pair import inline

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fusemig.daemon.served import ServedDisk
    from fusemig.disk.tracked import TrackedDisk
    from fusemig.net.transport import ByteStream
    from fusemig.records.epoch import EpochFile, EpochRecord, Ownership


@pytest.fixture
def fast_directory() -> Iterator[Path]:
    """Give a directory whose fdatasync costs nothing, where there is one."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


STANDINGS = {
    MigrationPhase.PRE_SWITCHOVER: Standing.READY,
    MigrationPhase.PLEDGED: Standing.PLEDGED,
    MigrationPhase.COMPLETED: Standing.MOVED,
    MigrationPhase.FAILED: Standing.STAYS,
    MigrationPhase.CANCELLED: Standing.STAYS,
    MigrationPhase.IN_DOUBT: Standing.DOUBTFUL,
}


class SimMember:
    """A pair, as its coordinator talks to its source; each command is a step of the coordinator."""

    def __init__(self, hosts: Hosts, life: Life, nursery: trio.Nursery) -> None:
        self._hosts = hosts
        self._life = life
        self._nursery = nursery
        self._process = hosts.source.life

    async def start(self, group: Path) -> None:
        self._life.step("start")
        self._nursery.start_soon(self._hosts.migrate, group)
        await trio.testing.wait_all_tasks_blocked()

    async def look(self) -> Standing:
        if self._life.is_over:
            raise KilledError
        await trio.lowlevel.checkpoint()
        outgoing = self._hosts.outgoing
        if self._process.is_over or outgoing is None:
            return Standing.LOST
        return STANDINGS.get(outgoing.phase, Standing.MOVING)

    async def proceed(self) -> None:
        self._life.step("proceed")
        await trio.lowlevel.checkpoint()
        if not self._process.is_over and self._hosts.outgoing is not None:
            self._hosts.outgoing.allow_switchover()

    async def call_off(self) -> None:
        self._life.step("call off")
        await trio.lowlevel.checkpoint()
        call_off(self._hosts)


def call_off(hosts: Hosts) -> None:
    if hosts.outgoing is not None and not hosts.source.life.is_over and not hosts.outgoing.is_over:
        try:
            hosts.outgoing.cancel()
        except StateError:
            return


class SimServed:
    """What `Doubts` asks of a served disk."""

    is_read_only = False

    def __init__(self, name: str, disk: TrackedDisk, epoch_file: EpochFile) -> None:
        self.name, self.disk, self.epoch_file = name, disk, epoch_file
        self.busy = self.doubt = ""

    @property
    def ownership(self) -> Ownership | None:
        return None if self.epoch_file.record is None else self.epoch_file.record.state


async def settle(hosts: Hosts) -> None:
    """Have a source that was started again look and ask, as a daemon does, until it knows or can do no more."""
    served = {
        name: cast("ServedDisk", SimServed(name, hosts.source.disks[name], file))
        for name, file in hosts.source.epochs.items()
    }
    async with trio.open_nursery() as nursery:

        async def dial(_record: EpochRecord) -> ByteStream:
            await trio.lowlevel.checkpoint()
            here, there = hosts._connection()
            nursery.start_soon(hosts._until_dead, hosts._receive, there)
            return here

        def on_settled(settled: Sequence[ServedDisk], *, is_by_hand: bool) -> None:
            assert settled
            assert not is_by_hand

        with trio.move_on_after(300) as scope:
            async with trio.open_nursery() as watching:
                watching.start_soon(Doubts(served, dial, on_settled, inline, inline).watch)
                while hosts.in_doubt():
                    await trio.sleep(1)
                watching.cancel_scope.cancel()
        assert not scope.cancelled_caught, {name: one.doubt for name, one in served.items()}
        nursery.cancel_scope.cancel()


def live_and_die(directory: Path, who: str, number: int) -> tuple[str, bool]:
    """Make one run in which ``who`` dies at a step; return who owns all disks, and whether that death came."""
    directory.mkdir()
    result: list[tuple[str, bool]] = []

    async def main() -> None:
        pairs = []
        for name in ("one", "two"):
            (directory / name).mkdir()
            pairs.append(Hosts(directory / name, is_power_lost=who == "power", is_flight_lost=False))
        for hosts in pairs:
            hosts.parameters.pause_before_switchover = True
        lives = {"coordinator": Life(), "source": pairs[1].source.life}
        mortal = lives.get(who, pairs[1].source.life)
        mortal.left = number
        await run(directory, pairs, lives["coordinator"])
        for hosts in pairs:
            hosts.restart(Life(), Life())
            await settle(hosts)
        owners = {hosts.check() for hosts in pairs}
        assert len(owners) == 1, f"some moved, some stay: {[hosts.check() for hosts in pairs]}"
        for hosts in pairs:
            assert hosts.write(), "nobody can write"
            gates = {disk.gate for disk in hosts.source.disks.values()}
            assert gates == {Gate.OPEN if owners == {"source"} else Gate.READ_ONLY}
        result.append((owners.pop(), mortal.is_over))

    try:
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    except BaseException as exc:
        exc.add_note(f"{who} dies at step {number}")
        raise
    return result[0]


async def run(directory: Path, pairs: Sequence[Hosts], life: Life) -> None:
    """Lead the group until its coordinator is dead or has ended, and every migration is over."""

    async def offload(function: Any, *args: Any) -> Any:
        life.step(f"before {function.__name__}")
        result = await inline(function, *args)
        life.step(f"after {function.__name__}")
        return result

    async with trio.open_nursery() as nursery:
        members = [SimMember(hosts, life, nursery) for hosts in pairs]
        try:
            await coordinate(members, DecisionFile(directory / "group"), offload)
        except (KilledError, FusemigError):
            await trio.sleep(60)  # nobody waits for it, beyond the freeze deadline
            for hosts in pairs:
                call_off(hosts)  # what waits at pre-switchover


def test_a_source_that_finds_no_coordinator_leaves_nothing(fast_directory: Path) -> None:
    """It has laid its proposal by then, which nobody would ever look at."""

    async def main() -> None:
        hosts = Hosts(fast_directory, is_power_lost=False, is_flight_lost=False)
        source = await hosts.migrate(fast_directory / "group")
        assert source.phase is MigrationPhase.FAILED
        assert "group.coordinator.proposal is not there" in str(source.error)
        assert hosts.check() == "source"

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert not list(fast_directory.glob("*.proposal"))


@pytest.mark.parametrize("who", ["coordinator", "source", pytest.param("power", marks=pytest.mark.nightly)])
def test_each_death(fast_directory: Path, who: str) -> None:
    """At every step of it: all or none, by itself."""
    owners: Counter[str] = Counter()
    run_once = partial(live_and_die, who=who)
    for number in range(1000):
        owner, has_died = run_once(fast_directory / str(number), number=number)
        if not has_died:
            break
        owners[owner] += 1
    print(who, dict(owners))
    assert owner == "destination"
    assert owners["source"] >= 4
    assert owners["destination"] >= 2
