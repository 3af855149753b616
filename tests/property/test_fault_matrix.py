"""The fault matrix, run in the simulation: each fault at each moment, once and lasting, to the disks' arrival.

Every run is told by its seed: ``pytest --matrix-seed N`` (or FUSEMIG_MATRIX_SEED) plays one again, and a failing run
names its own. ``--nightly`` makes many more of them, with seeds of its own.
"""

from __future__ import annotations

import itertools
import random
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from support.aftermath import go_on
from support.matrix import MATRIX, Cell, Fault, Moment, Outcome, markdown, simulated_cells
from support.promises import check_promises
from support.simulation import N_GUEST_WRITES, simulate
from support.strikes import SAYS, STRIKES, arm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.matrix import Fault
    from support.simulation import SimWorld

RUNS_PER_FAULT = 49
NIGHTLY_RUNS_PER_FAULT = 900
RECONNECT_LIMIT_S = 20.0
JOURNAL_INTERVAL_S = 0.01
"""These migrations last a tenth of a second; something is to be in the journals when they are interrupted."""

hits: Counter[tuple[Fault, Moment, bool]] = Counter()
"""How often each cell was hit in this session."""
n_runs = 0


@pytest.fixture
def fast_directory() -> Iterator[Path]:
    """Give a directory whose fdatasync costs nothing, where there is one."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


def plan_of(seed: int, fault: Fault) -> tuple[Moment, bool, int]:
    """Return when the fault of a run strikes: the moment, whether it lasts, and the steps of the loop in between."""
    moments = [moment for moment, cell in MATRIX[fault].items() if cell.outcomes]
    rng = random.Random(f"plan {seed}")
    rest = seed // len(moments)
    at_once = rest // 2 % 3 == 0  # so that every cell is hit, whatever the seeds have come to mean
    return moments[seed % len(moments)], rest % 2 == 1, 0 if at_once else rng.choice([0, 0, 1, 2, 3, rng.randrange(60)])


class Played(NamedTuple):
    """What came of a run."""

    struck_at: Moment | None
    is_lasting: bool
    ends: set[Outcome]
    way: str
    n_early_reads: int


def play(seed: int, fault: Fault, directory: Path) -> Played:
    """Make one run, from its fault to the arrival of the disks."""
    moment, is_lasting, delay = plan_of(seed, fault)
    ways: list[str] = []
    ends: list[set[Outcome]] = []
    errors: list[str] = []

    async def main(world: SimWorld) -> None:
        world.is_lasting = is_lasting
        world.parameters.reconnect_limit_s = RECONNECT_LIMIT_S
        arm(world, fault, moment, delay)
        pause_s = world.rng.choice([0.0005, 0.003, 0.01])
        world.nursery.start_soon(world.source.live, lambda: world.guest(world.source, N_GUEST_WRITES, pause_s))
        world.nursery.start_soon(world.early_reader, pause_s)
        await world.migrate()
        outcomes = await check_promises(world)
        ends.append(set(outcomes.values()))
        errors.append(str(world.outgoing.error))
        ways.append(await go_on(world, outcomes))

    try:
        world = simulate(main, directory, seed)
        # What never struck did no harm.
        unharmed = frozenset({Outcome.COMPLETES})
        cell = Cell(unharmed, unharmed) if world.struck_at is None else MATRIX[fault][world.struck_at]
        assert ends[0] <= cell.allowed(is_lasting=is_lasting), (
            f"came out as {ends[0]} at {world.struck_at}: {errors[0]}"
        )
        if world.struck_at is not None and ends[0] == {Outcome.SOURCE_SERVES}:
            assert re.search(SAYS.get(fault, ""), errors[0]), errors[0]
    except BaseException as exc:
        how = f"{moment.name} + {delay}{', lasting' * is_lasting}"
        exc.add_note(f"play it again: pytest {__file__} -k {fault.name} --matrix-seed {seed}; {how}")
        raise
    return Played(world.struck_at, is_lasting, ends[0], ways[0], world.n_early_reads)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", STRIKES, ids=lambda fault: fault.name)
def test_fault(
    fault: Fault,
    fast_directory: Path,
    nightly: bool,
    matrix_seed: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the moment: an outcome that the table allows, every promise, and the disks' arrival."""
    global n_runs
    monkeypatch.setattr("fusemig.migration.receipt.JOURNAL_INTERVAL_S", JOURNAL_INTERVAL_S)
    if matrix_seed is not None:
        print(play(matrix_seed, fault, fast_directory / "again"))
        return
    first = random.SystemRandom().getrandbits(40) if nightly else 0
    n = NIGHTLY_RUNS_PER_FAULT if nightly else RUNS_PER_FAULT
    print(f"seeds {first} to {first + n - 1}")
    found: Counter[str] = Counter()
    ways: Counter[str] = Counter()
    n_early_reads = 0
    for seed in range(first, first + n):
        played = play(seed, fault, fast_directory / str(seed))
        n_runs += 1
        if played.struck_at is not None:
            hits[fault, played.struck_at, played.is_lasting] += 1
        where = "-" if played.struck_at is None else f"{played.struck_at.name}{'...' * played.is_lasting}"
        found[f"{where} {''.join(sorted(end.value for end in played.ends))}"] += 1
        ways[played.way or "arrived"] += 1
        n_early_reads += played.n_early_reads
    print(dict(sorted(found.items())))
    print(dict(sorted(ways.items())))
    assert n_early_reads > n
    missed = [cell for cell in simulated_cells() if cell[0] is fault and not hits[cell]]
    assert not missed, f"never struck at {missed}"


def test_every_cell_was_hit(request: pytest.FixtureRequest, matrix_seed: int | None) -> None:
    """The table has no cell that no run of this session struck."""
    if matrix_seed is not None or len({fault for fault, _, _ in hits}) < len(STRIKES):
        pytest.skip("only after all of test_fault")
    assert set(simulated_cells()) <= set(hits)
    print(f"{n_runs} runs, {len(hits)} cells")


def test_every_cell_has_its_evidence() -> None:
    """What the simulation cannot play names a test that exists; what it can play is played."""
    tests = Path(__file__).parent.parent
    for (fault, row), moment in itertools.product(MATRIX.items(), Moment):
        cell = row[moment]
        if cell.shown_by:
            file, name = cell.shown_by.split("::")
            assert f"def {name}(" in (tests / file).read_text(), f"{fault.value}: no test {cell.shown_by}"
        if cell.outcomes and not cell.shown_by:
            assert fault in STRIKES, f"{fault.value} at {moment.value} is shown by nothing"


def test_the_documentation_shows_the_table() -> None:
    """docs/reliability.md has the table as it is: copy it from `support.matrix.markdown`."""
    assert markdown() in (Path(__file__).parent.parent.parent / "docs/reliability.md").read_text()
