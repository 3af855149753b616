"""Whole migrations under seeded faults, on a mock clock: connections, disks, epoch files, cancels, a busy guest.

Every run is told by its seed alone: ``pytest --nightly`` makes more of them, and a failing one names its seed.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from fusemig.core.phase import MigrationPhase as P
from fusemig.core.shaping import MirrorLag
from fusemig.disk.fault import EVERY_OPERATION, Fault, Operation
from fusemig.migration.order import Order
from fusemig.migration.pacer import HOLD_DEADLINE_S
from fusemig.records.epoch import Ownership
from support.faults import KINDS
from support.world import cancel_if_possible, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.faults import FaultyStream
    from support.world import FaultySide, World

BATCHES, CI_BATCHES = 8, 4
RUNS_PER_BATCH = 40
STREAMS = (1, 4, 1, 2)
NIGHTLY_RUNS_PER_BATCH = 1500


def break_stream(world: World, rng: random.Random) -> str:
    """Have one send go wrong on one side."""
    stream = rng.choice(world.streams)
    number, kind = rng.randint(1, 25), rng.choice(KINDS)
    stream.faults[number] = kind
    stream.flip_at = rng.getrandbits(24)
    stream.stall_s = rng.choice([None, 0.5, 4.0, 20.0])
    return f"{kind} at send {number} to {stream.peer}"


def break_further(rng: random.Random, plan: list[str], here: FaultyStream, there: FaultyStream) -> None:
    """Have each connection that joins be late, some be slow, and some go wrong, in their handshake or later."""
    stream = rng.choice([here, here, there])
    if rng.random() < 0.3:
        number, kind = rng.randint(1, 40), rng.choice(KINDS)
        stream.faults[number], stream.flip_at, stream.stall_s = kind, rng.getrandbits(24), rng.choice([None, 0.5, 4.0])
        plan.append(f"{kind} at send {number} of a further connection to {stream.peer}")
    if rng.random() < 0.3:
        here.slow_down(rng.choice([2e5, 2e6]))
    longest_s = rng.choice([0.0, 0.001, 0.05])
    there.lag = lambda: rng.random() * longest_s


def break_disk(world: World, rng: random.Random) -> str:
    """Have requests to one disk fail or be slow."""
    side = rng.choice([world.source, world.destination])
    name = rng.choice(list(side.faults))
    operation = rng.choice(list(Operation))
    is_slow = rng.random() < 0.3
    fault = Fault(
        frozenset({operation}) if rng.random() < 0.8 else EVERY_OPERATION,
        nth=rng.randint(1, 6),
        times=rng.choice([1, 1, 3, None]) if not is_slow else 1,
        errno=None if is_slow else rng.choice([5, 28]),
        torn_bytes=rng.choice([0, 100, 5000]),
        delay_s=rng.choice([0.01, 1.0]) if is_slow else 0.0,
    )
    side.faults[name].add(fault)
    return f"{fault} of {'source' if side is world.source else 'destination'} {name}"


def break_epoch_file(world: World, rng: random.Random) -> str:
    """Have writes of one epoch file fail."""
    side: FaultySide = rng.choice([world.source, world.destination])
    name = rng.choice(list(side.faulty_epochs))
    file, number, is_persistent = side.faulty_epochs[name], rng.randint(1, 4), rng.random() < 0.3
    file.fails = lambda n: n == number or (is_persistent and n > number)
    file.is_stored = rng.random() < 0.5
    where = "source" if side is world.source else "destination"
    return f"epoch write {number} of {where} {name}, persistent {is_persistent}, stored {file.is_stored}"


def cancel_somewhere(world: World, rng: random.Random) -> str:
    """Cancel at a time, at some step after the beginning of a phase, or as something arrives at the source."""
    if rng.random() < 0.4:
        number = rng.randint(1, 60)
        world.streams[0].on_receive = lambda n: cancel_if_possible(world) if n == number else None
        return f"cancel at receive {number}"
    if rng.random() < 0.5:
        at = rng.random() * 0.3
        world.on_phase = lambda phase: arm(phase, at)

        def arm(phase: P, at: float) -> None:
            if phase is P.SETUP:
                trio.lowlevel.spawn_system_task(later, at)

        async def later(at: float) -> None:
            await trio.sleep(at)
            cancel_if_possible(world)

        return f"cancel at {at:.4f}"
    wanted = rng.choice([P.SETUP, P.BULK, P.DIRTY, P.FROZEN])
    steps = rng.randint(0, 30)

    async def soon() -> None:
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        cancel_if_possible(world)

    def at_phase(phase: P) -> None:
        if phase is wanted:
            trio.lowlevel.spawn_system_task(soon)

    world.on_phase = at_phase
    return f"cancel {steps} steps after {wanted.value}"


def simulate(seed: int, directory: Path, mirrored: Counter[str]) -> P:
    """Make one migration with up to two faults, check it, and then one that must succeed; return how it ended."""
    rng = random.Random(seed)
    plan: list[str] = []

    async def main(world: World) -> None:
        mode = seed % 4  # two of four runs mirror: with a window, and with replies that wait for the destination
        world.parameters.mirrors = mode >= 2
        if mode == 3:
            world.parameters.mirror_lag = MirrorLag(seconds=None, size=0)
        plan.append(("precopy", "precopy", "mirror", "mirror, lag 0")[mode])
        world.parameters.streams = STREAMS[seed // 4 % len(STREAMS)]
        plan.append(f"{world.parameters.streams} streams")
        world.on_further = partial(break_further, random.Random(seed + 2), plan)
        world.fill(rng)
        world.parameters.order = Order.HEAT if seed % 2 else Order.SEQUENTIAL
        for _ in range(rng.choice([0, 1, 1, 1, 2])):
            action = rng.choice([break_stream, break_stream, break_disk, break_epoch_file, cancel_somewhere])
            plan.append(action(world, rng))
        pause_s = rng.choice([0.0005, 0.003, 0.02])
        guest_rng = random.Random(seed + 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.guest, guest_rng, pause_s)
            await world.migrate()
            nursery.cancel_scope.cancel()
        world.check_outcome()
        outcomes.append(world.outgoing.phase)
        slack = 2.1  # delays of disks stop the whole loop
        assert world.longest_freeze_s <= world.parameters.freeze_deadline_s + (
            world.parameters.taken_deadline_s if P.COMMITTED in world.phases else slack
        )
        assert world.longest_hold_s <= HOLD_DEADLINE_S + world.parameters.freeze_deadline_s + slack
        mirrored.update(held=world.n_held_replies, paced=world.n_paced_writes)
        if world.outgoing.phase in (P.FAILED, P.CANCELLED):
            if any(world.source.durable_state(name) not in (None, Ownership.OWNER) for name in world.source.disks):
                return  # its epoch file could not be put back: the next migration says so
            await world.guest_writes("a", 4711, b"still writable")
            await world.succeed_now()

    outcomes: list[P] = []
    try:
        world = run(main, directory)
    except BaseException as exc:
        exc.add_note(f"seed {seed}: {'; '.join(plan) or 'no faults'}")
        raise
    assert not world.violations
    return outcomes[0]


@pytest.fixture
def fast_directory() -> Iterator[Path]:
    """Give a directory whose fdatasync costs nothing, where there is one."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "batch", [*range(CI_BATCHES), *(pytest.param(n, marks=pytest.mark.nightly) for n in range(CI_BATCHES, BATCHES))]
)
def test_simulated_migrations(fast_directory: Path, batch: int, nightly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails: never two writers, no lost write, the source thaws or the destination has it all."""
    n_runs = NIGHTLY_RUNS_PER_BATCH if nightly else RUNS_PER_BATCH
    first = random.SystemRandom().getrandbits(40) if nightly else batch * 1_000_000
    print(f"seeds {first} to {first + n_runs - 1}")
    for name in ("FIRST_WINDOW_BYTES", "MIN_WINDOW_BYTES"):
        monkeypatch.setattr(f"fusemig.core.shaping.{name}", 8192)  # the disks are small
    mirrored: Counter[str] = Counter()
    outcomes = Counter(simulate(seed, fast_directory / str(seed), mirrored) for seed in range(first, first + n_runs))
    print(dict(outcomes), dict(mirrored))
    assert outcomes[P.COMPLETED] > n_runs / 10
    assert mirrored["held"]
    assert mirrored["paced"]
    assert outcomes[P.FAILED] + outcomes[P.CANCELLED] + outcomes[P.IN_DOUBT] > n_runs / 10
