"""Upgrade: the daemon gives its mount to a successor that is started from what is installed now.

    agree    the holder starts a candidate; it reads our state document, or refuses      guests notice nothing
    leave    control clients are told and let go; no more requests are taken;            guests wait
             what was taken is answered; the last word is kept; the process ends

After `agree` nothing can fail that a crash would not survive too, and the end is one: the process ends with everything
open. So what a successor finds is what it finds after a kill, only sooner; what the drain deadline leaves unanswered
is sent again, when this process and its writes are gone. A migration is interrupted, and the successor goes on with it.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Final, NoReturn

import structlog
import trio

from fusemig import __version__
from fusemig.core.phase import MigrationPhase
from fusemig.errors import StateError
from fusemig.fuse.lane_mount import DataLaneMount
from fusemig.handover.agreement import decode_answer
from fusemig.handover.state import MAX_DOCUMENT, encode_state
from fusemig.qmp import schema

if TYPE_CHECKING:
    from fusemig.daemon.daemon import Daemon

ANSWER_DEADLINE_S: Final = 30.0
"""For the start of another interpreter on a busy host."""
DRAIN_DEADLINE_S: Final = 1.0
"""For requests that were taken; guests wait meanwhile."""
_SWITCHING: Final = frozenset({MigrationPhase.FROZEN, MigrationPhase.PLEDGED, MigrationPhase.COMMITTED})
_LOOK_S: Final = 0.01

log = structlog.get_logger(__name__)


class Upgrade:
    """Of one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        """Nothing is agreed."""
        self._daemon = daemon
        self._is_asking = False
        self.is_agreed = False
        """Whether a candidate waits, and the daemon must `leave`."""

    async def agree(self) -> schema.UpgradeInfo:
        """Find a successor; nothing has changed if that fails.

        Raises:
            StateError: there is none that could succeed us now, and why.
        """
        self._check()
        self._is_asking = True
        try:
            answer = decode_answer(await self._ask())
        finally:
            self._is_asking = False
        if answer.refusal:
            raise StateError(
                f"fusemig {answer.version} cannot take over: {answer.refusal}; this daemon, {__version__}, goes on"
            )
        self._check()
        self.is_agreed = True
        log.info("handing over", version=answer.version)
        return schema.UpgradeInfo(running=__version__, installed=answer.version)

    def _check(self) -> None:
        daemon = self._daemon
        if not daemon.store.is_on or not isinstance(daemon.mount, DataLaneMount):
            raise StateError(
                "nobody would start a successor of this daemon: serve with --resilient; to upgrade now, stop the guests"
                " and restart it"
            )
        if not daemon.options.is_resilient:
            raise StateError(
                "systemd starts the successors of this daemon, and asks none beforehand: to upgrade now, kill it "
                "(`systemctl kill --signal=SIGKILL UNIT`), and the installed version goes on"
            )
        if self._is_asking or self.is_agreed:
            raise StateError("an upgrade is under way")
        outgoing = daemon.migrator.migration
        if outgoing is None or outgoing.is_over:
            return
        if outgoing.guest.is_moving:
            raise StateError("a guest moves with the disks: upgrade when that is over, or cancel it")
        if outgoing.wire == "qemu":
            raise StateError("a migration on QEMU's wire could not go on: upgrade when it is over, or cancel it")

    async def _ask(self) -> bytes:
        document = encode_state(self._daemon.inheritance.state())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with trio.socket.from_stdlib_socket(ours) as channel:
            with theirs:
                self._daemon.store.start_candidate(theirs)
            with trio.move_on_after(ANSWER_DEADLINE_S):
                try:
                    await channel.send(document)
                    return await channel.recv(MAX_DOCUMENT)
                except OSError:
                    return b""  # it has ended
        raise StateError(f"the installed fusemig did not answer within {ANSWER_DEADLINE_S:g} s; this daemon goes on")

    async def leave(self) -> NoReturn:
        """End this process for the successor; control clients must be gone."""
        daemon = self._daemon
        mount = daemon.mount
        assert isinstance(mount, DataLaneMount)
        while self._is_switching_over():  # noqa: ASYNC110  (guests wait for that already, and it has deadlines)
            await trio.sleep(_LOOK_S)
        daemon.store.hand_over()
        left_s = time.monotonic()
        if not mount.leave(DRAIN_DEADLINE_S):
            log.warning("a store does not answer: what waits for it is sent to the successor")
        daemon.inheritance.keep_anyhow(left_s=left_s)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def _is_switching_over(self) -> bool:
        outgoing, incoming = self._daemon.migrator.migration, self._daemon.inbound.migration
        return (outgoing is not None and outgoing.phase in _SWITCHING) or (
            incoming is not None and incoming.phase in _SWITCHING
        )
