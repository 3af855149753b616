"""DecisionFile: what is decided of a group of migrations, in a file that can be made once (`fusemig.core.group`).

    DIR/GROUP.decision         `commit` or `abort`: made by link(2), so the first to make it has decided
    DIR/GROUP.WHO.proposal     what WHO, a source or the coordinator, can propose, durable before it may have to

Rules:

1. Whoever finds a decision makes it durable, its name too, before he acts on it.
2. A proposal is laid first and only linked later, so that deciding needs no room for data; and who has none *there*
   decides nothing. A directory that stands at DIR because its file system is not mounted is not taken for an undecided
   group.
3. Nothing is concluded from what cannot be read.

Calls sleep. `StateError` says that nothing is known.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

from fusemig.core.group import Word
from fusemig.disk.raw import file_system_of
from fusemig.errors import ConfigError, StateError
from fusemig.failpoint import reach
from fusemig.records.epoch import sync_directory

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,100}")
_VOLATILE: Final = frozenset({"tmpfs", "ramfs"})
COORDINATOR: Final = "coordinator"
"""Who it is that lays the proposal to commit."""


class DecisionFile:
    """The decision of one group."""

    def __init__(self, path: Path) -> None:
        """Be about the group DIR/GROUP; nothing is looked at."""
        self.path = path
        self._decision = path.with_name(f"{path.name}.decision")

    def check(self, beside: Iterable[Path] = ()) -> None:
        """See that a group can be decided there.

        Args:
            beside: directories whose records will rest on the decision.

        Raises:
            ConfigError: it cannot, and why.
        """
        directory = self.path.parent
        if not self.path.is_absolute() or not _NAME.fullmatch(self.path.name):
            raise ConfigError(f"'{self.path}' does not name a group: write an absolute DIR/NAME of letters and digits")
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                device, kind = os.fstat(fd).st_dev, file_system_of(fd)
            finally:
                os.close(fd)
            is_elsewhere = any(os.stat(place).st_dev != device for place in beside)
        except OSError as exc:
            raise ConfigError(
                f"the group's directory {directory}: {exc.strerror}; name one on this host that every daemon can write"
            ) from exc
        if kind in _VOLATILE and is_elsewhere:
            raise ConfigError(
                f"the group's directory {directory} is on {kind}, which a power loss empties, and not the disks' "
                "records: name a directory on a disk"
            )

    def lay(self, word: Word, who: str) -> None:
        """Make durable what ``who`` may propose.

        Raises:
            StateError: it cannot be written.
        """
        proposal = self._proposal(who)
        try:
            with proposal.open("w", encoding="ascii") as file:
                # The decision is this file under another name, and whoever loses has to read it, whatever our umask.
                os.fchmod(file.fileno(), 0o644)
                file.write(f"{word.value}\n")
                file.flush()
                os.fsync(file.fileno())
            sync_directory(proposal.parent)
        except OSError as exc:
            raise StateError(
                f"cannot write the group's file {proposal}: {exc.strerror}; see that every daemon can write there"
            ) from exc

    def check_laid(self, *whose: str) -> None:
        """See that these have laid their proposals here: then the directory is theirs, too, and still in its place.

        Raises:
            StateError: one is missing.
        """
        for who in whose:
            proposal = self._proposal(who)
            if not proposal.is_file():
                raise StateError(
                    f"the group's file {proposal} is not there: every daemon and `fusemig migrate --group` must see the"
                    " same directory under that name (a container, a private /tmp, a mount that is away show another)"
                )

    def read(self) -> Word | None:
        """Return what is decided, durably; None if nothing is, as far as the directory there tells.

        Raises:
            StateError: it cannot be read.
        """
        try:
            fd = os.open(self._decision, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                content = os.read(fd, 16)
                os.fsync(fd)
            finally:
                os.close(fd)
            sync_directory(self._decision.parent)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise self._unreadable(exc.strerror) from exc
        for word in Word:
            if content == f"{word.value}\n".encode():
                return word
        raise self._unreadable("it holds neither 'commit' nor 'abort'")

    def propose(self, who: str) -> Word:
        """Propose what ``who`` has laid there; return what is decided, which may be what another proposed.

        Raises:
            StateError: that cannot be known.
        """
        word = self.read()
        if word is None:
            try:
                os.link(self._proposal(who), self._decision)
            except FileExistsError:
                pass
            except OSError as exc:
                raise self._unreadable(f"nothing can be decided there: {exc.strerror}") from exc
            reach("after-proposal")
            word = self.read()
        if word is None:
            raise self._unreadable("it was removed")
        return word

    def forget(self, who: str) -> None:
        """Take back what ``who`` may propose: he needs nothing decided any more. What cannot be removed stays."""
        _remove(self._proposal(who))

    def remove(self) -> None:
        """Remove the decision, which nobody needs any more. What cannot be removed stays."""
        _remove(self._decision)

    def _proposal(self, who: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{who}.proposal")

    def _unreadable(self, reason: str | None) -> StateError:
        return StateError(f"what is decided of the group is not known: {self._decision}: {reason}")


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # a few bytes that nobody reads again
