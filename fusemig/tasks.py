"""Tasks that belong together, out of which an error of ours comes as itself.

What a trio nursery raises is a group of errors, and a group is nothing that a person or a peer can be told. Of tasks
that run together the first error is the cause and what the others say on their way out is its echo: so here the first
`FusemigError` is raised bare, and the rest of them are dropped. Nothing else is hidden: what is no error of ours is a
bug, and comes in trio's group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from fusemig.errors import FusemigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Task = Callable[[], Awaitable[None]]


def _nothing() -> None:
    """Do nothing."""


async def run_beside(
    main: Task, *others: Task, stop: Callable[[], None] | None = None, on_failure: Callable[[], None] = _nothing
) -> None:
    """Run ``main``, and ``others`` until it ends; the first to fail ends them all.

    Args:
        main: what is to be done.
        others: what goes on meanwhile. When ``main`` has ended, also badly, they are cancelled.
        stop: asks them to end by themselves instead, and is waited for: for tasks that must finish what they were
            given. Idempotent.
        on_failure: called at the first failure, before anything is cancelled: lets tasks go that wait in a thread,
            where no cancellation reaches them. Idempotent.

    Raises:
        FusemigError: what the first to fail raised; also if all of it was cancelled while the others came to an end.

    Cancellation: all are cancelled.
    """
    await _run(main, others, stop, on_failure, ends_with_main=True)


async def run_all(main: Task, *others: Task, on_failure: Callable[[], None] = _nothing) -> None:
    """Run tasks until all have ended; otherwise as `run_beside`."""
    await _run(main, others, None, on_failure, ends_with_main=False)


async def _run(
    main: Task,
    others: Sequence[Task],
    stop: Callable[[], None] | None,
    on_failure: Callable[[], None],
    *,
    ends_with_main: bool,
) -> None:
    failures: list[FusemigError] = []
    main_scope = trio.CancelScope()
    try:
        async with trio.open_nursery() as nursery:
            end_others = nursery.cancel_scope.cancel if stop is None else stop

            async def run(task: Task) -> None:
                try:
                    await task()
                except FusemigError as exc:
                    failures.append(exc)
                    on_failure()
                    main_scope.cancel()
                    end_others()
                except Exception:
                    on_failure()  # a bug cancels the others too, and some end only with this
                    raise

            for other in others:
                nursery.start_soon(run, other)
            with main_scope:
                await run(main)
            if ends_with_main:
                end_others()
    except BaseExceptionGroup as group:
        if not failures or group.split(trio.Cancelled)[1] is not None:
            raise
    if failures:
        raise failures[0]
