"""The fault matrix, run in the simulation: each fault at each moment, with a guest, crashes and restarts.

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
from typing import TYPE_CHECKING

import pytest

from support.matrix import MATRIX, Cell, Fault, Moment, Outcome, markdown, simulated_cells
from support.promises import check_promises, go_on
from support.simulation import N_GUEST_WRITES, simulate
from support.strikes import SAYS, STRIKES, arm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.matrix import Fault
    from support.simulation import SimWorld

RUNS_PER_FAULT = 49
NIGHTLY_RUNS_PER_FAULT = 900

hits: Counter[tuple[Fault, Moment]] = Counter()
"""How often each cell was hit in this session."""
n_runs = 0


@pytest.fixture
def fast_directory() -> Iterator[Path]:
    """Give a directory whose fdatasync costs nothing, where there is one."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


def plan_of(seed: int, fault: Fault) -> tuple[Moment, int]:
    """Return when the fault of a run strikes: the moment, and the steps of the loop after it began."""
    moments = [moment for moment, cell in MATRIX[fault].items() if cell.outcomes]
    rng = random.Random(f"plan {seed}")
    at_once = seed // len(moments) % 3 == 0  # so that every cell is hit, whatever the seeds have come to mean
    return moments[seed % len(moments)], 0 if at_once else rng.choice([0, 0, 1, 2, 3, rng.randrange(60)])


def play(seed: int, fault: Fault, directory: Path) -> tuple[Moment | None, set[Outcome]]:
    """Make one run; return where the fault struck and how the disks came out."""
    moment, delay = plan_of(seed, fault)
    ends: list[set[Outcome]] = []
    errors: list[str] = []

    async def main(world: SimWorld) -> None:
        arm(world, fault, moment, delay)
        pause_s = world.rng.choice([0.0005, 0.003, 0.01])
        world.nursery.start_soon(world.source.live, lambda: world.guest(world.source, N_GUEST_WRITES, pause_s))
        await world.migrate()
        outcomes = await check_promises(world)
        ends.append(set(outcomes.values()))
        errors.append(str(world.outgoing.error))
        await go_on(world, outcomes)

    try:
        world = simulate(main, directory, seed)
        # What never struck did no harm.
        cell = Cell(frozenset({Outcome.COMPLETES})) if world.struck_at is None else MATRIX[fault][world.struck_at]
        assert ends[0] <= cell.outcomes, f"came out as {ends[0]} at {world.struck_at}: {errors[0]}"
        if world.struck_at is not None and ends[0] == {Outcome.SOURCE_SERVES}:
            assert re.search(SAYS.get(fault, ""), errors[0]), errors[0]
    except BaseException as exc:
        exc.add_note(f"play it again: pytest {__file__} -k {fault.name} --matrix-seed {seed}; {moment.name} + {delay}")
        raise
    return world.struck_at, ends[0]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", STRIKES, ids=lambda fault: fault.name)
def test_fault(fault: Fault, fast_directory: Path, nightly: bool, matrix_seed: int | None) -> None:
    """Whatever the moment: an outcome that the table allows, and every promise."""
    global n_runs
    if matrix_seed is not None:
        print(play(matrix_seed, fault, fast_directory / "again"))
        return
    first = random.SystemRandom().getrandbits(40) if nightly else 0
    n = NIGHTLY_RUNS_PER_FAULT if nightly else RUNS_PER_FAULT
    print(f"seeds {first} to {first + n - 1}")
    found: Counter[str] = Counter()
    for seed in range(first, first + n):
        struck_at, ends = play(seed, fault, fast_directory / str(seed))
        n_runs += 1
        if struck_at is not None:
            hits[fault, struck_at] += 1
        found[f"{'-' if struck_at is None else struck_at.name} {''.join(sorted(end.value for end in ends))}"] += 1
    print(dict(sorted(found.items())))
    missed = [moment.name for wanted, moment in simulated_cells() if wanted is fault and not hits[fault, moment]]
    assert not missed, f"never struck at {missed}"


def test_every_cell_was_hit(request: pytest.FixtureRequest, matrix_seed: int | None) -> None:
    """The table has no cell that no run of this session struck."""
    if matrix_seed is not None or len({fault for fault, _ in hits}) < len(STRIKES):
        pytest.skip("only after all of test_fault")
    assert set(simulated_cells()) <= set(hits)
    print(f"{n_runs} runs, {len(hits)} cells")


def test_every_cell_has_its_evidence() -> None:
    """What the simulation cannot play names a test that exists; what it can play is played."""
    tests = Path(__file__).parent.parent
    for (fault, row), moment in itertools.product(MATRIX.items(), Moment):
        cell = row[moment]
        for test in filter(None, (cell.shown_by, cell.further)):
            file, name = test.split("::")
            assert f"def {name}(" in (tests / file).read_text(), f"{fault.value}: no test {test}"
        if cell.outcomes and not cell.shown_by:
            assert fault in STRIKES, f"{fault.value} at {moment.value} is shown by nothing"


def test_the_documentation_shows_the_table() -> None:
    """docs/reliability.md has the table as it is: copy it from `support.matrix.markdown`."""
    assert markdown() in (Path(__file__).parent.parent.parent / "docs/reliability.md").read_text()
