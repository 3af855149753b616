"""TLS under a byte stream: the handshake, and a thread that encrypts and decrypts.

    migration <─> TlsStream <─ socketpair ─> _Relay (a thread) <─ TLS 1.3 ─> peer

What the migration sees is a socket with all its properties (any thread, partial sends, moments of blocking), because it
is one. OpenSSL's state belongs to the relay's thread alone: it must not be read and written from two threads, and a
record that was begun must be ended before anything else is sent, which no caller of `ByteStream` promises.

The first byte of a connection tells who speaks TLS. There is no STARTTLS and no way back to plain text.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from fusemig.errors import AuthenticationError, ConnectionLostError
from fusemig.net.credentials import names_of
from fusemig.net.transport import SocketStream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fusemig.errors import FusemigError
    from fusemig.net.credentials import Credentials

HANDSHAKE_DEADLINE_S: Final = 10.0
"""For the whole handshake, however the bytes come."""
_BUFFER_BYTES: Final = 256 << 10
_PAIR_BUFFER_BYTES: Final = 1 << 20
_CLOSE_DEADLINE_S: Final = 5.0
"""How long what was sent before the end may take to leave."""
_DISCARD_S: Final = 1.0
_HANDSHAKE_BYTES: Final = 16 << 10
_HANDSHAKE_RECORD: Final = 0x16
_HAS_EXPIRED: Final = 10
"""X509_V_ERR_CERT_HAS_EXPIRED (openssl/x509_vfy.h)."""
_ALERTS: Final = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR", "HANDSHAKE_FAILURE")
"""In the name of an alert that says that our proof was not taken."""

_handshakes = trio.CapacityLimiter(1)
"""Strangers who connect and connect have one core's time, and never the loop's."""


class _Secured:
    """A socket and OpenSSL's state beside it, which never sees the socket: we move its records, many at once."""

    def __init__(self, plain: socket.socket, credentials: Credentials, hostname: str | None) -> None:
        """Take ``plain`` over; without a ``hostname`` we are the server."""
        plain.setblocking(False)
        self.socket = plain
        self.credentials = credentials
        self.received = ssl.MemoryBIO()
        """Records from the peer."""
        self.to_send = ssl.MemoryBIO()
        """Records for the peer."""
        self.state = credentials.context.wrap_bio(
            self.received, self.to_send, server_side=hostname is None, server_hostname=hostname
        )


class TlsStream(SocketStream):
    """A `ByteStream` whose bytes cross the network encrypted, with a peer that has proved who it is."""

    def __init__(self, secured: _Secured, peer: str) -> None:
        """Take ``secured`` over, whose handshake is done."""
        ours, relays = socket.socketpair()
        for end in (ours, relays):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PAIR_BUFFER_BYTES)
        super().__init__(trio.socket.from_stdlib_socket(ours), peer)
        certificate = secured.state.getpeercert() or {}
        self.names = names_of(certificate)
        """The peer's (`names_of`)."""
        self.until = str(certificate.get("notAfter", ""))
        """When the peer's certificate ends, as OpenSSL writes it."""
        self._relay = _Relay(secured, relays, peer)
        self._relay.start()

    def receive_nowait(self, buffer: memoryview) -> int:
        """Receive what is there (`ByteStream.receive_nowait`)."""
        n = super().receive_nowait(buffer)
        if not n and self._relay.failure is not None:
            raise self._relay.failure()
        return n

    def _lost(self, exc: OSError) -> FusemigError:
        return super()._lost(exc) if self._relay.failure is None else self._relay.failure()


