"""Reconnection: whether a connection that was lost is made again, and when.

Another one is made, with pauses that grow, until there was no progress for as long as the parameters allow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog
import trio

from fusemig.core.backoff import Backoff
from fusemig.core.phase import SENDING, MigrationPhase
from fusemig.errors import (
    AuthenticationError,
    ConnectionLostError,
    PeerBusyError,
    RemoteProtocolError,
    TransportError,
)

if TYPE_CHECKING:
    from fusemig.errors import FusemigError
    from fusemig.migration.stats import MigrationParameters

FIRST_RETRY_S: Final = 0.25
MAX_RETRY_S: Final = 10.0
"""How long a try to get a lost connection back is put off."""
MAX_LOST_SWITCHOVERS: Final = 3
"""Connections that may be lost while guests' writes wait: each costs the guests a pause."""

CONNECTION_ERRORS: Final = (TransportError, PeerBusyError, RemoteProtocolError)
"""What another connection may be free of. Once bytes came damaged, nothing that follows them can be told from garbage:
what was sent and is not known to be durable is sent again, over a connection that begins anew."""

log = structlog.get_logger(__name__)


class Reconnection:
    """Of one migration; knows no connection, but what became of them."""

    def __init__(self, parameters: MigrationParameters, *, n_reconnects: int = 0, waiting: str = "") -> None:
        """Begin without a connection.

        Args:
            parameters: say how long to try.
            n_reconnects: how often it came back before, in another daemon.
            waiting: why there is none now; "" for a migration that begins.
        """
        self._parameters = parameters
        self.n_reconnects = n_reconnects
        """How often the connection was lost and made again."""
        self.waiting = waiting
        """Why there is none at the moment; "": there is one, or there never was."""
        self._was_connected = False
        self._n_lost_switchovers = 0
        self._stalled_since: float | None = None
        self._backoff = Backoff(FIRST_RETRY_S, MAX_RETRY_S)

    # What became of a connection

    def note_connected(self) -> None:
        """Somebody is at the address."""
        self._was_connected = True

    def note_agreed(self) -> None:
        """Both ends know what is to be sent over it: the migration goes on."""
        if self.waiting:
            self.waiting = ""
            self.n_reconnects += 1

    def note_progress(self) -> None:
        """Something arrived: the time without progress begins anew."""
        self._stalled_since = None

    def note_lost_switchover(self) -> None:
        """It was lost while guests' writes waited."""
        self._n_lost_switchovers += 1

    # The next one

    def may_follow(
        self, failure: FusemigError, phase: MigrationPhase, *, may_thaw: bool, can_resume: bool, is_resumed: bool
    ) -> bool:
        """Tell whether another connection is to be tried after a failure in this phase.

        Args:
            failure: what ended the last one, or the try to make one.
            phase: of the migration.
            may_thaw: the disks are still ours.
            can_resume: the destination keeps account of what it has.
            is_resumed: what is gone on with was begun before.
        """
        if not isinstance(failure, CONNECTION_ERRORS) or self._parameters.reconnect_limit_s <= 0:
            return False
        if phase is MigrationPhase.SETUP:
            return self._may_begin_again(failure, is_resumed=is_resumed)
        if phase is MigrationPhase.FROZEN:
            return can_resume and may_thaw and self._n_lost_switchovers < MAX_LOST_SWITCHOVERS
        return phase in SENDING and can_resume

    def _may_begin_again(self, failure: FusemigError, *, is_resumed: bool) -> bool:
        """Tell whether to try again what has not got as far as sending: not an address where nobody ever was."""
        if isinstance(failure, AuthenticationError | RemoteProtocolError):
            return False
        if isinstance(failure, PeerBusyError):
            # It may not have noticed yet that the connection which is gone on with is gone.
            return is_resumed or bool(self.waiting)
        return self._was_connected or bool(self.waiting)

    async def put_off(self, failure: FusemigError) -> None:
        """Wait before the next try.

        Raises:
            ConnectionLostError: there was no progress for too long.
            AuthenticationError: because one side was not accepted any more.
        """
        now, limit_s = trio.current_time(), self._parameters.reconnect_limit_s
        if self._stalled_since is None:
            self._stalled_since = now
            self._backoff.reset()
        delay_s = self._backoff.next_s()
        if now + delay_s > self._stalled_since + limit_s:
            if isinstance(failure, AuthenticationError):
                raise failure  # and no link can be seen to
            raise ConnectionLostError(
                f"{failure}; for {limit_s:g} s nothing could be sent: see to the link and the destination, then go on"
                " with `fusemig migrate --resume`"
            ) from failure
        self.waiting = str(failure)
        log.warning("connection lost, trying again", reason=str(failure), delay_s=delay_s)
        await trio.sleep(delay_s)
