"""KeptMount: what a data lane leaves of its mount to a successor, and finds of a predecessor's.

The descriptor is kept as soon as the kernel has mounted it, the INIT request before pyfuse3 can answer it. So a mount
without an INIT request has not been answered one: asked to send again, the kernel sends it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn

import structlog

from fusemig.errors import FusemigError, FuseUnavailableError
from fusemig.succession.fdstore import read_memory, write_memory

if TYPE_CHECKING:
    from fusemig.succession.fdstore import FdStore

DEVICE: Final = "fuse"
INIT: Final = "fuse-init"
FIRST_RELEASE: Final = (6, 9)
"""The first kernel that knows FUSE_NOTIFY_RESEND."""

_EX_SOFTWARE: Final = 70

log = structlog.get_logger(__name__)


class KeptMount:
    """The mount of a daemon whose descriptors are kept; of one without a store nothing is, and nothing is adopted."""

    def __init__(self, store: FdStore, *, is_demanded: bool = False) -> None:
        """Take the mount out of what ``store`` inherited.

        Args:
            store: keeps the mount.
            is_demanded: a mount that cannot outlive its daemon is refused, instead of served as an ordinary one.
        """
        self._store = store
        self.is_demanded = is_demanded
        self.device = store.take(DEVICE)
        """The descriptor of the mount to adopt; None if one is to be made."""
        init = store.take(INIT)
        self.init_request = b"" if init is None else read_memory(init)
        """Its INIT request; empty if the kernel has not been answered one."""
        self.is_kept = self.device is not None
        """Whether the mount outlives this daemon."""

    @property
    def is_wanted(self) -> bool:
        """Whether there is anybody to keep a mount."""
        return self._store.is_on

    def keep_device(self, device: int) -> None:
        """Have the descriptor of a new mount outlive us."""
        if self._store.is_on:
            self._store.keep(DEVICE, device)
            self._store.mounted()
            self.is_kept = True

    def keep_init(self, request: bytes, *, can_resend: bool) -> None:
        """Keep the INIT request, before it is answered; or nothing, of a kernel that cannot resend."""
        if not self.is_kept:
            return
        if not can_resend:
            log.warning("this mount ends with this daemon: " + why_not(is_asked=True))
            self.forget()
            return
        memory = write_memory(INIT, request)
        try:
            self._store.keep(INIT, memory)
        finally:
            os.close(memory)

    def check(self) -> None:
        """Raise `FuseUnavailableError` if the mount was to outlive us and cannot."""
        if self.is_demanded and not (self.is_kept and self._store.is_on):
            raise FuseUnavailableError(
                f"--resilient: {why_not(is_asked=True)}; serve without it, or boot Linux 6.9 or later"
            )

    def forget(self) -> None:
        """Have the mount end with us: it is about to be unmounted."""
        if self.is_kept:
            self._store.forget(INIT)
            self._store.forget(DEVICE)
            self.is_kept = False

    def leave(self, error: BaseException) -> None:
        """End this process, if there will be a successor and the end was not asked for; else return.

        To unmount because of an error of ours would take from the guests what a successor can give them. It ends as
        if killed, with everything open, since a lane thread may be anywhere.
        """
        if self.is_kept and self._store.is_on and not self._store.is_ending:
            _leave(error)


def _leave(error: BaseException) -> NoReturn:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, FusemigError):
        log.error("this daemon ends, its mount does not", reason=str(error))
    else:
        log.error("this daemon ends by a bug, its mount does not", exc_info=error)
    os._exit(_EX_SOFTWARE)


def why_not(*, is_asked: bool = False) -> str:
    """Return why a mount cannot outlive its daemon with this kernel; empty if it can, as far as the version tells.

    Args:
        is_asked: the kernel itself was asked, and does not know how, whatever its version is.
    """
    release = os.uname().release
    numbers: list[int] = []
    with suppress(ValueError):
        numbers = [int(part) for part in release.split("-")[0].split(".")[:2]]
    if is_asked or (numbers and tuple(numbers) < FIRST_RELEASE):
        return f"kernel {release} cannot send unanswered requests again (FUSE_NOTIFY_RESEND, Linux 6.9)"
    return ""