class _Relay(threading.Thread):
    """Moves bytes between the migration's socket and the peer's, both ways, until either side is gone."""

    def __init__(self, secured: _Secured, inner: socket.socket, peer: str) -> None:
        super().__init__(name=f"tls {peer}", daemon=True)
        self.failure: Callable[[], FusemigError] | None = None
        """Makes the error that ended the connection; set before the migration can see the end."""
        self._peer = peer
        self._outer = secured.socket
        self._credentials = secured.credentials
        self._inner = inner
        inner.setblocking(False)
        self._state = secured.state
        self._received = secured.received
        self._to_send = secured.to_send
        self._plain = memoryview(bytearray(_BUFFER_BYTES))
        self._cipher = memoryview(bytearray(_BUFFER_BYTES))
        self._unsent = memoryview(b"")
        """Records that OpenSSL has made and the socket has not taken."""
        self._incoming = memoryview(bytearray(_BUFFER_BYTES))
        self._ungiven = self._incoming[:0]
        """Bytes of the peer's that the migration has not taken."""
        self._is_inner_over = False
        """The migration has closed its end, and all that it sent has been sent on."""
        self._is_peer_over = False
        self._closes_at: float | None = None
        """When to give up; set once the migration has closed its end."""
        # What each socket is waited for; set by the steps, anew in each turn.
        self._inner_events = 0
        self._outer_events = 0

    def run(self) -> None:
        try:
            self._run_to_the_end()
        except ssl.SSLError as exc:
            self._fail(exc)
        finally:
            self._close()

    def _run_to_the_end(self) -> None:
        """Run; raises `ssl.SSLError` only."""
        try:
            self._run()
        except ssl.SSLError:
            raise
        except OSError as exc:
            self._hear_out()
            text = f"connection to {self._peer} lost: {exc.strerror or exc}"
            self.failure = lambda: ConnectionLostError(text)

    def _hear_out(self) -> None:
        """Take what the peer said before it reset the connection, and pass it on: it may be why."""
        try:
            while self._take_from_peer() | self._give_to_inner():
                pass
        except ssl.SSLError:
            raise
        except OSError:
            return

    def _run(self) -> None:
        poll = _Poll(self._inner, self._outer)
        while True:
            self._inner_events = self._outer_events = 0
            has_moved = self._send_to_peer()
            has_moved |= self._take_from_peer()
            has_moved |= self._give_to_inner()
            if self._is_inner_over:
                return
            if self._is_peer_over and not self._ungiven:
                return
            if has_moved:
                continue
            left_s = None if self._closes_at is None else self._closes_at - time.monotonic()
            if left_s is not None and left_s <= 0:
                return  # what is left could not be sent in time
            if self._inner in poll.wait({self._inner: self._inner_events, self._outer: self._outer_events}, left_s):
                self._note_inner_over()

    def _send_to_peer(self) -> bool:
        if not self._unsent:
            if not self._to_send.pending and not self._encrypt():
                return False
            self._unsent = memoryview(self._to_send.read())
        try:
            self._unsent = self._unsent[self._outer.send(self._unsent) :]
        except BlockingIOError:
            self._outer_events |= select.POLLOUT
            return False
        return True

    def _encrypt(self) -> bool:
        """Make records of what the migration has sent; return whether there are any."""
        if self._is_inner_over:
            return False
        try:
            n = self._inner.recv_into(self._plain)
        except BlockingIOError:
            self._inner_events |= select.POLLIN
            return False
        except OSError:  # the migration closed its end and left something unread
            n = 0
        if not n:
            self._is_inner_over = True
            self._note_inner_over()
            return False
        done = 0
        while done < n:
            done += self._state.write(self._plain[done:n])  # a record, which is 16 KiB
        return True

    def _take_from_peer(self) -> bool:
        if self._ungiven or self._is_peer_over:
            return False
        if self._decrypt():
            return True
        try:
            n = self._outer.recv_into(self._cipher)
        except BlockingIOError:
            self._outer_events |= select.POLLIN
            return False
        if n:
            self._received.write(self._cipher[:n])
            self._decrypt()
        else:
            # Without TLS's own goodbye, which QEMU leaves out too: both wires have ends of their own.
            self._is_peer_over = True
        return True

    def _decrypt(self) -> bool:
        """Make bytes of the records that came, as far as they are whole; return whether anything came of it."""
        n = 0
        try:
            while n < _BUFFER_BYTES:
                # typeshed knows the read that returns bytes only
                got: int = self._state.read(_BUFFER_BYTES - n, self._incoming[n:])  # type: ignore[assignment]
                if not got:
                    self._is_peer_over = True
                    break
                n += got
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._is_peer_over = True
        self._ungiven = self._incoming[:n]
        return bool(n) or self._is_peer_over

    def _give_to_inner(self) -> bool:
        if not self._ungiven:
            return False
        try:
            self._ungiven = self._ungiven[self._inner.send(self._ungiven) :]
        except BlockingIOError:
            self._inner_events |= select.POLLOUT
            return False
        except OSError:  # the migration has gone and wants nothing more; what it sent last still leaves
            self._ungiven = self._incoming[:0]
        return True

    def _note_inner_over(self) -> None:
        if self._closes_at is None:
            self._closes_at = time.monotonic() + _CLOSE_DEADLINE_S

    def _fail(self, exc: ssl.SSLError) -> None:
        if _is_about_us(exc):
            text = _not_accepted(self._peer, exc, self._credentials)
            self.failure = lambda: AuthenticationError(text)
        else:
            text = f"connection to {self._peer} lost: TLS: {_words(exc)}"
            self.failure = lambda: ConnectionLostError(text)

    def _close(self) -> None:
        with suppress(OSError):
            self._say_goodbye()
        self._outer.close()
        with suppress(OSError):
            # An end that is closed with unread bytes would have the migration see a reset before the bytes it was sent.
            self._inner.shutdown(socket.SHUT_RDWR)
            while self._inner.recv(_BUFFER_BYTES):
                pass
        self._inner.close()

    def _say_goodbye(self) -> None:
        """Send TLS's end, or the alert for what the peer did wrong, if that can be done at once."""
        if not self._unsent:
            with suppress(ssl.SSLError):
                self._state.unwrap()
            self._outer.send(self._to_send.read())


