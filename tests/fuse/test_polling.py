"""The stand-in for trio that pyfuse3 waits through."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pyfuse3
import pytest
import trio
import trio.testing

from fusemig.fuse.polling import SLICE_REQUESTS, PollingLowlevel, PollingTrio, UnfairLock, polling_trio

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Give the two ends of a pipe."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


async def test_readable_descriptor_is_told_without_a_checkpoint(pipe: tuple[int, int]) -> None:
    """A busy descriptor costs no trio step."""
    lowlevel = PollingLowlevel()
    os.write(pipe[1], b"x")
    await lowlevel.wait_readable(pipe[0])  # the first call starts a slice
    with trio.testing.assert_no_checkpoints():
        await lowlevel.wait_readable(pipe[0])


async def test_busy_descriptor_lets_other_tasks_run(pipe: tuple[int, int], nursery: trio.Nursery) -> None:
    """Another task runs at least once per slice."""
    lowlevel = PollingLowlevel()
    os.write(pipe[1], b"x")
    n_turns = 0

    async def other() -> None:
        nonlocal n_turns
        while True:
            n_turns += 1
            await trio.lowlevel.checkpoint()

    nursery.start_soon(other)
    for _ in range(5 * SLICE_REQUESTS):
        await lowlevel.wait_readable(pipe[0])
    assert n_turns >= 4
    nursery.cancel_scope.cancel()


async def test_empty_descriptor_is_waited_for(pipe: tuple[int, int], nursery: trio.Nursery) -> None:
    """It returns only once there is something to read, though others may have taken what woke it."""
    lowlevel = PollingLowlevel()
    returned = False

    async def wait() -> None:
        nonlocal returned
        await lowlevel.wait_readable(pipe[0])
        returned = True

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    assert not returned
    os.write(pipe[1], b"x")
    with trio.fail_after(30):
        while not returned:
            await trio.lowlevel.checkpoint()


async def test_closing_is_noticed(pipe: tuple[int, int], nursery: trio.Nursery) -> None:
    """`notify_closing`, which is how pyfuse3 ends its loop, reaches the waiting task."""
    lowlevel = PollingLowlevel()
    closed = trio.Event()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await lowlevel.wait_readable(pipe[0])
        closed.set()

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    lowlevel.notify_closing(pipe[0])
    with trio.fail_after(30):
        await closed.wait()


async def test_unfair_lock(nursery: trio.Nursery) -> None:
    """It is exclusive, costs no checkpoint when free, and whoever waits gets it in the end."""
    lock = UnfairLock()
    n_inside = n_done = 0

    async def user() -> None:
        nonlocal n_inside, n_done
        for _ in range(20):
            async with lock:
                n_inside += 1
                assert n_inside == 1
                await trio.lowlevel.checkpoint()
                n_inside -= 1
        n_done += 1

    with trio.testing.assert_no_checkpoints():
        async with lock:
            pass
    async with trio.open_nursery() as users:
        for _ in range(5):
            users.start_soon(user)
    assert n_done == 5


async def test_the_stand_in_is_removed_again() -> None:
    """pyfuse3 has its own trio back afterwards; everything but the two differences is trio's own all the time."""
    module: Any = pyfuse3
    with polling_trio() as is_polling:
        assert is_polling
        assert isinstance(module.trio, PollingTrio)
        assert module.trio.open_nursery is trio.open_nursery
        assert module.trio.lowlevel.current_task is trio.lowlevel.current_task
    assert vars(module)["trio"] is trio


async def test_unknown_pyfuse3_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody else swapped the attribute, nothing is changed."""
    monkeypatch.setattr(pyfuse3, "trio", "asyncio's")
    with polling_trio() as is_polling:
        assert not is_polling
        assert vars(pyfuse3)["trio"] == "asyncio's"
