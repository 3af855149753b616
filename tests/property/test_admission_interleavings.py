"""A guest's write against whoever works on its disk, stopped at every step of either: admission takes no lock.

Both calls run in lockstep threads that are traced. The write runs to its step i, the other call to its step j, then the
write to its end, or as far as the lock lets it, then the other call: for every i and j, so each may find the other
anywhere. A step is a line of the tracked layer, and of j every third is tried, another third for the next i; with
``--nightly`` a step of the write is an instruction, and every j is tried.

Each of these was tried by hand and is found: the marks looked at before the regime is replaced, or the regime not
replaced, or not by a take; either mark or the second look of a write left out; the look whether it is still the regime
left out, or made before the write enters, or without the lock; a write that leaves before it marks again; the marks of
another first write replaced; a chunk settled without moving its marks; notes forgotten without the marks that stand for
them, or without waiting for old writes; a drain that forgets those; trackers that change under a regime.
"""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol

import pytest

from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE, mask_extents
from fusemig.disk import gate, marks, notes, regime, tracked, tracking
from fusemig.disk.dirty_map import DirtyMap, MapBase, Since, dirty_file_size
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.errors import GateClosedError
from support.lockstep import Lockstep, pause

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType

SIZE = CHUNK_SIZE + 8 * BLOCK_SIZE
WRITTEN = CHUNK_SIZE + BLOCK_SIZE
"""The block that the write goes to."""
BASE = MapBase(image_id="image", epoch=0, session="session")
NEW = b"n" * BLOCK_SIZE
TRACKED_LAYER = {module.__file__ for module in (gate, marks, notes, regime, tracked, tracking)}


class SteppedLock:
    """A lock for lockstep threads: who finds it taken stops, and tries again when it is resumed."""

    def __init__(self) -> None:
        self._is_taken = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        while self._is_taken:
            if not blocking or timeout >= 0:
                return False
            pause()
        self._is_taken = True
        return True

    def release(self) -> None:
        self._is_taken = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Stepped(Lockstep):
    """A call that stops once, before a certain one of the steps that it makes in the tracked layer; or for the lock."""

    def __init__(self, call: Callable[[], object], stops_at: int, *, by_instruction: bool) -> None:
        self.n_steps = 0

        def trace(frame: FrameType, event: str, _argument: object) -> Tracer | None:
            if frame.f_code.co_filename not in TRACKED_LAYER:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = by_instruction, not by_instruction
            if event in ("line", "opcode"):
                if self.n_steps == stops_at:
                    pause()
                self.n_steps += 1
            return trace

        def traced() -> object:
            sys.settrace(trace)
            try:
                return call()
            finally:
                sys.settrace(None)

        super().__init__(traced)


class Tracer(Protocol):
    """What `sys.settrace` takes."""

    def __call__(self, frame: FrameType, event: str, argument: object, /) -> Tracer | None:
        """Be told of an event."""


class World:
    """A disk that is tracked, a replica that got what was taken, and a map of what was written since it was begun."""

    def __init__(self, *, is_known: bool) -> None:
        """If the chunk ``is_known``, an earlier write has left marks there."""
        self.image = MemoryDisk("a", SIZE)
        self.disk = TrackedDisk(self.image)
        self.map = DirtyMap(MemoryDisk("m", dirty_file_size(SIZE)), SIZE, Since.SESSION, "boot", "")
        assert self.disk.begin_map(self.map, BASE, 0)
        self.tracking = self.disk.start_tracking()
        self.replica = bytearray(SIZE)
        if is_known:
            self.disk.pwrite(NEW, CHUNK_SIZE)
            assert self.tracking.dirty_bytes == BLOCK_SIZE
            for block in (5, 6):
                self.disk.pwrite(NEW, CHUNK_SIZE + block * BLOCK_SIZE)
        self.is_refused = False

    def write(self, block: int = 1) -> None:
        """Be the guest."""
        try:
            self.disk.pwrite(NEW, CHUNK_SIZE + block * BLOCK_SIZE)
        except GateClosedError:
            self.is_refused = True

    def send(self, at: int = 0) -> None:
        """Take what is dirty from chunk ``at`` on, read it and have it arrive."""
        while (taken := self.tracking.take_next(at)) is not None:
            at = taken[0] + 1
            for offset, length in mask_extents(taken[1], taken[0], SIZE):
                self.replica[offset : offset + length] = self.image.content[offset : offset + length]
            self.tracking.acknowledge([taken[0]])

    def check_nothing_is_lost(self) -> None:
        """What is not dirty has arrived."""
        self.send()
        assert self.tracking.is_clean
        assert self.replica == self.image.content


