"""The web page of a daemon that serves nothing yet: who may look, who may act, and what it costs."""

from __future__ import annotations

import json
import stat
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

import pytest
import trio

from fusemig import view, web
from fusemig.daemon import Daemon
from fusemig.errors import ConfigError
from fusemig.listener import listening
from fusemig.serve_options import ServeOptions
from fusemig.transport import parse_uri
from fusemig.web import Web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fusemig.qmp import schema

DEADLINE_S = 30.0


@asynccontextmanager
async def showing(directory: Path, uri: str = "tcp:127.0.0.1:0") -> AsyncIterator[tuple[Web, int]]:
    """Show a daemon without disks; give the page and its port."""
    daemon = Daemon(ServeOptions(directory / "mnt", (), directory / "control"))
    with trio.fail_after(DEADLINE_S):
        async with listening(parse_uri(uri)) as listener, trio.open_nursery() as nursery:
            with Web(daemon, listener) as page:
                nursery.start_soon(page.run)
                yield page, listener.uri.port
                nursery.cancel_scope.cancel()


async def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    """Ask as a client that says what it is told to; return status, headers and body."""
    lines = {"Host": f"127.0.0.1:{port}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    request = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items() if v) + "\r\n"
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(request.encode())
        data = b"".join([chunk async for chunk in stream])
    head, _, body = data.decode().partition("\r\n\r\n")
    first, *rest = head.split("\r\n")
    return int(first.split()[1]), {k.lower(): v for k, _, v in (line.partition(": ") for line in rest)}, body


async def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    """Its policy forbids every other origin, no address is in it, and no script but its own can run."""
    async with showing(tmp_path) as (_, port):
        status, headers, body = await ask(port, "/")
    assert status == HTTPStatus.OK
    policy = headers["content-security-policy"]
    for part in ("default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"):
        assert part in policy
    assert "unsafe" not in policy
    assert "http:" not in body.replace('"http://" + host', "")
    assert "https:" not in body
    assert body.count("<script>") == body.count("<style>") == 1
    assert "innerHTML" not in body
    assert " style=" not in body
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, HTTPStatus.OK),
        ({"Host": "localhost:1"}, HTTPStatus.OK),
        ({"Host": "LOCALHOST"}, HTTPStatus.OK),
        ({"Host": "[::1]:80"}, HTTPStatus.OK),
        ({"Host": "evil.example"}, HTTPStatus.MISDIRECTED_REQUEST),
        ({"Host": "evil.example:80"}, HTTPStatus.MISDIRECTED_REQUEST),
        ({"Host": "127.0.0.1.evil.example"}, HTTPStatus.MISDIRECTED_REQUEST),
        ({"Host": "localhost.evil.example:1"}, HTTPStatus.MISDIRECTED_REQUEST),
        ({"Host": ":80"}, HTTPStatus.MISDIRECTED_REQUEST),
        ({"Origin": "http://evil.example"}, HTTPStatus.FORBIDDEN),
        ({"Origin": "null"}, HTTPStatus.FORBIDDEN),
        ({"Sec_Fetch_Site": "cross-site"}, HTTPStatus.FORBIDDEN),
        ({"Sec_Fetch_Site": "same-site"}, HTTPStatus.FORBIDDEN),
        ({"Sec_Fetch_Site": "same-origin"}, HTTPStatus.OK),
    ],
)
async def test_no_other_page_can_look(tmp_path: Path, headers: dict[str, str], status: HTTPStatus) -> None:
    """A name that anybody can have lead here (DNS rebinding), and a request that another page made, are refused."""
    async with showing(tmp_path) as (_, port):
        assert (await ask(port, "/history", **headers))[0] == status


async def test_a_link_from_elsewhere_may_lead_to_the_page(tmp_path: Path) -> None:
    """The page itself reads nothing by being opened."""
    async with showing(tmp_path) as (_, port):
        assert (await ask(port, "/", Sec_Fetch_Site="cross-site"))[0] == HTTPStatus.OK
        assert (await ask(port, "/", Host="evil.example"))[0] == HTTPStatus.MISDIRECTED_REQUEST


