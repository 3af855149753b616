"""The HTTP server over real sockets: pages, actions, streams, refusals, and clients who mean ill or nothing."""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager, suppress
from http import HTTPStatus
from typing import TYPE_CHECKING

import pytest
import trio

from fusemig.net import http_server
from fusemig.net.http_server import Answer, Site, serve_http
from fusemig.net.listener import listening
from fusemig.net.transport import parse_uri

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from fusemig.net.http_server import Request

DEADLINE_S = 20.0
TOO_LARGE = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


def _echo(request: Request) -> Answer:
    return Answer(f"you take {request.headers.get('accept', '')}\n".encode(), "text/plain")


def _break(_request: Request) -> Answer:
    raise ValueError("a bug")


async def _act(_request: Request) -> Answer:
    await trio.lowlevel.checkpoint()
    return Answer(b"done", "text/plain")


class Ticker:
    """A stream that says what it is told, and who listens."""

    def __init__(self) -> None:
        self.n_listening = 0
        self.event = b"data: 1\n\n"

    @contextmanager
    def watching(self) -> Iterator[Callable[[], Awaitable[bytes]]]:
        async def next_event() -> bytes:
            await trio.sleep(0.001)
            return self.event

        self.n_listening += 1
        try:
            yield next_event
        finally:
            self.n_listening -= 1


@asynccontextmanager
async def serving(ticker: Ticker | None = None, *, has_any_name: bool = False) -> AsyncIterator[int]:
    """Serve two pages, an action and a stream; give the port."""
    site = Site(
        pages={"/page": _echo, "/bug": _break},
        actions={"/act": _act},
        streams={"/events": (ticker or Ticker()).watching},
        entrance="/page",
        has_any_name=has_any_name,
    )
    with trio.fail_after(DEADLINE_S):
        async with listening(parse_uri("tcp:127.0.0.1:0")) as listener, trio.open_nursery() as nursery:
            nursery.start_soon(serve_http, listener, site)
            yield listener.uri.port
            nursery.cancel_scope.cancel()


async def ask(port: int, request: bytes) -> tuple[int, bytes, bytes]:
    """Send a request; return status, head and body of all that comes until the end."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(request)
        data = b"".join([chunk async for chunk in stream])
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, head, body


async def test_a_page_is_made_for_whoever_asks() -> None:
    """Type, length, no caching, and the end of the connection; the query is no part of the path."""
    async with serving() as port:
        status, head, body = await ask(port, b"GET /page?a=1 HTTP/1.1\r\nHost: localhost\r\nAccept: this\r\n\r\n")
    assert status == HTTPStatus.OK
    assert body == b"you take this\n"
    assert f"content-length: {len(body)}".encode() in head.lower()
    assert b"connection: close" in head.lower()
    assert b"cache-control: no-store" in head.lower()


async def test_head_has_no_body() -> None:
    """The length is the page's all the same."""
    async with serving() as port:
        status, head, body = await ask(port, b"HEAD /page HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (status, body) == (HTTPStatus.OK, b"")
    assert b"content-length: 10" in head.lower()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /none HTTP/1.1\r\nHost: localhost\r\n\r\n", HTTPStatus.NOT_FOUND),
        (b"POST /page HTTP/1.1\r\nHost: localhost\r\n\r\n", HTTPStatus.METHOD_NOT_ALLOWED),
        (b"GET /page HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", TOO_LARGE),
        (b"GET /bug HTTP/1.1\r\nHost: localhost\r\n\r\n", HTTPStatus.INTERNAL_SERVER_ERROR),
        (b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nhi", TOO_LARGE),
        (b"POST /act HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", TOO_LARGE),
        (b"GET /act HTTP/1.1\r\nHost: localhost\r\n\r\n", HTTPStatus.METHOD_NOT_ALLOWED),
        (b"POST /events HTTP/1.1\r\nHost: localhost\r\n\r\n", HTTPStatus.METHOD_NOT_ALLOWED),
        (b"OPTIONS /act HTTP/1.1\r\nHost: localhost\r\n\r\n", HTTPStatus.METHOD_NOT_ALLOWED),
        (b"GET /page HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\n\r\n", HTTPStatus.FORBIDDEN),
        (b"GET /events HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\n\r\n", HTTPStatus.FORBIDDEN),
        (b"POST /act HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\n\r\n", HTTPStatus.FORBIDDEN),
        (b"GET //[ HTTP/1.1\r\nHost: localhost\r\n\r\n", HTTPStatus.BAD_REQUEST),
        (b"GET /page HTTP/1.1\r\nHost: localhost\r\nHost: y\r\n\r\n", HTTPStatus.BAD_REQUEST),
        (b"GET /page HTTP/1.1\r\n\r\n", HTTPStatus.BAD_REQUEST),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", HTTPStatus.BAD_REQUEST),
    ],
)
async def test_what_is_not_served_is_refused_and_the_next_one_is_answered(request_: bytes, status: HTTPStatus) -> None:
    """Each refusal is a status of HTTP, and costs nobody else anything."""
    async with serving() as port:
        got, _, body = await ask(port, request_)
        assert got == status, body
        assert (await ask(port, b"GET /page HTTP/1.1\r\nHost: localhost\r\n\r\n"))[0] == HTTPStatus.OK


NAMED_BY_A_STRANGER = b"Host: evil.example\r\n"
ASKED_BY_A_PAGE = b"Host: localhost\r\nOrigin: http://evil.example\r\n"
ASKED_BY_A_LINK = b"Host: localhost\r\nSec-Fetch-Site: cross-site\r\n"


