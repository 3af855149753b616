"""A small HTTP/1.1 server for what the daemon makes when it is asked for: pages, actions, and streams of events.

    page      GET, HEAD     made at once, without waiting
    action    POST          does something; without a body
    stream    GET           server-sent events (WHATWG HTML, 9.2), until the client goes

h11 reads and writes the protocol; this module moves the bytes. Rules:

1. One request for each connection, answered with ``Connection: close``: nobody keeps a place.
2. The whole exchange has `EXCHANGE_S` seconds, a request's head `MAX_HEAD_BYTES`; a request with a body is refused. Who
   comes when every place is taken drives out whoever waits longest (`fusemig.net.listener`).
3. At most `MAX_STREAMS` streams run at once. A client that does not take an event in `EXCHANGE_S` seconds is dropped;
   one that is slow misses events, and nothing is queued for it.
4. A page that raises is answered 500 and logged; the server goes on.
5. A request is answered only under a name that cannot be somebody else's, an address or ``localhost`` (DNS rebinding),
   and not if a page of another origin made it: what a browser can be made to fetch is for no other page to read.
"""

from __future__ import annotations

import ipaddress
import math
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, urlsplit

import h11
import structlog
import trio

from fusemig.errors import ConnectionLostError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AbstractContextManager

    from fusemig.net.listener import Connection, Listener
    from fusemig.net.transport import SocketStream

    Page = Callable[["Request"], "Answer"]
    Action = Callable[["Request"], Awaitable["Answer"]]
    Stream = Callable[[], AbstractContextManager[Callable[[], Awaitable[bytes]]]]
    """Gives, while somebody listens, what waits for the next event and returns it."""

EXCHANGE_S: Final = 10.0
MAX_HEAD_BYTES: Final = 16 * 1024
MAX_STREAMS: Final = 8
_RECEIVE_BYTES: Final = 16 * 1024
_EVENTS: Final = "text/event-stream"

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Request:
    """What a client asks for."""

    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """By their names in lower case; of several with one name, all, with commas."""


@dataclass(frozen=True)
class Answer:
    """What a client gets."""

    body: bytes
    content_type: str
    status: HTTPStatus = HTTPStatus.OK
    headers: tuple[tuple[str, str], ...] = ()
    """Beside those that every answer has."""


@dataclass(frozen=True)
class Site:
    """What is served, by paths."""

    pages: Mapping[str, Page]
    actions: Mapping[str, Action] = field(default_factory=dict)
    streams: Mapping[str, Stream] = field(default_factory=dict)
    entrance: str = "/"
    """The page that a link on another one may lead to: what follows a link reads nothing."""
    has_any_name: bool = False
    """Whether it is answered under every name, because whoever reaches it may read it."""


async def serve_http(listener: Listener, site: Site) -> None:
    """Answer what comes to ``listener``; runs until cancelled."""
    places = trio.CapacityLimiter(MAX_STREAMS)

    async def handle(connection: Connection) -> None:
        with trio.move_on_after(EXCHANGE_S) as scope:
            with suppress(ConnectionLostError):  # whoever asked has gone
                await _Exchange(site, listener.uri.host, connection, places, scope).run()

    await listener.serve(handle)


def refusal(status: HTTPStatus, text: str) -> Answer:
    """Return an answer that says in one line what is wrong."""
    return Answer(f"{status.value} {status.phrase}: {text}\n".encode(), "text/plain; charset=utf-8", status)


