"""What a daemon demands of its peers, and what it shows them.

- Without credentials the bytes stay on this host: UNIX sockets and loopback addresses, unless ``--insecure`` says
  otherwise.
- With credentials every connection is TLS 1.3 and both sides prove who they are; a source must also be on the list of
  who is admitted. An empty list admits nobody.

The command line gives a destination its credentials and its list. QMP gives them as QEMU does: objects
(``tls-creds-x509``, ``authz-simple``, ``authz-list``), named by migration parameters and looked up when needed.

Credentials are read anew for each connection: who renews a certificate restarts nothing. One that has expired ends no
connection that there is, and makes no new one; it keeps no daemon from its guests either.

A successor has guests before it has credentials. Where files are missing then, or half written, it serves its disks,
refuses migrations, in plain text too, and tries again.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
import trio

from fusemig.errors import AuthenticationError, ConfigError, StateError
from fusemig.migration.arrival import turn_away
from fusemig.net.credentials import AccessList, Credentials, Endpoint, Rule, load_own
from fusemig.net.tls import has_tls_begun, secure_client, secure_server
from fusemig.net.transport import is_private

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from fusemig.net.transport import ByteStream, SocketStream, Uri
    from fusemig.qmp.objects import ObjectAdd

_RETRY_S: Final = 2.0
"""How often it is tried to load what could not be loaded."""

log = structlog.get_logger(__name__)


class Security:
    """The rules of one daemon."""

    def __init__(
        self,
        server: Credentials | None = None,
        identities: Sequence[str] = (),
        *,
        client: Credentials | None = None,
        unloaded: Path | None = None,
        is_destination: bool = False,
        is_insecure: bool = False,
    ) -> None:
        """Take what the command line gave.

        Args:
            server: proves this destination; None: QMP's parameters may name others, else it takes plain text.
            identities: the sources that are admitted.
            client: proves this source where nothing else is given; the questions after a restart need it.
            unloaded: where `load` gets both of these from; until it has, nobody is admitted or connected to by them.
            is_destination: whether it needs the server's.
            is_insecure: plain text may cross the network.
        """
        self.is_insecure = is_insecure
        self._unloaded = unloaded
        self._is_destination = is_destination
        self._why_not = ""
        self._server = server
        self._client = client
        self._listed = AccessList(Rule(identity) for identity in identities)
        self._objects: dict[str, Credentials | AccessList] = {}
        self.described: dict[str, ObjectAdd] = {}
        """What the objects were made from, by their names."""
        # The migration parameters; "" where there is none.
        self.tls_creds = ""
        self.tls_hostname = ""
        self.tls_authz = ""

    # Credentials of the command line

    async def load(self) -> None:
        """Load what is still to be loaded, unless it cannot be, which is logged."""
        if self._unloaded is None:
            return
        load = partial(load_own, self._unloaded, is_destination=self._is_destination)
        try:
            self._server, self._client = await trio.to_thread.run_sync(load)
        except (AuthenticationError, OSError) as exc:
            if str(exc) != self._why_not:
                log.error("no migration until the credentials can be loaded", reason=str(exc))
            self._why_not = str(exc)
            return
        if self._why_not:
            log.info("credentials loaded", directory=str(self._unloaded))
        self._unloaded = None

    async def load_later(self) -> None:
        """Try until all is loaded."""
        while self._unloaded is not None:
            await trio.sleep(_RETRY_S)
            await self.load()

    async def _renew(self, credentials: Credentials) -> Credentials:
        """Return credentials as their files are now, for the next connection.

        Raises:
            AuthenticationError: the files cannot be used as they are, or are being replaced at this moment.
        """
        now = await trio.to_thread.run_sync(credentials.renewed)
        if now is not credentials:
            log.info("credentials read anew", certificate=str(now.certificate), until=now.until)
            self._server = now if self._server is credentials else self._server
            self._client = now if self._client is credentials else self._client
            self._objects |= {name: now for name, one in self._objects.items() if one is credentials}
        return now

    def _check_loaded(self) -> None:
        if self._unloaded is not None:
            raise AuthenticationError(f"the credentials in {self._unloaded} are not loaded yet: {self._why_not}")

    # Objects

    def add(self, described: ObjectAdd, value: Credentials | AccessList) -> None:
        """Keep an object under its name, with its description.

        Raises:
            ConfigError: there is one of that name.
        """
        name = described.id
        if name in self._objects:
            raise ConfigError(f"attempt to add duplicate property '{name}' to object (type 'container')")
        self._objects[name] = value
        self.described[name] = described

    def remove(self, name: str) -> None:
        """Forget an object.

        Raises:
            ConfigError: there is none.
            StateError: a migration parameter names it.
        """
        if name not in self._objects:
            raise ConfigError(f"object '{name}' not found")
        if name in (self.tls_creds, self.tls_authz):
            raise StateError(f"object '{name}' is in use, can not be deleted: reset the migration parameter first")
        del self._objects[name], self.described[name]

    def _credentials(self, endpoint: Endpoint) -> Credentials | None:
        if not self.tls_creds:
            return None
        found = self._objects.get(self.tls_creds)
        if not isinstance(found, Credentials):
            raise AuthenticationError(f"No TLS credentials with id '{self.tls_creds}': object-add them first")
        if found.endpoint is not endpoint:
            raise AuthenticationError(
                f"Expected TLS credentials for a {endpoint} endpoint: '{self.tls_creds}' are for a {found.endpoint}"
            )
        return found

    # Sources of connections

    def outgoing(
        self, uri: Uri, given: Credentials | None = None, hostname: str = "", *, is_insecure: bool = False
    ) -> Callable[[SocketStream], Awaitable[ByteStream]]:
        """Return what makes a new connection to ``uri`` fit to be used, by the rules as they are now.

        Args:
            uri: where the connection will lead.
            given: credentials for this migration alone.
            hostname: what the destination's certificate must say; "": the parameter, or else what the URI says.
            is_insecure: plain text may cross the network.

        Raises:
            ConfigError: the bytes would cross the network in plain text, or no host name is given to check.
            AuthenticationError: the parameters name no fitting credentials.
        """
        credentials = given or self._credentials(Endpoint.CLIENT) or self._client
        if credentials is None:
            self._check_loaded()
            may_leave = is_insecure or self.is_insecure
            if not may_leave and not is_private(uri):
                raise ConfigError(_plain_text(uri))

            async def check(stream: SocketStream) -> ByteStream:
                if not may_leave and not stream.is_private:  # a name like localhost that was not
                    await stream.aclose()
                    raise ConfigError(_plain_text(uri))
                return stream

            return check
        expected = hostname or self.tls_hostname or uri.host
        if not expected:
            raise ConfigError(f"{uri} names no host to check the certificate against: add --tls-hostname NAME")
        ours, until = credentials, ""

        async def secure(stream: SocketStream) -> ByteStream:
            nonlocal ours, until
            try:
                ours = await self._renew(ours)
                ours.check_valid(time.time())
            except AuthenticationError:
                await stream.aclose()
                raise
            secured = await secure_client(stream, ours, expected, until)
            until = secured.until
            return secured

        return secure

    # Takers of connections

    @property
    def has_server_credentials(self) -> bool:
        """Whether sources must speak TLS."""
        return self._server is not None or self._unloaded is not None or bool(self.tls_creds)

    def check_listen(self, uri: Uri) -> None:
        """See that nobody could reach ``uri`` who need not prove who he is.

        Raises:
            ConfigError: somebody could.
            AuthenticationError: the parameters name no fitting credentials.
        """
        if self._server or self._unloaded or self._credentials(Endpoint.SERVER):
            if not self._listed.rules and not self.tls_authz:
                log.warning("no source is admitted yet: allow one with --tls-authz IDENTITY", uri=str(uri))
            return
        if not self.is_insecure and not is_private(uri):
            raise ConfigError(
                f"{uri} would take disks in plain text from anybody on the network: add --tls-creds DIR, listen at "
                "tcp:127.0.0.1:PORT or unix:PATH, or say --insecure"
            )

    async def admit(self, stream: SocketStream) -> ByteStream:
        """Return the stream to go on with; the caller closes that one too.

        Raises:
            AuthenticationError: the source did not prove who it is, or may not come; it has been told. Or we cannot
                prove who we are, and it hears nothing, so that it may come again.
            ConnectionLostError: it was too slow, or has gone.
        """
        self._check_loaded()
        credentials = self._server or self._credentials(Endpoint.SERVER)
        if credentials is None:
            if self.is_insecure or stream.is_private:
                return stream
            raise AuthenticationError(f"{stream.peer} came in plain text from another host: serve with --tls-creds DIR")
        if not await has_tls_begun(stream):
            await turn_away(stream, "TLS is required there: migrate with --tls-creds DIR")
            raise AuthenticationError(f"{stream.peer} speaks no TLS")
        credentials = await self._renew(credentials)
        try:
            credentials.check_valid(time.time())
        except AuthenticationError as exc:  # the source is to see for itself: there is no other way to tell it
            log.error("no source will accept this daemon", reason=str(exc))
        secured = await secure_server(stream, credentials)
        identity = secured.names[0] if secured.names else ""
        if not self._admits(secured.names):
            await turn_away(
                secured,
                f"'{identity}' is not admitted there: start that `fusemig serve` with --tls-authz '{identity}'",
            )
            await secured.aclose()
            raise AuthenticationError(f"{stream.peer} is '{identity}', who is not on the list of who is admitted")
        log.info("source admitted", peer=stream.peer, identity=identity)
        return secured

    def _admits(self, names: Sequence[str]) -> bool:
        if self._listed.admits(names):
            return True
        named = self._objects.get(self.tls_authz)
        return isinstance(named, AccessList) and named.admits(names)


def _plain_text(uri: Uri) -> str:
    return (
        f"{uri} is reached over the network, in plain text that anybody there can read and change: add "
        "--tls-creds DIR, go through a tunnel to tcp:127.0.0.1:PORT or unix:PATH, or say --insecure"
    )


def check_address(option: str, uri: Uri, *, is_insecure: bool) -> None:
    """Raise `ConfigError` if other hosts could read what ``option`` serves at ``uri``, and nobody allowed that."""
    if not is_insecure and not is_private(uri):
        raise ConfigError(
            f"{option} {uri} would be answered to anybody on the network: listen at tcp:127.0.0.1:PORT or unix:PATH, "
            f"or say {option}-insecure"
        )