class Other(Protocol):
    """What meets the write."""

    def __call__(self, world: World) -> Callable[[], None]:
        """Do it; return what is to be checked when both have ended."""


def send(world: World) -> Callable[[], None]:
    """A pass."""
    world.send()
    return world.check_nothing_is_lost


def send_on(world: World) -> Callable[[], None]:
    """A pass that began earlier."""
    world.send(1)
    return world.check_nothing_is_lost


def look(world: World) -> Callable[[], None]:
    """A look at the figures moves the marks."""
    assert world.tracking.dirty_bytes <= 4 * BLOCK_SIZE
    return world.check_nothing_is_lost


def freeze(world: World) -> Callable[[], None]:
    """The gate is closed; if it is drained, the last pass is the last one."""
    world.disk.set_gate(Gate.CLOSED)
    if not world.disk.wait_drained(0):
        return world.check_nothing_is_lost
    world.send()
    frozen = bytes(world.image.content)

    def check() -> None:
        assert world.image.content == frozen
        assert world.replica == frozen
        assert world.tracking.is_clean
        assert world.is_refused == (frozen[WRITTEN : WRITTEN + BLOCK_SIZE] != NEW)

    return check


def begin_map_and_freeze(world: World) -> Callable[[], None]:
    """A write that is older than a map must have ended too."""
    world.disk.begin_map(world.map, BASE, 0)
    return freeze(world)


def start_over(world: World) -> Callable[[], None]:
    """Another migration begins, and finds what is allocated; the old one ends."""
    world.tracking.stop()
    world.tracking = world.disk.start_tracking()
    world.replica[:] = world.image.content
    return world.check_nothing_is_lost


def settle(world: World) -> Callable[[], None]:
    """A resumed migration has the chunk count as sent unless the map tells of a write."""
    before = bytes(SIZE)  # what the destination got, when the map was begun
    if world.tracking.settle(1, world.map.written):
        world.replica[:] = before
    return world.check_nothing_is_lost


def begin_map(world: World) -> Callable[[], None]:
    """A map begins anew; if it counts, it knows every chunk that changes from then on."""
    before: list[bytes] = []
    seal = world.map.seal

    def look_and_seal(base: MapBase) -> None:
        before.append(bytes(world.image.content))
        seal(base)

    world.map.seal = look_and_seal  # type: ignore[method-assign]
    world.disk.begin_map(world.map, BASE, 0)

    def check() -> None:
        assert not before or world.image.content == before[0] or world.map.written[1]
        if before:
            world.write(2)
            assert world.map.written[1]
        world.check_nothing_is_lost()

    return check


def write_too(world: World) -> Callable[[], None]:
    """Another guest writes to the same chunk, then a pass is made."""
    world.write(3)
    world.write(4)
    return world.check_nothing_is_lost


OTHERS: list[Other] = [
    send,
    send_on,
    look,
    freeze,
    begin_map_and_freeze,
    start_over,
    settle,
    begin_map,
    write_too,
]


def run(other: Other, i: int, j: int, *, is_known: bool, by_instruction: bool) -> tuple[bool, bool]:
    """Let the write make ``i`` steps, the other call ``j``; then the write goes on, and the other after it.

    Returns:
        Whether they have so many steps.
    """
    world = World(is_known=is_known)
    writing = Stepped(world.write, i, by_instruction=by_instruction)
    meeting = Stepped(lambda: other(world), j, by_instruction=False)
    while not (writing.is_over and meeting.is_over):
        if not writing.is_over:
            writing.resume()
        if not meeting.is_over:
            meeting.resume()
    writing.finish()
    check = meeting.finish()
    check()
    return writing.n_steps > i, meeting.n_steps > j


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("is_known", [False, True], ids=["first write to a chunk", "next write to a chunk"])
@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.__name__)
def test_a_write_that_meets_another_call_at_any_step_is_not_lost(
    other: Other, is_known: bool, nightly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost, nothing is written behind a closed gate, no map misses a write, whoever comes first."""
    stepping = SimpleNamespace(Lock=SteppedLock, Condition=threading.Condition)
    monkeypatch.setattr(regime, "threading", stepping)
    n_runs = i = 0
    is_write_longer = True
    while is_write_longer:
        j, is_other_longer = 0 if nightly else i % 3, True
        while is_other_longer:
            is_write_longer, is_other_longer = run(other, i, j, is_known=is_known, by_instruction=nightly)
            n_runs += 1
            j += 1 if nightly else 3
        i += 1
    print(f"{n_runs} orders")
    assert n_runs > 100
