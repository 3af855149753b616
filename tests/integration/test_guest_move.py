"""A guest that moves with its disks, where the runtime, the connection or the hand-off fails at any step."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import pytest
import trio

from fusemig.core.guest import GuestState, Side
from fusemig.core.phase import MigrationPhase as Phase
from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.tracked import Gate
from fusemig.errors import MigrationError
from fusemig.migration.guest import NoGuest
from fusemig.runtimes.move import GuestMove
from fusemig.wire import native
from support.pair import Pair

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fusemig.records.epoch import EpochRecord

STEPS = ("prepare", "begin_copy", "wait_standstill", "load")
"""What the runtime does before COMMIT, in this order."""
SIZES = {"a": 2 * CHUNK_SIZE + 1536}


class ModelRuntime:
    """Two hypervisors as a model: where the guest runs, checked against the disks' gates at each step."""

    name = "model"
    fall_back_deadline_s = 10.0
    run_deadline_s = 10.0

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.running: Side | None = Side.SOURCE
        self.calls: list[str] = []
        self.fails_at = ""
        self.hangs_at = ""
        self.at_step: Callable[[str], None] = lambda _step: None

    async def _step(self, name: str) -> None:
        self.calls.append(name)
        self.at_step(name)
        await trio.sleep(0.01)
        if name == self.hangs_at:
            await trio.sleep_forever()
        if name == self.fails_at:
            raise MigrationError(f"{name} failed on purpose")

    async def prepare(self) -> None:
        await self._step("prepare")

    async def begin_copy(self) -> None:
        await self._step("begin_copy")

    async def wait_standstill(self) -> None:
        await self._step("wait_standstill")
        self.running = None

    async def load(self) -> None:
        assert self.pair.gates() == ({Gate.CLOSED}, {Gate.READ_ONLY}), "memory is finished behind the closed gate"
        await self._step("load")

    async def run_there(self) -> None:
        assert self.pair.gates() == ({Gate.READ_ONLY}, {Gate.OPEN})
        await self._step("run_there")
        assert self.running is None
        self.running = Side.DESTINATION

    async def run_here(self) -> None:
        assert self.pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})
        await self._step("run_here")
        self.running = Side.SOURCE

    async def release(self) -> None:
        self.calls.append("release")


def make(directory: Path, **parameters: float) -> tuple[Pair, ModelRuntime]:
    """Return two sides and a guest on the first."""
    pair = Pair(directory, SIZES, **parameters)
    pair.source.images["a"].content[:] = random.Random(1).randbytes(SIZES["a"])
    runtime = ModelRuntime(pair)
    pair.outgoing.guest = GuestMove(runtime, lambda: pair.outgoing.may_thaw)
    return pair, runtime


def state_of(pair: Pair) -> GuestState:
    """Return where the guest is."""
    account = pair.outgoing.guest.account()
    assert account is not None
    return account.state


def assert_returned(pair: Pair, runtime: ModelRuntime, phase: Phase) -> None:
    """The guest runs at the source, on disks that it can write, and nowhere else."""
    assert pair.outgoing.phase is phase
    assert state_of(pair) is GuestState.RETURNED
    assert runtime.running is Side.SOURCE
    assert pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})
    assert runtime.calls[-2:] == ["run_here", "release"]
    assert runtime.calls.count("run_here") == 1
    assert "run_there" not in runtime.calls


async def test_the_guest_moves_between_the_last_block_and_the_take_over(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Each step once and in order; the timeline has every state of the straight path."""
    pair, runtime = make(tmp_path)
    await pair.migrate()
    assert pair.outgoing.phase is Phase.COMPLETED
    assert runtime.running is Side.DESTINATION
    assert pair.is_equal()
    assert runtime.calls == [*STEPS, "run_there", "release"]
    account = pair.outgoing.guest.account()
    assert account is not None
    assert [state.value for state, _ in account.timeline] == [
        "copying", "standing-still", "loading", "loaded", "given", "arrived", "at-destination",
    ]  # fmt: skip
    times = [time for _, time in account.timeline]
    assert times == sorted(times)


async def test_passes_go_on_while_the_memory_is_copied(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """What the guest writes meanwhile is sent then, not in the freeze."""
    pair, runtime = make(tmp_path)
    passes: list[int] = []

    async def slow() -> None:
        for number in range(20):
            pair.source.disks["a"].pwrite(bytes([number]) * 4096, number * 4096)
            await trio.sleep(0.1)
        passes.append(pair.outgoing.statistics().pass_number)
        assert pair.outgoing.statistics().pending_bytes <= 2 * 4096
        runtime.running = None

    runtime.wait_standstill = slow  # type: ignore[method-assign]
    await pair.migrate()
    assert pair.outgoing.phase is Phase.COMPLETED
    assert passes[0] > 10
    assert pair.is_equal()


async def test_a_standstill_ends_though_the_destination_takes_nothing(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A pass that was under way when the guest stood still has the freeze deadline, too."""
    pair, runtime = make(tmp_path)
    stood_at = []

    async def stand_still() -> None:
        pair.streams[1].receive_nowait = _take_nothing  # type: ignore[method-assign]
        pair.streams[1].wait_readable = trio.sleep_forever  # type: ignore[method-assign]
        pair.source.disks["a"].pwrite(b"x" * 4096, 0)
        await trio.sleep(1)
        stood_at.append(trio.current_time())
        runtime.running = None

    runtime.wait_standstill = stand_still  # type: ignore[method-assign]
    await pair.migrate()
    assert_returned(pair, runtime, Phase.FAILED)
    assert "freeze deadline" in str(pair.outgoing.error)
    account = pair.outgoing.guest.account()
    assert account is not None
    returning_at = account.at(GuestState.RETURNING)
    assert returning_at == pytest.approx(stood_at[0] + pair.parameters.freeze_deadline_s, abs=0.1)


def _take_nothing(buffer: memoryview) -> int:
    raise trio.WouldBlock


@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_fails_before_commit(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, step: str
) -> None:
    """The guest runs on at the source, and the error is the step's own."""
    pair, runtime = make(tmp_path)
    runtime.fails_at = step
    await pair.migrate()
    assert_returned(pair, runtime, Phase.FAILED)
    assert str(pair.outgoing.error) == f"{step} failed on purpose"


@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_hangs_is_cancelled(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, step: str
) -> None:
    """`cancel` ends it before the disks are proved; behind the closed gate it is the freeze deadline that does."""
    pair, runtime = make(tmp_path)
    runtime.hangs_at = step
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.migrate)
        await trio.sleep(1)
        assert runtime.calls[-1] == step
        if step == "load":
            await trio.sleep(10)
            expected = Phase.FAILED
        else:
            pair.outgoing.cancel()
            expected = Phase.CANCELLED
    assert_returned(pair, runtime, expected)