@pytest.mark.parametrize(
    ("asked", "has_any_name", "status"),
    [
        (b"GET /page", False, HTTPStatus.MISDIRECTED_REQUEST),
        (b"GET /events", False, HTTPStatus.MISDIRECTED_REQUEST),
        (b"POST /act", False, HTTPStatus.MISDIRECTED_REQUEST),
        (b"GET /none", False, HTTPStatus.MISDIRECTED_REQUEST),
        (b"GET /page", True, HTTPStatus.OK),
    ],
)
async def test_a_name_that_is_anybodys_is_answered_only_where_anybody_may_read(
    asked: bytes, has_any_name: bool, status: HTTPStatus
) -> None:
    """A page that has its own name lead here (DNS rebinding) is of the same origin to a browser, and reads all."""
    async with serving(has_any_name=has_any_name) as port:
        assert (await ask(port, asked + b" HTTP/1.1\r\n" + NAMED_BY_A_STRANGER + b"\r\n"))[0] == status
        for name in (b"127.0.0.1:1", b"[::1]", b"LOCALHOST"):
            assert (await ask(port, b"GET /page HTTP/1.1\r\nHost: " + name + b"\r\n\r\n"))[0] == HTTPStatus.OK


@pytest.mark.parametrize("has_any_name", [False, True])
async def test_another_page_has_nothing_fetched(has_any_name: bool) -> None:
    """It may lead to the entrance, by which it reads nothing."""
    async with serving(has_any_name=has_any_name) as port:
        for path, header, status in (
            (b"/page", ASKED_BY_A_PAGE, HTTPStatus.FORBIDDEN),
            (b"/events", ASKED_BY_A_LINK, HTTPStatus.FORBIDDEN),
            (b"/page", ASKED_BY_A_LINK, HTTPStatus.OK),
        ):
            assert (await ask(port, b"GET " + path + b" HTTP/1.1\r\n" + header + b"\r\n"))[0] == status


async def test_a_head_without_end_is_not_kept() -> None:
    """The connection ends while it still comes: memory for a head is bounded."""
    async with serving() as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await stream.send_all(b"a" * 4096)
        assert (await ask(port, b"GET /page HTTP/1.1\r\nHost: localhost\r\n\r\n"))[0] == HTTPStatus.OK


async def test_who_says_nothing_is_shown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent client, and one that stops in its request, lose their places."""
    monkeypatch.setattr(http_server, "EXCHANGE_S", 0.05)
    async with serving() as port:
        for begin in (b"", b"GET /page HT"):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            async with stream:
                with suppress(trio.BrokenResourceError):  # shown out before it had begun
                    if begin:
                        await stream.send_all(begin)
                    assert await stream.receive_some() == b""


async def test_silent_clients_keep_nobody_out() -> None:
    """More of them than there are places, and a page is still answered."""
    async with serving() as port:
        silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(12)]
        assert (await ask(port, b"GET /page HTTP/1.1\r\nHost: localhost\r\n\r\n"))[0] == HTTPStatus.OK
        for stream in silent:
            await stream.aclose()


async def test_an_action_is_done_when_it_is_posted() -> None:
    """With or without a length of 0."""
    async with serving() as port:
        for length in (b"", b"Content-Length: 0\r\n"):
            status, _, body = await ask(port, b"POST /act HTTP/1.1\r\nHost: localhost\r\n" + length + b"\r\n")
            assert (status, body) == (HTTPStatus.OK, b"done")


async def _open_stream(port: int) -> tuple[trio.SocketStream, bytes]:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    data = b""
    while b"\r\n\r\n" not in data:
        got = await stream.receive_some()
        assert got
        data += got
    return stream, data


async def test_a_stream_sends_events_until_its_client_goes() -> None:
    """It outlasts the deadline of an exchange, keeps no place of those who come, and its end is noticed."""
    ticker = Ticker()
    async with serving(ticker) as port:
        stream, data = await _open_stream(port)
        assert b"text/event-stream" in data
        while data.count(b"data: 1") < 5:
            data += await stream.receive_some()
        assert ticker.n_listening == 1
        await stream.aclose()
        while ticker.n_listening:
            await trio.sleep(0.001)
        status, head, _ = await ask(port, b"HEAD /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (status, b"text/event-stream" in head) == (HTTPStatus.OK, True)


async def test_there_are_so_many_streams_and_no_more() -> None:
    """The next one is told so, pages are still answered, and a place that is given back can be had."""
    async with serving() as port:
        streams = [(await _open_stream(port))[0] for _ in range(http_server.MAX_STREAMS)]
        status, _, body = await ask(port, b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (status, b"watching" in body) == (HTTPStatus.SERVICE_UNAVAILABLE, True)
        assert (await ask(port, b"GET /page HTTP/1.1\r\nHost: localhost\r\n\r\n"))[0] == HTTPStatus.OK
        await streams.pop().aclose()
        while True:
            stream, head = await _open_stream(port)
            streams.append(stream)
            if b" 200 " in head:
                break
        for stream in streams:
            await stream.aclose()


async def test_a_client_that_takes_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser that stops reading costs one event, for a bounded time, and then its place is free."""
    ticker = Ticker()
    async with serving(ticker) as port:
        stream, _ = await _open_stream(port)
        while not ticker.n_listening:
            await trio.sleep(0.001)
        monkeypatch.setattr(http_server, "EXCHANGE_S", 0.05)
        ticker.event = b"data: " + b"x" * (1 << 24) + b"\n\n"
        while ticker.n_listening:
            await trio.sleep(0.01)
        monkeypatch.undo()
        await stream.aclose()
        ticker.event = b"data: 1\n\n"
        assert (await ask(port, b"GET /page HTTP/1.1\r\nHost: localhost\r\n\r\n"))[0] == HTTPStatus.OK
