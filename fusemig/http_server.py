"""A small HTTP/1.1 server for pages that the daemon makes when they are asked for: GET and HEAD, nothing else.

h11 reads and writes the protocol; this module moves the bytes. Rules:

1. One request for each connection, answered with ``Connection: close``: nobody keeps a place.
2. The whole exchange has `EXCHANGE_S` seconds, a request's head `MAX_HEAD_BYTES`; a request with a body is refused. Who
   comes when every place is taken drives out whoever waits longest (`fusemig.listener`).
3. A page that raises is answered 500 and logged; the server goes on.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import h11
import structlog
import trio

from fusemig.errors import ConnectionLostError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fusemig.listener import Connection, Listener
    from fusemig.transport import SocketStream

    Pages = Mapping[str, Callable[[str], "Answer"]]
    """By path, what makes the answer for a client whose ``Accept`` header is the argument, without waiting."""

EXCHANGE_S: Final = 10.0
MAX_HEAD_BYTES: Final = 16 * 1024
_RECEIVE_BYTES: Final = 16 * 1024

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Answer:
    """What a page is at this moment."""

    body: bytes
    content_type: str
    status: HTTPStatus = HTTPStatus.OK


async def serve_http(listener: Listener, pages: Pages) -> None:
    """Answer what comes to ``listener`` from ``pages``, by their paths; runs until cancelled."""

    async def handle(connection: Connection) -> None:
        with trio.move_on_after(EXCHANGE_S):
            with suppress(ConnectionLostError):  # whoever asked has gone
                await _exchange(connection.stream, pages)

    await listener.serve(handle)


async def _exchange(stream: SocketStream, pages: Pages) -> None:
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
    method = b""
    try:
        request = await _receive_request(http, stream)
        if request is None:
            return
        method = request.method
        answer = _answer(request, pages)
    except h11.RemoteProtocolError as exc:
        answer = _refusal(HTTPStatus(exc.error_status_hint), str(exc))
    headers = [
        ("Content-Type", answer.content_type),
        ("Content-Length", str(len(answer.body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Connection", "close"),
    ]
    if answer.status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append(("Allow", "GET, HEAD"))
    reason = answer.status.phrase.encode()
    data = http.send(h11.Response(status_code=answer.status, headers=headers, reason=reason)) or b""
    if method != b"HEAD":
        data += http.send(h11.Data(data=answer.body)) or b""
    await _send(stream, data)


async def _receive_request(http: h11.Connection, stream: SocketStream) -> h11.Request | None:
    """Return the request's head, with nothing after it; None if the client left."""
    buffer = bytearray(_RECEIVE_BYTES)
    while True:
        event = http.next_event()
        if isinstance(event, h11.Request):
            if any(name in (b"content-length", b"transfer-encoding") for name, _ in event.headers):
                raise h11.RemoteProtocolError(
                    "a request with a body", error_status_hint=HTTPStatus.REQUEST_ENTITY_TOO_LARGE
                )
            return event
        if event is not h11.NEED_DATA:
            return None
        try:
            n = stream.receive_nowait(memoryview(buffer))
        except trio.WouldBlock:
            await stream.wait_readable()
            continue
        http.receive_data(bytes(buffer[:n]))


def _answer(request: h11.Request, pages: Pages) -> Answer:
    if request.method not in (b"GET", b"HEAD"):
        return _refusal(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are answered")
    path = urlsplit(request.target.decode("ascii", "replace")).path
    page = pages.get(path)
    if page is None:
        return _refusal(HTTPStatus.NOT_FOUND, f"there is no such page; pages are {', '.join(sorted(pages))}")
    accept = b",".join(value for name, value in request.headers if name == b"accept").decode("ascii", "replace")
    try:
        return page(accept)
    except Exception:
        log.exception("a page could not be made", path=path)
        return _refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "this page could not be made; see the daemon's log")


def _refusal(status: HTTPStatus, text: str) -> Answer:
    return Answer(f"{status.value} {status.phrase}: {text}\n".encode(), "text/plain; charset=utf-8", status)


async def _send(stream: SocketStream, data: bytes) -> None:
    left = memoryview(data)
    while left:
        try:
            left = left[stream.send_nowait([left]) :]
        except trio.WouldBlock:
            await stream.wait_writable()
