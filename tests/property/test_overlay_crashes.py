"""An overlay against a model of bytes, killed and cut from its power at any call to its stores.

The rules, for each byte of the disk, whatever happens:

- while it runs, and after a kill: the byte that was acknowledged last (or what a write in the making had of it);
- after a power loss: the byte that was durable, that is, acknowledged before the last flush that returned, or one that
  was written since. A byte that no guest ever wrote is the base's, for ever.

The same holds for an overlay that is not all here (post-copy): there a byte that no guest wrote is the base's or, in a
missing block, what the source has of it, whether that was fetched already or not.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fusemig.core.units import BLOCK_SIZE, n_blocks
from fusemig.disk.allocation import AllocationMap, BaseIdentity, map_size, write_header
from fusemig.disk.borrowed import BorrowedDisk, Wants, new_map
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.overlay import OverlayDisk
from support.crash import CrashDisk, Fate, KilledError

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 7 * BLOCK_SIZE + 1536
BASE_SIZE = 5 * BLOCK_SIZE + 512
SPAN = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * BLOCK_SIZE)).map(lambda s: (s[0], min(s[1], SIZE - s[0])))
ALIGNED = st.tuples(st.integers(0, 6), st.integers(1, 3)).map(
    lambda s: (s[0] * BLOCK_SIZE, min(s[1] * BLOCK_SIZE, SIZE - s[0] * BLOCK_SIZE))
)


class OverlayWorld:
    """An overlay over stores that crash, and what it may hold."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.fate = Fate()
        self.base = MemoryDisk("d", BASE_SIZE)
        self.base.content[:] = self.rng.randbytes(BASE_SIZE)
        self.base.content[BLOCK_SIZE : 2 * BLOCK_SIZE] = bytes(BLOCK_SIZE)
        self.image = CrashDisk("d", SIZE, self.fate, self.rng)
        self.store = CrashDisk("d", map_size(SIZE), self.fate, self.rng)
        write_header(self.store, SIZE, BaseIdentity(size=BASE_SIZE, digest=""))
        self.boot = 0
        self.now = bytearray(self.base.content.ljust(SIZE, b"\0"))
        """What was acknowledged."""
        self.since: dict[int, set[int]] = {}
        """What each byte may be after a power loss, where that is not only its present value."""
        self.disk = self.begin()

    def begin(self) -> OverlayDisk:
        """Open it for the first time."""
        return self.open()

    def open(self) -> OverlayDisk:
        """Open the overlay as a new process does."""
        allocation = AllocationMap(self.store, SIZE, f"boot {self.boot}")
        disk = OverlayDisk(self.image, self.base, allocation)
        allocation.begin(self.image.flush, "stamp")
        return disk

    def write(self, offset: int, data: bytes, call: Callable[[], None]) -> None:
        """Make a write that puts ``data`` at ``offset``; it may be the last."""
        for at, value in enumerate(data, offset):
            self.since.setdefault(at, {self.now[at]}).add(value)
        try:
            call()
        except KilledError:
            self.die(range(offset, offset + len(data)))
        else:
            self.now[offset : offset + len(data)] = data

    def flush(self) -> None:
        """Flush; it may be the last call."""
        try:
            self.disk.flush()
        except KilledError:
            self.die(range(0))
        else:
            self.since.clear()

    def die(self, unsure: range) -> None:
        """Be killed, at a call that wrote ``unsure``, and perhaps more than once while the overlay is opened again.

        Each time the power may go too.
        """
        lost_power = False
        while True:
            if self.rng.random() < 0.5:
                lost_power = True
                self.lose_power()
            self.fate.left = self.rng.choice((None, 0, 1, 2, 3))
            try:
                self.disk = self.open()
            except KilledError:
                continue
            self.fate.left = None
            break
        found = self.look(0, SIZE)
        may_differ = range(SIZE) if lost_power else unsure
        for at in may_differ:
            if found[at] != self.now[at]:
                assert found[at] in self.since.get(at, ()), f"byte {at} after a power loss: {found[at]:#x}"
                self.now[at] = found[at]
        assert found == self.now, "a kill took or changed what was acknowledged"
        if lost_power:
            self.since.clear()

    def look(self, offset: int, length: int) -> bytes:
        """Return what a guest reads."""
        return bytes(self.disk.pread(length, offset))

    def lose_power(self) -> None:
        """Begin another boot with what the stores kept."""
        self.boot += 1
        self.image.lose_power()
        self.store.lose_power()


