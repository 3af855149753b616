"""Pledge: what binds the disks of one migration to what is decided of its group (`fusemig.core.group`)."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from fusemig.core.group import Conduct, Word, conduct
from fusemig.errors import FusemigError, MigrationError, StateError
from fusemig.records.decision import COORDINATOR, DecisionFile

if TYPE_CHECKING:
    from pathlib import Path

    from fusemig.migration.link import NativeLink, Offload

POLL_S: Final = 0.002
"""Between two looks for the decision, while guests' writes wait."""


class Pledge:
    """A source's part in the decision of its group."""

    def __init__(self, path: Path, session: str, offload: Offload) -> None:
        """Be about migration ``session`` of the group ``path``; nothing is looked at."""
        self.path = path
        self._file = DecisionFile(path)
        self._session = session
        self._offload = offload

    async def prepare(self) -> None:
        """Make ready to propose `abort`.

        Raises:
            StateError: the group's directory cannot be written, or is not the one that the coordinator sees.
            MigrationError: something is decided already: the group is not to move any more.
        """
        await self._offload(self._file.lay, Word.ABORT, self._session)
        await self.check()

    async def check(self) -> None:
        """See that this can be decided here, and is not yet.

        Raises:
            StateError: our proposal or the coordinator's is not there: we could decide otherwise than the others.
            MigrationError: something is decided already: then it is not to move, for we have not pledged.
        """
        if await self._offload(self._file.read) is not None:
            raise aborted_error(self.path)
        await self._offload(self._file.check_laid, self._session, COORDINATOR)

    async def decision(self, link: NativeLink, deadline: float) -> Word:
        """Return what is decided; at ``deadline`` (trio's clock), or if the destination is lost, have `abort` be that.

        The caller shields this.

        Raises:
            StateError: it cannot be known.
        """
        decided: list[Word] = []

        async def hear(scope: trio.CancelScope) -> None:
            with suppress(FusemigError):
                await link.hear_abort()
            scope.cancel()

        async def look(scope: trio.CancelScope) -> None:
            while True:
                try:
                    word = await self._offload(self._file.read)
                except StateError:
                    word = None  # perhaps the next time
                if word is not None and conduct(word, is_overdue=False) is not Conduct.WAIT:
                    decided.append(word)
                    scope.cancel()
                await trio.sleep(POLL_S)

        with trio.move_on_at(deadline):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hear, nursery.cancel_scope)
                nursery.start_soon(look, nursery.cancel_scope)
        if decided:
            return decided[0]
        word: Word = await self._offload(self._file.propose, self._session)
        return word

    async def forget(self) -> None:
        """Leave nothing in the directory but what others may need."""
        with trio.CancelScope(shield=True):
            await self._offload(self._file.forget, self._session)


def aborted_error(path: Path) -> MigrationError:
    """Return what a migration ends with whose group does not move."""
    return MigrationError(
        f"the group {path.name} was called off, so its disks stay, these too: see what became of its other daemons, "
        "then migrate the group again"
    )
