"""race: wait for the first of several things to end, without a group around an error of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from fusemig.errors import FusemigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def race(*waits: Callable[[], Awaitable[None]]) -> None:
    """Run all until one returns or fails; cancel the others.

    Raises:
        FusemigError: what the first to fail raised, also if another has returned meanwhile.
    """
    errors: list[FusemigError] = []

    async with trio.open_nursery() as nursery:

        async def run(wait: Callable[[], Awaitable[None]]) -> None:
            try:
                await wait()
            except FusemigError as exc:
                errors.append(exc)
            nursery.cancel_scope.cancel()

        for wait in waits:
            nursery.start_soon(run, wait)
    if errors:
        raise errors[0]