NO_PATIENCE_S = 0.0
"""Whoever would wait here would wait for ever."""
MISSING = [(1, 3), (4, 5), (6, 8)]
SENT = 5
"""A block above the base that came before the hand-off; so did the first missing one, in an older version."""


class LoanWorld(OverlayWorld):
    """An overlay of which blocks are missing: they lie above the base at the source, and here they read as the base."""

    def begin(self) -> OverlayDisk:
        """Have some of it received, and borrow the rest."""
        overlay = super().open()
        for block in (SENT, MISSING[0][0]):
            data = self.rng.randbytes(BLOCK_SIZE)
            overlay.pwrite(data, block * BLOCK_SIZE)
            self.now[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = data
        overlay.flush()
        for first, stop in MISSING:
            end = min(SIZE, stop * BLOCK_SIZE)
            self.now[first * BLOCK_SIZE : end] = self.rng.randbytes(end - first * BLOCK_SIZE)
        self.now[2 * BLOCK_SIZE : 3 * BLOCK_SIZE] = bytes(BLOCK_SIZE)  # a hole there, where the base has data
        self.origin = bytes(self.now)
        self.loan_store = CrashDisk("d", map_size(SIZE), self.fate, self.rng)
        self.loan = BorrowedDisk(
            overlay, new_map(self.loan_store, overlay, MISSING, f"boot {self.boot}"), Wants("d", NO_PATIENCE_S)
        )
        return self.loan

    def open(self) -> OverlayDisk:
        """Open the overlay, and then what lies over it."""
        overlay = super().open()
        loan = BorrowedDisk(
            overlay, AllocationMap(self.loan_store, SIZE, f"boot {self.boot}"), Wants("d", NO_PATIENCE_S)
        )
        loan._allocation.begin(overlay.flush, "")
        self.loan = loan
        return loan

    def write(self, offset: int, data: bytes, call: Callable[[], None]) -> None:
        """Fetch what the write would wait for; then as ever."""
        while self.disk.waits_for_peer(offset, len(data), is_write=True):  # again, after a death meanwhile
            for block in (offset // BLOCK_SIZE, (offset + len(data) - 1) // BLOCK_SIZE):
                self.fill(block, block + 1)
        super().write(offset, data, call)

    def fill(self, first: int, stop: int) -> None:
        """Have what the source has of some blocks come, asked for or not; it may be the last that happens."""
        start, end = first * BLOCK_SIZE, min(SIZE, stop * BLOCK_SIZE)
        data = bytearray(self.origin[start:end])
        try:
            self.loan.fill(memoryview(data) if any(data) else None, start, end - start)
        except KilledError:
            self.die(range(0))

    def look(self, offset: int, length: int) -> bytes:
        """Return what a guest would read, if it waited for what is missing."""
        found = bytearray(self.origin[offset : offset + length])
        for start, n in self.loan.allocated(offset, length):
            found[start - offset : start - offset + n] = self.disk.pread(n, start)
        return bytes(found)

    def lose_power(self) -> None:
        """So does the map of the loan."""
        super().lose_power()
        self.loan_store.lose_power()


class OverlayMachine(RuleBasedStateMachine):
    """Guests that write, zero and flush; kills and power losses at any call."""

    kind: type[OverlayWorld] = OverlayWorld
    world: OverlayWorld

    @initialize(seed=st.integers(0, 1 << 32))
    def make(self, seed: int) -> None:
        self.world = self.kind(seed)

    @rule(span=SPAN | ALIGNED)
    def write(self, span: tuple[int, int]) -> None:
        data = self.world.rng.randbytes(span[1])
        self.world.write(span[0], data, lambda: self.world.disk.pwrite(data, span[0]))

    @rule(span=SPAN | ALIGNED)
    def zero(self, span: tuple[int, int]) -> None:
        self.world.write(span[0], bytes(span[1]), lambda: self.world.disk.write_zeroes(*span))

    @rule()
    def flush(self) -> None:
        self.world.flush()

    @rule(calls=st.integers(0, 6))
    def doom(self, calls: int) -> None:
        """Be killed in one of the next calls."""
        self.world.fate.left = calls

    @rule()
    def kill_between_calls(self) -> None:
        self.world.die(range(0))

    @rule(span=SPAN)
    def read(self, span: tuple[int, int]) -> None:
        offset, length = span
        assert self.world.look(offset, length) == self.world.now[offset : offset + length]
        buffer = bytearray(length)
        if self.world.disk.waits_for_peer(offset, length, is_write=False):
            assert not self.world.disk.pread_nowait(memoryview(buffer), offset)
            return
        assert self.world.disk.pread_nowait(memoryview(buffer), offset)
        assert buffer == self.world.now[offset : offset + length]

    @rule(span=SPAN)
    def extents(self, span: tuple[int, int]) -> None:
        """Extents are without gaps, and what is no data is zeros."""
        at = span[0]
        for extent in self.world.disk.extents(*span):
            assert extent.offset == at
            assert extent.length > 0
            at += extent.length
            if not extent.is_data:
                assert not any(self.world.now[extent.offset : at])
        assert at == sum(span)

    @invariant()
    def what_is_not_allocated_is_the_bases(self) -> None:
        if not hasattr(self, "world"):
            return
        at = 0
        for offset, length in [*self.world.disk.allocated(0, SIZE), (SIZE, 0)]:
            assert self.world.now[at:offset] == self.world.base.content.ljust(SIZE, b"\0")[at:offset]
            at = offset + length


class LoanMachine(OverlayMachine):
    """The same while the rest of the overlay is fetched."""

    kind = LoanWorld

    @rule(first=st.integers(0, n_blocks(SIZE) - 1), n=st.integers(1, 4))
    def fill(self, first: int, n: int) -> None:
        assert isinstance(self.world, LoanWorld)
        self.world.fill(first, min(n_blocks(SIZE), first + n))

    @invariant()
    def what_is_not_allocated_is_the_bases(self) -> None:
        """What counts as here and is not the overlay's is the base's, and nobody wrote it."""
        if not hasattr(self, "world"):
            return
        assert isinstance(self.world, LoanWorld)
        loan, base = self.world.loan, self.world.base.content.ljust(SIZE, b"\0")
        assert isinstance(loan.image, OverlayDisk)
        for at in range(0, SIZE, BLOCK_SIZE):
            n = min(BLOCK_SIZE, SIZE - at)
            if list(loan.allocated(at, n)) and not list(loan.image.allocated(at, n)):
                assert self.world.now[at : at + n] == base[at : at + n] == self.world.origin[at : at + n]


SETTINGS = settings(
    max_examples=150,
    stateful_step_count=40,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking a story with a seed in it takes for ever
)
TestOverlay = OverlayMachine.TestCase
TestOverlay.settings = SETTINGS
TestLoan = LoanMachine.TestCase
TestLoan.settings = settings(SETTINGS, max_examples=50)


@pytest.mark.parametrize("loses_power", [False, True])
@pytest.mark.parametrize("kind", [OverlayWorld, LoanWorld])
def test_every_call_can_be_the_last(kind: type[OverlayWorld], loses_power: bool) -> None:
    """One fixed story of copies, zeros and flushes, killed at its first call, its second, and so on to its end."""
    at, is_over = 0, False
    while not is_over:
        world = kind(seed=at)
        world.rng.random = lambda: 0.0 if loses_power else 0.9  # type: ignore[method-assign]
        world.rng.choice = lambda states: states[0]  # type: ignore[method-assign,assignment]
        world.fate.left = at
        world.write(100, b"a" * 50, lambda: world.disk.pwrite(b"a" * 50, 100))  # noqa: B023
        world.write(6 * BLOCK_SIZE, b"e" * BLOCK_SIZE, lambda: world.disk.pwrite(b"e" * BLOCK_SIZE, 6 * BLOCK_SIZE))  # noqa: B023
        world.write(BLOCK_SIZE, bytes(BLOCK_SIZE), lambda: world.disk.write_zeroes(BLOCK_SIZE, BLOCK_SIZE))  # noqa: B023
        world.flush()
        if isinstance(world, LoanWorld):
            world.fill(0, n_blocks(SIZE) - 1)
            world.flush()
        world.write(5000, b"b" * 9000, lambda: world.disk.pwrite(b"b" * 9000, 5000))  # noqa: B023
        world.write(3000, bytes(6000), lambda: world.disk.write_zeroes(3000, 6000))  # noqa: B023
        world.flush()
        world.write(120, b"c" * 4096, lambda: world.disk.pwrite(b"c" * 4096, 120))  # noqa: B023
        world.write(SIZE - 700, b"d" * 700, lambda: world.disk.pwrite(b"d" * 700, SIZE - 700))  # noqa: B023
        world.flush()
        is_over = world.fate.left is not None
        world.fate.left = None
        world.flush()
        world.lose_power()
        world.disk = world.open()
        assert world.look(0, SIZE) == world.now, "what was flushed after a crash is durable"
        at += 1
    assert at > 15
