"""The web page: a daemon in a browser, live, and a few buttons for who has the token.

    GET  /              the page (`fusemig.pages.live`), whole: it loads nothing else
    GET  /events        a view (`fusemig.daemon.view`) each second, as server-sent events
    GET  /history       `x-fusemig-query-history`, as JSON
    GET  /report        the report of a migration (`fusemig.pages.report`); ?began=MS chooses it
    POST /cancel, /continue, /start-postcopy         with the token; what the QMP command says

Rules:

1. One view a second is made for all who watch, and none while nobody does.
2. Who can connect can look. Who acts shows the token, in ``Authorization: Bearer``, which no page of another origin can
   make a browser send. The token is new with each daemon and lies in a file of mode 0600 beside the control socket.
3. A page of another origin, however it got there, reads nothing (`fusemig.net.http_server`, rule 5).
"""

from __future__ import annotations

import hmac
import os
import secrets
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import structlog
import trio

from fusemig.control.server import Session
from fusemig.daemon.commands import command_table
from fusemig.daemon.view import look
from fusemig.errors import ConfigError, FusemigError
from fusemig.net.http_server import Answer, Site, refusal, serve_http
from fusemig.pages.live import live_page
from fusemig.pages.report import report_page
from fusemig.qmp import codec, schema

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from fusemig.daemon.daemon import Daemon
    from fusemig.net.http_server import Request
    from fusemig.net.listener import Listener
    from fusemig.pages.page import HtmlPage
    from fusemig.qmp.base import Arguments

VIEW_S: Final = 1.0
CELLS: Final = 1024
"""Of a disk at most; the page draws as many."""
ALL_CELLS: Final = 1 << 16
"""Of all disks together, as long as each has `MIN_CELLS`: a view a second is made beside the guests."""
MIN_CELLS: Final = 32
REST: Final = 4.0
"""How many times as long as a view took there is none, at least."""
ACTIONS: Final[dict[str, tuple[str, Arguments]]] = {
    "/cancel": ("migrate_cancel", schema.NoArguments()),
    "/continue": ("migrate-continue", schema.MigrateContinue(state=schema.MigrationStatus.PRE_SWITCHOVER)),
    "/start-postcopy": ("migrate-start-postcopy", schema.NoArguments()),
}
_JSON: Final = "application/json"

log = structlog.get_logger(__name__)


def token_path(control: Path) -> Path:
    """Return where the token lies of a daemon with this control socket."""
    return control.absolute().with_name(control.name + ".web-token")


class Web:
    """The page of one daemon, while the block of a ``with`` runs: that is how long the token's file is there."""

    def __init__(self, daemon: Daemon, listener: Listener) -> None:
        """Serve nothing yet."""
        self._daemon = daemon
        self._listener = listener
        self._commands = command_table(daemon)
        self._token = secrets.token_urlsafe(32)
        self._views = _Views(daemon)
        self._page = live_page()
        self.token_path = token_path(daemon.options.control)

    @property
    def address(self) -> str:
        """Where the page is: for a browser, or a ``unix:`` URI."""
        uri = self._listener.uri
        return str(uri) if uri.kind == "unix" else f"http://{str(uri).removeprefix('tcp:')}/"

    def __enter__(self) -> Self:
        """Write the token's file.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            self.token_path.unlink(missing_ok=True)
            fd = os.open(self.token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(fd, "w", encoding="ascii") as file:
                file.write(self._token + "\n")
        except OSError as exc:
            raise ConfigError(
                f"the token of --web cannot be written to {self.token_path}: {exc.strerror}; put --control elsewhere"
            ) from exc
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove it, unless it is another daemon's by now."""
        with suppress(OSError):
            if self.token_path.read_text(encoding="ascii").strip() == self._token:
                self.token_path.unlink()

    async def run(self) -> None:
        """Serve until cancelled."""
        site = Site(
            pages={"/": lambda _request: _html(self._page), "/history": self._history, "/report": self._report},
            actions=dict.fromkeys(ACTIONS, self._act),
            streams={"/events": self._views.watching},
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._views.run)
            nursery.start_soon(serve_http, self._listener, site)

    def _history(self, _request: Request) -> Answer:
        return Answer(codec.encode_value(self._records()), _JSON)

    def _records(self) -> list[schema.MigrationRecord]:
        return self._daemon.history.records(trio.current_time())

    def _report(self, request: Request) -> Answer:
        began = request.query.get("began", "")
        found = [one for one in self._records() if began in ("", str(one.began))]
        if not found:
            return refusal(HTTPStatus.NOT_FOUND, "no such migration is remembered here")
        return _html(report_page(found[-1]))

    async def _act(self, request: Request) -> Answer:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            log.warning("an action on the web page was refused: a wrong token", action=request.path)
            return refusal(HTTPStatus.UNAUTHORIZED, f"this needs the token that lies in {self.token_path}")
        name, arguments = ACTIONS[request.path]
        log.info("asked for on the web page", command=name)
        try:
            result = self._commands[name].run(Session(0, os.getpid(), os.geteuid()), arguments)
            if result is not None:
                await result
        except FusemigError as exc:
            return refusal(HTTPStatus.CONFLICT, str(exc))
        return Answer(b"{}", _JSON)


def _html(page: HtmlPage) -> Answer:
    headers = (
        ("Content-Security-Policy", page.security_policy),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
    )
    return Answer(page.text.encode(), "text/html; charset=utf-8", headers=headers)


class _Views:
    """Makes views for all who watch."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._n_watching = 0
        self._is_wanted = trio.Event()
        self._number = 0
        self._event = b""
        self._news = trio.Event()

    async def run(self) -> None:
        """Make one each second while somebody watches."""
        while True:
            if not self._n_watching:
                self._event = b""
                self._is_wanted = trio.Event()
                await self._is_wanted.wait()
            try:
                began = trio.current_time()
                n_cells = min(CELLS, max(MIN_CELLS, ALL_CELLS // max(1, len(self._daemon.disks))))
                view = codec.encode_value(await look(self._daemon, n_cells))
            except Exception:
                log.exception("a view could not be made")
            else:
                self._number += 1
                self._event = b"data: %s\n\n" % view
                news, self._news = self._news, trio.Event()
                news.set()
            await trio.sleep(max(VIEW_S, REST * (trio.current_time() - began)))

    @contextmanager
    def watching(self) -> Iterator[Callable[[], Awaitable[bytes]]]:
        """Give what waits for the next view; one that was made since the last is not waited for."""
        seen = self._number if not self._event else self._number - 1

        async def next_event() -> bytes:
            nonlocal seen
            while seen >= self._number:
                await self._news.wait()
            seen = self._number
            return self._event

        self._n_watching += 1
        self._is_wanted.set()
        try:
            yield next_event
        finally:
            self._n_watching -= 1
