"""Dialer: connects to destinations, each in the way in which its migration was told to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from fusemig.net.credentials import Endpoint, load_credentials
from fusemig.net.transport import connect, parse_uri

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fusemig.daemon.security import Security
    from fusemig.net.transport import ByteStream, SocketStream, Uri
    from fusemig.records.epoch import EpochRecord

    Secure = Callable[[SocketStream], Awaitable[ByteStream]]
    """Makes a connection fit to be used (`Security.outgoing`)."""

CONNECT_DEADLINE_S: Final = 10.0


class Dialer:
    """Remembers how the destinations of this process's migrations are talked to."""

    def __init__(self, security: Security) -> None:
        """Know no destination; ``security`` decides how one may be talked to."""
        self._security = security
        self._secured: dict[Uri, Secure] = {}

    def remember(self, uri: Uri, secure: Secure) -> None:
        """Have connections to ``uri`` made fit by ``secure`` from now on."""
        self._secured[uri] = secure

    async def connect(self, uri: Uri) -> ByteStream:
        """Connect to a destination that is remembered.

        Raises:
            FusemigError: there is no connection.
        """
        return await self._secured[uri](await connect(uri, CONNECT_DEADLINE_S))

    async def dial(self, record: EpochRecord) -> ByteStream:
        """Connect as the migration of this record did: as is known of it, or as it left behind before a restart.

        Raises:
            FusemigError: there is no connection, or not by the rules as they are now.
        """
        uri = parse_uri(record.peer)
        if uri not in self._secured:
            given = None
            if record.tls_creds:
                given = await trio.to_thread.run_sync(load_credentials, Path(record.tls_creds), Endpoint.CLIENT)
            self.remember(uri, self._security.outgoing(uri, given, record.tls_hostname, is_insecure=record.is_insecure))
        return await self.connect(uri)

    async def try_out(self, uri: Uri) -> ByteStream:
        """Connect by the rules as they are now, with no migration to be; raises as `dial` does."""
        secure = self._security.outgoing(uri)
        return await secure(await connect(uri, CONNECT_DEADLINE_S))