@pytest.mark.parametrize(("step", "message"), itertools.product(STEPS, ["cut", "abort"]))
async def test_the_destination_goes_away_during_a_step(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, step: str, message: str
) -> None:
    """Also in the last one before COMMIT: nothing is said into a connection that has gone, so nothing is in doubt."""
    pair, runtime = make(tmp_path)

    async def break_off() -> None:
        if message == "abort":
            pair.streams[1].send_nowait([native.encode_message(native.Abort("on purpose"))])
        await pair.streams[1].aclose()

    async with trio.open_nursery() as nursery:
        runtime.at_step = lambda name: nursery.start_soon(break_off) if name == step else None
        runtime.hangs_at = "wait_standstill" if step == "wait_standstill" else ""
        await pair.migrate()
    assert_returned(pair, runtime, Phase.FAILED)
    assert pair.outgoing.error is not None


async def test_a_failed_record_of_the_hand_off_takes_the_guest_back(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The one thing that can fail between "loaded" and COMMIT."""
    pair, runtime = make(tmp_path)
    file = pair.source.epochs["a"]
    write = file.write

    def fail(record: EpochRecord) -> None:
        if record.state.value == "handed-off":
            raise MigrationError("no space for the record")
        write(record)

    file.write = fail  # type: ignore[method-assign]
    await pair.migrate()
    assert_returned(pair, runtime, Phase.FAILED)
    assert runtime.calls == [*STEPS, "run_here", "release"]


async def test_no_answer_to_commit_runs_the_guest_nowhere(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """In doubt, it is told to nobody, and the account says so."""
    pair, runtime = make(tmp_path)

    pair.streams[0].on_send = lambda data: None if pair.outgoing.phase is Phase.COMMITTED else data
    await pair.migrate()
    assert pair.outgoing.phase is Phase.IN_DOUBT
    assert state_of(pair) is GuestState.IN_DOUBT
    assert runtime.running is None
    assert runtime.calls == [*STEPS, "release"]
    account = pair.outgoing.guest.account()
    assert account is not None
    assert "stands still at both ends" in account.error


@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_a_destination_that_cannot_run_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, how: str
) -> None:
    """The disks have moved; the source is not asked, and the account says who may run it."""
    pair, runtime = make(tmp_path)
    setattr(runtime, f"{how}_at", "run_there")
    await pair.migrate()
    assert pair.outgoing.phase is Phase.COMPLETED
    assert state_of(pair) is GuestState.STUCK_AT_DESTINATION
    assert runtime.calls == [*STEPS, "run_there", "release"]
    account = pair.outgoing.guest.account()
    assert account is not None
    assert "must not be resumed at the source" in account.error


@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_a_source_that_cannot_run_it_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, how: str
) -> None:
    """The migration's own error stays; the account says that the guest waits here."""
    pair, runtime = make(tmp_path)
    runtime.fails_at = "load"
    if how == "hangs":
        runtime.hangs_at = "run_here"
    else:

        async def fail() -> None:
            raise MigrationError("run_here failed on purpose")

        runtime.run_here = fail  # type: ignore[method-assign]
    await pair.migrate()
    assert pair.outgoing.phase is Phase.FAILED
    assert str(pair.outgoing.error) == "load failed on purpose"
    assert state_of(pair) is GuestState.STUCK_AT_SOURCE
    assert pair.gates() == ({Gate.OPEN}, {Gate.READ_ONLY})
    account = pair.outgoing.guest.account()
    assert account is not None
    assert "Resume it by hand, here only" in account.error


async def test_a_move_that_disagrees_with_the_hand_off_touches_nothing(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Should the two ever differ, the guest stays where it stands."""
    _pair, runtime = make(tmp_path)
    move = GuestMove(runtime, lambda: False)
    await move.fall_back()
    assert runtime.calls == ["release"]
    assert move.account().state is GuestState.STUCK_AT_SOURCE


async def test_where_no_guest_moves_nothing_is_told(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Every answer of `NoGuest` is that there is none."""
    pair = Pair(tmp_path, SIZES)
    guest = NoGuest()
    for call in (guest.prepare, guest.bring_to_standstill, guest.load, guest.run_there, guest.fall_back):
        await call()
    guest.on_committed()
    await pair.migrate()
    assert pair.outgoing.guest.account() is None