async def test_who_acts_shows_the_token(tmp_path: Path) -> None:
    """Without it, with another, in the address, or from another page: no; with it QMP's answer, a refusal too."""
    async with showing(tmp_path) as (page, port):
        token = page.token_path.read_text().strip()
        assert stat.S_IMODE(page.token_path.stat().st_mode) == 0o600
        good = f"Bearer {token}"
        for path in web.ACTIONS:
            for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Bearer {token[:-1]}"}):
                status, _, body = await ask(port, path, "POST", **headers)
                assert (status, str(page.token_path) in body) == (HTTPStatus.UNAUTHORIZED, True)
            assert (await ask(port, f"{path}?token={token}", "POST"))[0] == HTTPStatus.UNAUTHORIZED
            assert (await ask(port, path, "GET", Authorization=good))[0] == HTTPStatus.METHOD_NOT_ALLOWED
            foreign = await ask(port, path, "POST", Authorization=good, Origin="http://evil.example")
            assert foreign[0] == HTTPStatus.FORBIDDEN
        status, _, body = await ask(port, "/continue", "POST", Authorization=good)
        assert (status, "not in expected state: none" in body) == (HTTPStatus.CONFLICT, True)
        assert (await ask(port, "/cancel", "POST", Authorization=good))[0] == HTTPStatus.OK  # as in QMP
        assert token not in (await ask(port, "/"))[2]
    assert not page.token_path.exists()


async def test_the_token_is_new_each_time_and_replaces_what_lay_there(tmp_path: Path) -> None:
    """A file that somebody prepared, readable or a link, is not written into; one that cannot be made is said."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (tmp_path / "control.web-token").symlink_to(elsewhere)
    async with showing(tmp_path) as (page, _):
        first = page.token_path.read_text()
    async with showing(tmp_path) as (page, _):
        assert page.token_path.read_text() != first
    assert elsewhere.read_text() == "mine"
    (tmp_path / "control.web-token").mkdir()
    daemon = Daemon(ServeOptions(tmp_path / "mnt", (), tmp_path / "control"))
    async with listening(parse_uri("tcp:127.0.0.1:0")) as listener:
        with pytest.raises(ConfigError, match="cannot be written"), Web(daemon, listener):
            pass


async def test_views_are_made_for_those_who_watch_and_for_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is looked at while nobody watches; all who watch share one view, and a bug costs one of them."""
    monkeypatch.setattr(web, "VIEW_S", 0.01)
    n_made = 0
    make = view.look

    async def look(daemon: Daemon, cells: int) -> schema.View:
        nonlocal n_made
        n_made += 1
        if n_made == 2:
            raise ValueError("a bug")
        return await make(daemon, cells)

    monkeypatch.setattr(web, "look", look)
    async with showing(tmp_path) as (_, port):
        for _ in range(5):
            await ask(port, "/history")
        assert n_made == 0
        streams = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3)]
        received = [b""] * 3
        for stream in streams:
            await stream.send_all(f"GET /events HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode())
        for at, stream in enumerate(streams):
            while received[at].count(b"data: ") < 3:
                received[at] += await stream.receive_some()
        for stream in streams:
            await stream.aclose()
        line = next(line for line in received[0].split(b"\n") if line.startswith(b"data: "))
        seen = json.loads(line.removeprefix(b"data: "))
        assert seen["disks"] == []
        assert seen["status"]["status"] == "postmigrate"
        made = -1
        while made != n_made:  # those who left are noticed with the next view
            made = n_made
            await trio.sleep(0.3)


async def test_a_public_page_is_shown_by_address(tmp_path: Path) -> None:
    """Also where it was said that others may look, a name that is not the one it listens at is nobody's."""
    async with showing(tmp_path, "tcp:0.0.0.0:0") as (_, port):
        assert (await ask(port, "/history", Host="192.0.2.1:80"))[0] == HTTPStatus.OK
        assert (await ask(port, "/history", Host="evil.example"))[0] == HTTPStatus.MISDIRECTED_REQUEST