class _Poll:
    """Waits for two sockets; one that has hung up blocks nobody and is left out from then on."""

    def __init__(self, *sockets: socket.socket) -> None:
        self._poll = select.poll()
        self._left = {one.fileno(): one for one in sockets}
        for one in sockets:
            self._poll.register(one, 0)

    def wait(self, events: Mapping[socket.socket, int], timeout_s: float | None) -> list[socket.socket]:
        """Wait for the events; return the sockets that have hung up, each once."""
        for fd, one in self._left.items():
            self._poll.modify(fd, events[one])
        gone = [
            self._left.pop(fd)
            for fd, seen in self._poll.poll(None if timeout_s is None else timeout_s * 1000)
            if seen & (select.POLLHUP | select.POLLERR | select.POLLNVAL)
        ]
        for one in gone:
            self._poll.unregister(one)
        return gone


async def secure_client(
    stream: SocketStream, credentials: Credentials, hostname: str, last_until: str = ""
) -> TlsStream:
    """Prove to the peer who we are, and have it prove that it is ``hostname``; takes ``stream`` over.

    Args:
        stream: a new connection.
        credentials: the client's.
        hostname: what the peer's certificate must say.
        last_until: `TlsStream.until` of the last connection there, for the error: of a certificate that is not taken
            OpenSSL tells nothing.

    Raises:
        AuthenticationError: it did not, or speaks no TLS 1.3.
        ConnectionLostError: it was too slow.
    """
    peer = stream.peer
    try:
        secured = await _shake_hands(stream, credentials, hostname)
    except ssl.SSLCertVerificationError as exc:
        if exc.verify_code == _HAS_EXPIRED:
            raise AuthenticationError(
                f"{peer} did not prove that it is '{hostname}': its certificate has expired"
                f"{last_until and f' on {last_until}'}; renew server-cert.pem there, which needs no restart, then "
                "migrate again (--resume goes on)"
            ) from exc
        raise AuthenticationError(
            f"{peer} did not prove that it is '{hostname}': {exc.verify_message.rstrip('.')}; check ca-cert.pem here "
            "and server-cert.pem there, or name the host in its certificate with --tls-hostname"
        ) from exc
    except ssl.SSLError as exc:
        raise AuthenticationError(_no_tls(peer, exc, credentials)) from exc
    except OSError as exc:
        raise AuthenticationError(
            f"{peer} closed the connection in the TLS handshake: is `fusemig serve --tls-creds DIR` running there?"
        ) from exc
    return TlsStream(secured, peer)


