"""Heat and working sets against models that remember every write."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusemig.disk.memory import MemoryDisk
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.errors import DiskError, GateClosedError
from fusemig.heat import HALVING_EPOCHS, HORIZON, N_LEVELS, Heat
from fusemig.units import BLOCK_SIZE, CHUNK_SIZE
from fusemig.working_set import WorkingSet

if TYPE_CHECKING:
    from collections.abc import Callable

    Writes = Callable[[random.Random, int], list[tuple[int, int]]]

GIB = 1 << 30
N_CHUNKS = 5


class HeatModel:
    """The heat of each chunk by its definition: new blocks of each epoch, halved at each turn."""

    def __init__(self) -> None:
        self.heat = dict.fromkeys(range(N_CHUNKS), 0)
        self.seen: set[int] = set()
        self.n_ticks = 0

    def note(self, offset: int, length: int) -> None:
        for block in range(offset // BLOCK_SIZE, (offset + length - 1) // BLOCK_SIZE + 1):
            if block not in self.seen:
                self.seen.add(block)
                chunk = block * BLOCK_SIZE // CHUNK_SIZE
                self.heat[chunk] = min(255, self.heat[chunk] + 1)

    def tick(self) -> None:
        self.n_ticks += 1
        self.seen.clear()
        if self.n_ticks > 1 and (self.n_ticks - 1) % HALVING_EPOCHS == 0:
            self.heat = {chunk: heat // 2 for chunk, heat in self.heat.items()}


@given(
    st.lists(
        st.tuples(st.integers(0, N_CHUNKS * CHUNK_SIZE - 1), st.integers(1, 20 * BLOCK_SIZE)) | st.integers(1, 20),
        max_size=60,
    )
)
def test_levels_follow_the_model(steps: list[tuple[int, int] | int]) -> None:
    """Any writes and epochs: a level is that of the model, but for blocks that share a slot."""
    heat, model = Heat(N_CHUNKS * CHUNK_SIZE), HeatModel()
    heat.tick(0.0, 0, 0)
    model.tick()
    for step in steps:
        if isinstance(step, int):
            for _ in range(step):
                heat.tick(0.0, 0, 0)
                model.tick()
        else:
            offset, length = step[0], min(step[1], N_CHUNKS * CHUNK_SIZE - step[0])
            heat.note(offset, length)
            model.note(offset, length)
    for chunk, value in model.heat.items():
        assert abs(heat.level(chunk) - value.bit_length()) <= (1 if value else 0)


def test_the_hottest_chunks_come_first() -> None:
    """As many as were asked for, and none that is cold; of equal ones the first."""
    heat = Heat(9000 * CHUNK_SIZE)
    for chunk, n in ((8500, 40), (3, 40), (4, 1), (5000, 200)):
        heat.note(chunk * CHUNK_SIZE, n * BLOCK_SIZE)
    assert heat.hottest(100) == [5000, 3, 8500, 4]
    assert heat.hottest(2) == [5000, 3]
    assert Heat(CHUNK_SIZE).hottest(5) == []
    assert Heat(0).hottest(5) == []


def test_what_is_not_written_any_more_gets_cold() -> None:
    """The hottest chunk is cold after as many halvings as there are levels; one that is written stays hot."""
    heat = Heat(2 * CHUNK_SIZE)
    heat.note(0, CHUNK_SIZE)
    heat.note(CHUNK_SIZE, CHUNK_SIZE)
    assert heat.level(0) == heat.level(1) == N_LEVELS - 1
    levels = []
    for tick in range(N_LEVELS * HALVING_EPOCHS):
        heat.tick(float(tick), 0, 0)
        heat.note(CHUNK_SIZE, CHUNK_SIZE)
        levels.append(heat.level(0))
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] == 0
    assert heat.level(1) == N_LEVELS - 1


def hot(n_blocks: int, rate: int) -> Writes:
    return lambda rng, _: [(rng.randrange(n_blocks) * BLOCK_SIZE, BLOCK_SIZE) for _ in range(rate)]


def sequential(rng: random.Random, epoch: int) -> list[tuple[int, int]]:
    """Write 100 pieces of 64 KiB a second, one after the other."""
    return [((epoch * 100 + number) * 65536, 65536) for number in range(100)]


def journal_and_stream(rng: random.Random, epoch: int) -> list[tuple[int, int]]:
    """Write 100 blocks over and over, and 5 new MiB a second."""
    small = [(rng.randrange(100) * BLOCK_SIZE, 512) for _ in range(1000)]
    return small + [((100 + epoch * 5 + number) * CHUNK_SIZE, CHUNK_SIZE) for number in range(5)]


def bursts(rng: random.Random, epoch: int) -> list[tuple[int, int]]:
    """Write 3000 blocks at random, every fifth second."""
    return hot(3000, 3000)(rng, epoch) if epoch % 5 == 0 else []


def watch(writes: Writes, size: int, n_epochs: int) -> tuple[WorkingSet, list[set[int]]]:
    """Return what `Heat` says, and the blocks of each epoch."""
    heat, rng, trace, n_bytes, n_writes = Heat(size), random.Random(1), [], 0, 0
    heat.tick(0.0, 0, 0)
    for epoch in range(n_epochs):
        blocks: set[int] = set()
        for offset, length in writes(rng, epoch):
            heat.note(offset, length)
            blocks.update(range(offset // BLOCK_SIZE, (offset + length - 1) // BLOCK_SIZE + 1))
            n_bytes += length
            n_writes += 1
        trace.append(blocks)
        heat.tick(epoch + 1.0, n_bytes, n_writes)
    return heat.working_set(), trace


def mean_distinct(trace: list[set[int]], n: int) -> float:
    """Return the bytes of different blocks in ``n`` epochs, averaged over where they begin."""
    starts = range(len(trace) - n + 1)
    return BLOCK_SIZE * sum(len(set().union(*trace[start : start + n])) for start in starts) / len(starts)


@pytest.mark.parametrize(
    ("writes", "size"),
    [
        (hot(1000, 500), GIB),
        (hot(1000, 3000), GIB),
        (hot(25_600, 1500), GIB),
        (hot(1 << 20, 1500), 4 * GIB),
        (sequential, 8 * GIB),
        (journal_and_stream, 8 * GIB),
        (bursts, GIB),
    ],
)
@pytest.mark.parametrize("n_epochs", [8, 70])
def test_the_working_set_is_that_of_the_trace(writes: Writes, size: int, n_epochs: int) -> None:
    """Within a few percent of what was written in any time that was watched; bursts once some have been seen."""
    found, trace = watch(writes, size, n_epochs)
    for n in (1, 2, 4, 8, 16, 32):
        if n <= n_epochs // 2:
            assert found.after(n) == pytest.approx(mean_distinct(trace, n), rel=0.5 if writes is bursts else 0.04)


def test_a_hot_set_is_known_before_it_was_watched_for_long() -> None:
    """Blocks that are seen for the first time are not taken for new ones: after 5 s the curve is flat."""
    found, _ = watch(hot(1000, 10_000), GIB, 5)
    assert found.after(5) == pytest.approx(1000 * BLOCK_SIZE, rel=0.05)
    assert found.after(3600) < 2 * 1000 * BLOCK_SIZE


def test_the_past_is_forgotten() -> None:
    """A guest that stops is seen to have stopped after some minutes."""
    found, _ = watch(lambda rng, epoch: hot(1000, 100)(rng, epoch) if epoch < 64 else [], GIB, 64 * 11)
    assert found.write_rate < 100 * BLOCK_SIZE / 50


def test_old_epochs_do_not_come_round() -> None:
    """A block that is written every 255 epochs, when numbers repeat, is never taken for one written just now."""
    heat = Heat(GIB)
    heat.tick(0.0, 0, 0)
    for tick in range(800):
        if tick % 255 == 0:
            heat.note(0, BLOCK_SIZE)
            assert heat.level(0) == 1
        heat.tick(float(tick), 0, 1 + tick // 255)
    assert heat.working_set().after(HORIZON) <= 2 * BLOCK_SIZE


def test_nothing_is_known_of_a_disk_that_nobody_writes() -> None:
    """No writes, or no tick: an empty curve and no error."""
    assert Heat(GIB).working_set().after(10.0) == 0
    found, _ = watch(lambda *_: [], GIB, 5)
    assert (found.after(10.0), found.mean(0.0, 100.0), found.write_rate) == (0, 0, 0)


def test_heat_of_an_empty_and_of_the_largest_disk() -> None:
    """No bytes, and the last of 16 TiB."""
    assert Heat(0).working_set().after(1.0) == 0
    heat = Heat(16 << 40)
    heat.note((16 << 40) - BLOCK_SIZE, BLOCK_SIZE)
    assert heat.level((16 << 20) - 1) == 1


def test_a_disk_notes_the_writes_that_are_made() -> None:
    """An admitted write is noted, a refused one is not; zeroing is not."""
    disk = TrackedDisk(MemoryDisk("a", 4 * CHUNK_SIZE))
    disk.pwrite(b"x", 0)
    disk.pwrite(b"", 0)
    disk.write_zeroes(CHUNK_SIZE, CHUNK_SIZE)
    with pytest.raises(DiskError):
        disk.pwrite(b"x", 4 * CHUNK_SIZE)
    disk.set_gate(Gate.CLOSED)
    with pytest.raises(GateClosedError):
        disk.pwrite(b"x", 2 * CHUNK_SIZE)
    assert [disk.heat.level(chunk) for chunk in range(4)] == [1, 0, 0, 0]


# The curve


def test_the_curve_inside_the_first_epoch() -> None:
    """A block written ten times a second is dirty after a tenth of a second, most likely; a stream is a line."""
    block = WorkingSet(10.0 * BLOCK_SIZE, 1.0, [float(BLOCK_SIZE)] * 3, GIB)
    assert 0.5 * BLOCK_SIZE < block.after(0.1) <= BLOCK_SIZE
    assert block.after(0.001) == pytest.approx(0.01 * BLOCK_SIZE, rel=0.05)
    stream = WorkingSet(100.0, 1.0, [100.0, 200.0], 1000.0)
    assert [stream.after(t) for t in (0.0, 0.5, 1.5, 5.0, 100.0)] == [0.0, 50.0, 150.0, 500.0, 1000.0]


@given(
    st.floats(0, 1e9),
    st.floats(0.1, 3),
    st.lists(st.floats(0, 1e8), max_size=20),
    st.floats(0, 200),
    st.floats(0, 200),
)
def test_any_curve_rises_within_the_disk_and_its_mean_is_the_integral(
    rate: float, epoch_s: float, steps: list[float], start: float, stop: float
) -> None:
    """Whatever was measured: ascending, bounded, and the mean agrees with a sum over small steps."""
    steps.sort(reverse=True)
    distinct = [min(1e9, sum(steps[: n + 1])) for n in range(len(steps))]
    curve = WorkingSet(rate, epoch_s, distinct, 1e9)
    start, stop = sorted((start, stop))
    assert 0 <= curve.after(start) <= curve.after(stop) * (1 + 1e-9) + 1e-6 <= 1e9 * (1 + 1e-8)
    n = 2000
    by_sum = sum(curve.after(start + (stop - start) * (at + 0.5) / n) for at in range(n)) / n
    assert curve.mean(start, stop) == pytest.approx(by_sum, rel=0.02, abs=1e-3 * (curve.after(stop) + 1))