class _Exchange:
    """One connection."""

    def __init__(
        self,
        site: Site,
        listens_at: str,
        connection: Connection,
        places: trio.CapacityLimiter,
        scope: trio.CancelScope,
    ) -> None:
        self._site = site
        self._listens_at = listens_at
        self._connection = connection
        self._stream: SocketStream = connection.stream
        self._places = places
        self._scope = scope
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)

    async def run(self) -> None:
        method = ""
        try:
            head = await self._receive_head()
            if head is None:
                return
            method = head.method.decode("ascii", "replace")
            request = _read(head)
            answer = _refuse_stranger(self._site, request, self._listens_at)
            if answer is None and method == "GET" and request.path in self._site.streams:
                answer = await self._run_stream(self._site.streams[request.path])
                if answer is None:
                    return
            if answer is None:
                answer = await self._answer(method, request)
        except h11.RemoteProtocolError as exc:
            answer = refusal(HTTPStatus(exc.error_status_hint), str(exc))
        data = self._send_head(answer, [("Content-Length", str(len(answer.body)))])
        if method != "HEAD":
            data += self._http.send(h11.Data(data=answer.body)) or b""
        await self._send(data)

    async def _receive_head(self) -> h11.Request | None:
        """Return the request's head, with nothing after it; None if the client left."""
        buffer = bytearray(_RECEIVE_BYTES)
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Request):
                if any(
                    name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
                    for name, value in event.headers
                ):
                    raise h11.RemoteProtocolError(
                        "a request with a body", error_status_hint=HTTPStatus.REQUEST_ENTITY_TOO_LARGE
                    )
                return event
            if event is not h11.NEED_DATA:
                return None
            try:
                n = self._stream.receive_nowait(memoryview(buffer))
            except trio.WouldBlock:
                await self._stream.wait_readable()
                continue
            self._http.receive_data(bytes(buffer[:n]))

    async def _answer(self, method: str, request: Request) -> Answer:
        site = self._site
        allowed = _allowed(site, request.path)
        if not allowed:
            known = ", ".join(sorted({*site.pages, *site.streams, *site.actions}))
            return refusal(HTTPStatus.NOT_FOUND, f"there is no such page; pages are {known}")
        if method not in allowed:
            answer = refusal(HTTPStatus.METHOD_NOT_ALLOWED, f"only {' and '.join(allowed)} are answered here")
            return Answer(answer.body, answer.content_type, answer.status, (("Allow", ", ".join(allowed)),))
        try:
            if method == "POST":
                return await site.actions[request.path](request)
            if request.path in site.streams:
                return Answer(b"", _EVENTS)
            return site.pages[request.path](request)
        except Exception:
            log.exception("a page could not be made", path=request.path)
            return refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "this page could not be made; see the daemon's log")

    async def _run_stream(self, stream: Stream) -> Answer | None:
        """Send events until the client goes; return a refusal where there is no place."""
        try:
            self._places.acquire_nowait()
        except trio.WouldBlock:
            return refusal(
                HTTPStatus.SERVICE_UNAVAILABLE, f"{MAX_STREAMS} others are watching: close one of their pages"
            )
        try:
            self._connection.settle()
            await self._send(self._send_head(Answer(b"", _EVENTS), []))
            with stream() as next_event:
                while True:
                    self._scope.deadline = math.inf
                    event = await next_event()
                    self._scope.deadline = trio.current_time() + EXCHANGE_S
                    await self._send(self._http.send(h11.Data(data=event)) or b"")
        finally:
            self._places.release()

    def _send_head(self, answer: Answer, length: list[tuple[str, str]]) -> bytes:
        headers = [
            ("Content-Type", answer.content_type),
            *length,
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Connection", "close"),
            *answer.headers,
        ]
        reason = answer.status.phrase.encode()
        return self._http.send(h11.Response(status_code=answer.status, headers=headers, reason=reason)) or b""

    async def _send(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[self._stream.send_nowait([left]) :]
            except trio.WouldBlock:
                await self._stream.wait_writable()


def _read(head: h11.Request) -> Request:
    try:
        parts = urlsplit(head.target.decode("ascii", "replace"))
    except ValueError as exc:
        raise h11.RemoteProtocolError("the path is malformed", error_status_hint=HTTPStatus.BAD_REQUEST) from exc
    headers: dict[str, str] = {}
    for raw_name, raw_value in head.headers:
        name, value = raw_name.decode("ascii", "replace"), raw_value.decode("ascii", "replace")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    return Request(parts.path, dict(parse_qsl(parts.query)), headers)


def _refuse_stranger(site: Site, request: Request, listens_at: str) -> Answer | None:
    """Return the refusal of what a page of another origin may have had a browser ask for."""
    host = request.headers.get("host", "")
    if not (site.has_any_name or _is_nobody_elses(host, listens_at)):
        return refusal(
            HTTPStatus.MISDIRECTED_REQUEST,
            "nothing is shown here under that name: come by an address, or as localhost",
        )
    origin = request.headers.get("origin")
    is_foreign = origin is not None and origin not in (f"http://{host}", f"https://{host}")
    maker = request.headers.get("sec-fetch-site", "none")
    if is_foreign or (maker not in ("none", "same-origin") and request.path != site.entrance):
        return refusal(HTTPStatus.FORBIDDEN, "another page asked for this: open the page itself")
    return None


def _is_nobody_elses(host: str, listens_at: str) -> bool:
    """Tell whether a ``Host`` header is a name that no stranger can have lead here."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    name = name.removeprefix("[").removesuffix("]").lower()
    if name in ("localhost", listens_at.lower()) and name:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True  # a browser that goes to an address has asked no name server


def _allowed(site: Site, path: str) -> tuple[str, ...]:
    """Return the methods that a path is answered for; none if there is no such path."""
    if path in site.pages or path in site.streams:
        return ("GET", "HEAD")
    return ("POST",) if path in site.actions else ()
