"""The HTTP server over real sockets: pages, refusals, and clients who mean ill or nothing."""

from __future__ import annotations

from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

import pytest
import trio

from fusemig import http_server
from fusemig.http_server import Answer, serve_http
from fusemig.listener import listening
from fusemig.transport import parse_uri

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DEADLINE_S = 20.0


def _echo(accept: str) -> Answer:
    return Answer(f"you take {accept}\n".encode(), "text/plain")


def _break(_accept: str) -> Answer:
    raise ValueError("a bug")


@asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """Serve two pages; give the port."""
    with trio.fail_after(DEADLINE_S):
        async with listening(parse_uri("tcp:127.0.0.1:0")) as listener, trio.open_nursery() as nursery:
            nursery.start_soon(serve_http, listener, {"/page": _echo, "/bug": _break})
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
        status, head, body = await ask(port, b"GET /page?a=1 HTTP/1.1\r\nHost: x\r\nAccept: this\r\n\r\n")
    assert status == HTTPStatus.OK
    assert body == b"you take this\n"
    assert f"content-length: {len(body)}".encode() in head.lower()
    assert b"connection: close" in head.lower()
    assert b"cache-control: no-store" in head.lower()


async def test_head_has_no_body() -> None:
    """The length is the page's all the same."""
    async with serving() as port:
        status, head, body = await ask(port, b"HEAD /page HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status, body) == (HTTPStatus.OK, b"")
    assert b"content-length: 10" in head.lower()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /none HTTP/1.1\r\nHost: x\r\n\r\n", HTTPStatus.NOT_FOUND),
        (b"POST /page HTTP/1.1\r\nHost: x\r\n\r\n", HTTPStatus.METHOD_NOT_ALLOWED),
        (b"GET /page HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
        (b"GET /bug HTTP/1.1\r\nHost: x\r\n\r\n", HTTPStatus.INTERNAL_SERVER_ERROR),
        (b"GET /page HTTP/1.1\r\n\r\n", HTTPStatus.BAD_REQUEST),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", HTTPStatus.BAD_REQUEST),
    ],
)
async def test_what_is_not_served_is_refused_and_the_next_one_is_answered(request_: bytes, status: HTTPStatus) -> None:
    """Each refusal is a status of HTTP, and costs nobody else anything."""
    async with serving() as port:
        got, _, body = await ask(port, request_)
        assert got == status, body
        assert (await ask(port, b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == HTTPStatus.OK


async def test_a_head_without_end_is_not_kept() -> None:
    """The connection ends while it still comes: memory for a head is bounded."""
    async with serving() as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await stream.send_all(b"a" * 4096)
        assert (await ask(port, b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == HTTPStatus.OK


async def test_who_says_nothing_is_shown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent client, and one that stops in its request, lose their places."""
    monkeypatch.setattr(http_server, "EXCHANGE_S", 0.05)
    async with serving() as port:
        for begin in (b"", b"GET /page HT"):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            async with stream:
                if begin:
                    await stream.send_all(begin)
                assert await stream.receive_some() == b""


async def test_silent_clients_keep_nobody_out() -> None:
    """More of them than there are places, and a page is still answered."""
    async with serving() as port:
        silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(12)]
        assert (await ask(port, b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == HTTPStatus.OK
        for stream in silent:
            await stream.aclose()
