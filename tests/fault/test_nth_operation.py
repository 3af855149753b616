"""Fail the nth operation, for n = 1, 2, 3 ... until a run meets no failure: disks, streams, epoch files, cancels.

Each place is failed once (transient) and from there on (persistent). After every run the promises of `support.world`
hold, and where the source still owns its disks a further migration succeeds once everything is mended.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from fusemig.core.phase import MigrationPhase as P
from fusemig.disk.fault import Fault, Operation
from fusemig.errors import ConnectionLostError
from fusemig.records.epoch import Ownership
from support.world import cancel_if_possible, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.world import World

MAX_OPERATIONS = 400

Arm = "Callable[[World, int], Callable[[], bool]]"
"""Prepares the nth operation to fail; returns what tells, after the run, whether it came to that."""


@pytest.fixture
def fast_directory() -> Iterator[Path]:
    """Give a directory whose fdatasync costs nothing, where there is one."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


def fail_each(directory: Path, arm: Callable[[World, int], Callable[[], bool]]) -> list[P]:
    """Run with the first operation failing, then the second, ... until none failed; return how the runs ended."""
    outcomes: list[P] = []
    for number in range(1, MAX_OPERATIONS):
        was_hit = run_once(directory / str(number), arm, number, outcomes)
        if not was_hit:
            assert outcomes[-1] is P.COMPLETED
            return outcomes[:-1]
    raise AssertionError(f"{MAX_OPERATIONS} operations and no end")


def run_once(directory: Path, arm: Callable[[World, int], Callable[[], bool]], number: int, outcomes: list[P]) -> bool:
    """Make a migration with the ``number``-th operation failing; return whether it came to that."""
    hits: list[bool] = []

    async def main(world: World) -> None:
        world.fill(random.Random(3))
        was_hit = arm(world, number)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writes, world)
            await world.migrate()
            nursery.cancel_scope.cancel()
        hits.append(was_hit())
        world.check_outcome()
        outcomes.append(world.outgoing.phase)
        assert world.longest_freeze_s <= world.parameters.freeze_deadline_s + (
            world.parameters.taken_deadline_s if P.COMMITTED in world.phases else 0.0
        )
        if world.outgoing.phase in (P.FAILED, P.CANCELLED):
            assert await world.guest_writes("a", 4711, b"still writable")
            if all(world.source.durable_state(name) in (None, Ownership.OWNER) for name in world.source.disks):
                await world.succeed_now()

    try:
        world = run(main, directory)
    except BaseException as exc:
        exc.add_note(f"operation {number}")
        raise
    assert not world.violations
    return hits[0]


async def writes(world: World) -> None:
    """Be a guest that writes a little, the same in every run."""
    rng = random.Random(5)
    for _ in range(8):
        if not await world.guest_writes("a", rng.randrange(0, 2_000_000), rng.randbytes(5000)):
            return
        await trio.sleep(0.004)


@pytest.mark.parametrize("times", [1, None], ids=["transient", "persistent"])
@pytest.mark.parametrize("torn_bytes", [0, 3000], ids=["nothing", "torn"])
@pytest.mark.parametrize("operation", Operation, ids=lambda operation: operation.value)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_disk(fast_directory: Path, side: str, operation: Operation, torn_bytes: int, times: int | None) -> None:
    """Every request to a disk of either side."""
    if torn_bytes and operation not in (Operation.WRITE, Operation.ZERO):
        pytest.skip("only writes can be torn")

    def arm(world: World, number: int) -> Callable[[], bool]:
        layer = (world.source if side == "source" else world.destination).faults["a"]
        fault = layer.add(Fault(frozenset({operation}), nth=number, times=times, torn_bytes=torn_bytes))
        return lambda: fault.n_hit > 0

    outcomes = fail_each(fast_directory, arm)
    allowed = {P.FAILED}
    if side == "source" and operation in (Operation.WRITE, Operation.ZERO):
        allowed = {P.COMPLETED}  # the guest's own writes: its error, and no reason to stop
    assert set(outcomes) <= allowed


@pytest.mark.parametrize("kind", ["cut", "half", "stall", "flip", "duplicate"])
@pytest.mark.parametrize("side", [0, 1], ids=["source", "destination"])
def test_stream(fast_directory: Path, side: int, kind: str) -> None:
    """Every send of either side; a cut and a stall are persistent by nature."""

    def arm(world: World, number: int) -> Callable[[], bool]:
        stream = world.streams[side]
        stream.faults[number] = kind
        stream.flip_at = 8 * 17 + 3
        return lambda: stream.n_sends >= number

    outcomes = fail_each(fast_directory, arm)
    # After TAKEN is on its way it no longer matters.
    assert {P.FAILED, P.COMPLETED} >= set(outcomes) - {P.IN_DOUBT}
    assert P.FAILED in outcomes


@pytest.mark.parametrize("is_stored", [False, True], ids=["lost", "stored"])
@pytest.mark.parametrize("is_persistent", [False, True], ids=["transient", "persistent"])
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("side", ["source", "destination"])
def test_epoch_file(fast_directory: Path, side: str, name: str, is_persistent: bool, is_stored: bool) -> None:
    """Every write of an epoch file, whether what was reported as failed reached the disk or not."""

    def arm(world: World, number: int) -> Callable[[], bool]:
        file = (world.source if side == "source" else world.destination).faulty_epochs[name]
        file.fails = lambda n: n == number or (is_persistent and n > number)
        file.is_stored = is_stored
        return lambda: file.n_writes >= number

    outcomes = fail_each(fast_directory, arm)
    expected = [P.FAILED, P.FAILED, P.COMPLETED] if side == "source" else [P.FAILED, P.FAILED, P.IN_DOUBT]
    assert outcomes == expected


def test_cancel(fast_directory: Path) -> None:
    """Cancel as something arrives at the source, each time: cancelled with the source serving, or refused."""

    def arm(world: World, number: int) -> Callable[[], bool]:
        stream = world.streams[0]
        stream.on_receive = lambda n: cancel_if_possible(world) if n == number else None
        return lambda: stream.n_receives >= number

    outcomes = fail_each(fast_directory, arm)
    assert set(outcomes) <= {P.CANCELLED, P.COMPLETED}
    first_refused = outcomes.index(P.COMPLETED)
    assert set(outcomes[first_refused:]) == {P.COMPLETED}


def test_cancel_and_failure_at_once(fast_directory: Path) -> None:
    """The connection breaks in the step in which the user cancels: cancelled all the same, with no tracking left."""

    def arm(world: World, number: int) -> Callable[[], bool]:
        stream = world.streams[0]

        def cancel_and_break(n: int) -> None:
            if n == number:
                cancel_if_possible(world)
                raise ConnectionLostError("cut by the test")

        stream.on_receive = cancel_and_break
        return lambda: stream.n_receives >= number

    outcomes = fail_each(fast_directory, arm)
    assert set(outcomes) == {P.CANCELLED, P.IN_DOUBT}
