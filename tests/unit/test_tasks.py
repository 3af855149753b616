"""Tasks that belong together: who ends whom, and what comes out."""

from __future__ import annotations

import threading

import pytest
import trio

from fusemig.errors import ConnectionLostError, FusemigError, MigrationError
from fusemig.tasks import run_all, run_beside


class Diary:
    """Notes what tasks did, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    async def for_ever(self) -> None:
        """Go on until cancelled."""
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.lines.append("cancelled")
            raise

    async def fail(self) -> None:
        """Fail with an error of ours, a step later."""
        await trio.lowlevel.checkpoint()
        self.lines.append("failed")
        raise MigrationError("the first")

    async def end(self) -> None:
        """End, a step later."""
        await trio.lowlevel.checkpoint()
        self.lines.append("ended")


async def test_the_others_end_with_the_main_task() -> None:
    """They are cancelled, and nothing is raised."""
    diary = Diary()
    await run_beside(diary.end, diary.for_ever, diary.for_ever)
    assert diary.lines == ["ended", "cancelled", "cancelled"]


async def test_a_failure_of_another_ends_the_main_task_and_is_raised_bare() -> None:
    """Not in a group."""
    diary = Diary()
    with pytest.raises(MigrationError, match="the first"):
        await run_beside(diary.for_ever, diary.fail)
    assert diary.lines == ["failed", "cancelled"]


async def test_a_failure_of_the_main_task_ends_the_others() -> None:
    """And is raised when they have ended."""
    diary = Diary()
    with pytest.raises(MigrationError, match="the first"):
        await run_beside(diary.fail, diary.for_ever)
    assert diary.lines == ["failed", "cancelled"]


@pytest.mark.parametrize("run", [run_beside, run_all])
async def test_what_follows_a_failure_is_its_echo(run: object) -> None:
    """Only the first error comes out."""
    diary = Diary()

    async def echo() -> None:
        try:
            await diary.for_ever()
        except trio.Cancelled:
            raise ConnectionLostError("an echo") from None

    with pytest.raises(FusemigError, match="the first"):
        await run(diary.fail, echo)  # type: ignore[operator]


async def test_all_are_waited_for() -> None:
    """Also if the first ends long before the others."""
    diary, gate = Diary(), trio.Event()

    async def wait() -> None:
        await gate.wait()
        diary.lines.append("last")

    async def open_gate() -> None:
        await trio.testing.wait_all_tasks_blocked()
        gate.set()

    await run_all(diary.end, wait, open_gate)
    assert diary.lines == ["ended", "last"]


@pytest.mark.parametrize("is_failing", [False, True])
async def test_a_task_that_must_finish_is_let_end(*, is_failing: bool) -> None:
    """It is not cancelled, whatever became of the main task, and is waited for."""
    diary, stopped = Diary(), trio.Event()

    async def journal() -> None:
        await stopped.wait()
        await trio.lowlevel.checkpoint()  # where a cancellation would strike
        diary.lines.append("finished")

    try:
        await run_beside(diary.fail if is_failing else diary.end, journal, stop=stopped.set)
    except MigrationError:
        assert is_failing
    assert diary.lines == ["failed" if is_failing else "ended", "finished"]


async def test_a_task_that_must_finish_and_fails_ends_the_main_task() -> None:
    """And the others are asked to end, as ever."""
    diary, stopped = Diary(), trio.Event()

    async def other() -> None:
        await stopped.wait()
        diary.lines.append("finished")

    with pytest.raises(MigrationError, match="the first"):
        await run_beside(diary.for_ever, diary.fail, other, stop=stopped.set)
    assert diary.lines[0] == "failed"
    assert sorted(diary.lines[1:]) == ["cancelled", "finished"]


async def test_a_task_in_a_thread_is_let_go_at_the_first_failure() -> None:
    """Before the rest is waited for, which no cancellation reaches."""
    diary, let_go = Diary(), trio.Event()

    async def uncancellable() -> None:
        with trio.CancelScope(shield=True):
            await let_go.wait()
        diary.lines.append("let go")

    with pytest.raises(MigrationError):
        await run_all(uncancellable, diary.fail, on_failure=let_go.set)
    assert diary.lines == ["failed", "let go"]


async def test_cancellation_comes_through() -> None:
    """Of everything, and out of it."""
    diary = Diary()
    with trio.CancelScope() as scope:
        scope.cancel()
        await run_beside(diary.for_ever, diary.for_ever)
    assert scope.cancelled_caught
    assert diary.lines == ["cancelled", "cancelled"]


async def test_what_failed_before_a_cancellation_is_told() -> None:
    """A deadline that passes while the others come to an end does not hide why."""
    diary = Diary()
    with pytest.raises(MigrationError, match="the first"), trio.CancelScope() as scope:
        await run_beside(diary.fail, diary.for_ever, on_failure=scope.cancel)
    assert not scope.cancelled_caught


async def test_a_bug_is_not_hidden() -> None:
    """It comes in trio's group, as from any nursery."""
    diary = Diary()

    async def bug() -> None:
        try:
            await diary.for_ever()
        finally:
            raise KeyError("a bug")

    with pytest.raises(ExceptionGroup) as caught:
        await run_beside(diary.fail, bug)
    assert isinstance(caught.value.exceptions[0], KeyError)


async def test_a_bug_frees_those_who_are_stuck_in_threads() -> None:
    """It cancels them, but a thread ends only with what it waits for."""
    freed = threading.Event()

    async def in_thread() -> None:
        assert await trio.to_thread.run_sync(freed.wait, 60)

    async def bug() -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as raised:
        await run_beside(in_thread, bug, on_failure=freed.set)
    assert raised.group_contains(ZeroDivisionError)
    assert freed.is_set()