async def secure_server(stream: SocketStream, credentials: Credentials) -> TlsStream:
    """Prove to a peer who we are, and have it prove who it is; takes ``stream`` over.

    Raises:
        AuthenticationError: it did not.
        ConnectionLostError: it was too slow.
    """
    peer = stream.peer
    try:
        secured = await _shake_hands(stream, credentials, None)
    except ssl.SSLCertVerificationError as exc:
        raise AuthenticationError(f"{peer} did not prove who it is: {exc.verify_message}") from exc
    except ssl.SSLError as exc:
        if _is_about_us(exc):
            raise AuthenticationError(_not_accepted(peer, exc, credentials)) from exc
        raise AuthenticationError(f"{peer} and we did not agree on TLS 1.3: {_words(exc)}") from exc
    except OSError as exc:
        raise AuthenticationError(f"{peer} left in the TLS handshake") from exc
    return TlsStream(secured, peer)


async def has_tls_begun(stream: SocketStream) -> bool:
    """Tell from a peer's first byte, which stays unread, whether it speaks TLS.

    Raises:
        ConnectionLostError: it is gone, or said nothing for too long.
    """
    with trio.move_on_after(HANDSHAKE_DEADLINE_S):
        return await stream.peek_byte() == _HANDSHAKE_RECORD
    raise ConnectionLostError(f"{stream.peer} said nothing within {HANDSHAKE_DEADLINE_S:g} s")


async def _shake_hands(stream: SocketStream, credentials: Credentials, hostname: str | None) -> _Secured:
    """Run the handshake, its arithmetic on a thread; on failure the connection is closed."""
    plain = stream.detach()
    try:
        secured = _Secured(plain, credentials, hostname)
        with trio.fail_after(HANDSHAKE_DEADLINE_S):
            try:
                await _shake_hands_until_done(secured)
            except ssl.SSLError:
                await _flush(secured)
                await _discard(plain)  # or the reset of a close with unread bytes overtakes the alert
                raise
    except trio.TooSlowError as exc:
        plain.close()
        raise ConnectionLostError(
            f"{stream.peer} did not end the TLS handshake within {HANDSHAKE_DEADLINE_S:g} s"
        ) from exc
    except BaseException:
        plain.close()
        raise
    return secured


async def _shake_hands_until_done(secured: _Secured) -> None:
    while True:
        try:
            await trio.to_thread.run_sync(secured.state.do_handshake, limiter=_handshakes)
        except ssl.SSLWantReadError:
            await _flush(secured)
            await _fill(secured)
        else:
            await _flush(secured)
            return


async def _flush(secured: _Secured) -> None:
    rest = memoryview(secured.to_send.read())
    while rest:
        try:
            rest = rest[secured.socket.send(rest) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(secured.socket)


async def _fill(secured: _Secured) -> None:
    while True:
        try:
            data = secured.socket.recv(_HANDSHAKE_BYTES)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(secured.socket)
            continue
        if data:
            secured.received.write(data)
        else:
            secured.received.write_eof()
        return


async def _discard(plain: socket.socket) -> None:
    with suppress(OSError), trio.move_on_after(_DISCARD_S):
        plain.shutdown(socket.SHUT_WR)
        while True:
            try:
                if not plain.recv(_HANDSHAKE_BYTES):
                    return
            except BlockingIOError:
                await trio.lowlevel.wait_readable(plain)


def _no_tls(peer: str, exc: ssl.SSLError, credentials: Credentials) -> str:
    if _is_about_us(exc):
        return _not_accepted(peer, exc, credentials)
    return f"no TLS 1.3 with {peer} ({_words(exc)}): is `fusemig serve --tls-creds DIR` running there?"


def _is_about_us(exc: ssl.SSLError) -> bool:
    reason = exc.reason or ""
    return "ALERT" in reason and any(alert in reason for alert in _ALERTS)


def _not_accepted(peer: str, exc: ssl.SSLError, credentials: Credentials) -> str:
    return (
        f"{peer} did not accept our certificate ({_words(exc)}): check {credentials.certificate}, which is valid until "
        f"{credentials.until}, and ca-cert.pem there"
    )


def _words(exc: ssl.SSLError) -> str:
    if isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "it closed the connection"
    return exc.reason.lower().replace("_", " ") if exc.reason else str(exc)
