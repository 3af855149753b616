"""``fusemig top``: daemons in a terminal, live, or once where there is no terminal.

The screen and the keyboard are given back on every way out but SIGKILL. Signals of the keyboard are off meanwhile, so
Ctrl-C and Ctrl-Z are keys like others: the one quits, the other cannot leave a screen behind that nobody redraws.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import termios
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio
from rich.console import Console
from rich.live import Live

from fusemig.cli.top_picture import ASCII, UNICODE, Watched, cells_wanted, picture
from fusemig.control_client import open_control
from fusemig.errors import FusemigError, RemoteProtocolError
from fusemig.qmp.schema import View

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fusemig.control_client import ControlClient

AGAIN_S: Final = 1.0
"""How long to wait before a daemon that is away is tried again."""
ONCE_HEIGHT: Final = 24
_QUITTING: Final = frozenset(b"qQ\x03\x04")


@dataclass(frozen=True)
class TopRequest:
    """The options of ``fusemig top``."""

    sockets: tuple[Path, ...]
    interval: float
    once: bool
    as_json: bool


async def top_command(request: TopRequest) -> None:
    """Show daemons until `q`, or once."""
    console = Console(highlight=False, soft_wrap=True)
    if request.once or request.as_json or not console.is_terminal or console.is_dumb_terminal:
        await _show_once(request, console)
        return
    await _Screen(request, console).run()


async def _show_once(request: TopRequest, console: Console) -> None:
    """Show what answers; of those that do not, the first error is the command's."""
    watched = [Watched(path) for path in request.sockets]
    first_error: FusemigError | None = None
    for one in watched:
        try:
            async with open_control(one.path) as control:
                raw = await _ask(control, cells_wanted(console.width, ONCE_HEIGHT, watched))
        except FusemigError as exc:
            first_error = first_error or exc
            continue
        if request.as_json:
            print(json.dumps({"socket": str(one.path), **raw}), flush=True)
        one.take(_decoded(raw))
    shown = [one for one in watched if one.view is not None]
    if shown and not request.as_json:
        console.print(picture(shown, console.width, None, UNICODE if _is_unicode(console) else ASCII))
    if first_error is not None:
        raise first_error


async def _ask(control: ControlClient, cells: int) -> dict[str, Any]:
    raw: dict[str, Any] = await control.execute("x-fusemig-query-view", {"cells": cells})
    return raw


def _decoded(raw: dict[str, Any]) -> View:
    try:
        return msgspec.convert(raw, View)
    except msgspec.ValidationError as exc:
        raise RemoteProtocolError(f"the daemon's view is not understood: {exc}; is it another version?") from exc


def _is_unicode(console: Console) -> bool:
    return console.encoding.lower().replace("-", "") == "utf8"


class _Screen:
    """The live view."""

    def __init__(self, request: TopRequest, console: Console) -> None:
        self._interval_s = request.interval
        self._console = console
        self._signs = UNICODE if _is_unicode(console) else ASCII
        self._watched = [Watched(path) for path in request.sockets]
        self._news = trio.Event()

    async def run(self) -> None:
        with (
            _keyboard(sys.stdin.fileno()) as keyboard,
            trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH) as signals,
            Live(console=self._console, screen=True, auto_refresh=False) as live,
        ):
            async with trio.open_nursery() as nursery:
                for one in self._watched:
                    nursery.start_soon(self._watch, one)
                if keyboard is not None:
                    nursery.start_soon(_wait_quit, keyboard, nursery.cancel_scope)
                nursery.start_soon(self._draw, live)
                async for number in signals:
                    if number != signal.SIGWINCH:
                        nursery.cancel_scope.cancel()
                    self._news.set()

    async def _watch(self, one: Watched) -> None:
        while True:
            try:
                async with open_control(one.path) as control:
                    while True:
                        size = self._console.size
                        one.take(_decoded(await _ask(control, cells_wanted(size.width, size.height, self._watched))))
                        self._news.set()
                        await trio.sleep(self._interval_s)
            except FusemigError as exc:
                one.problem = str(exc)
                self._news.set()
            await trio.sleep(AGAIN_S)

    async def _draw(self, live: Live) -> None:
        while True:
            size = self._console.size
            live.update(picture(self._watched, size.width, size.height, self._signs), refresh=True)
            await self._news.wait()
            self._news = trio.Event()


@contextmanager
def _keyboard(fd: int) -> Iterator[int | None]:
    """Have keys come at once and unseen, and as keys only; None where there is no keyboard."""
    try:
        before = termios.tcgetattr(fd)
    except termios.error:
        yield None
        return
    now = termios.tcgetattr(fd)
    now[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
    termios.tcsetattr(fd, termios.TCSADRAIN, now)
    try:
        yield fd
    finally:
        with suppress(termios.error):  # the terminal has gone
            termios.tcsetattr(fd, termios.TCSADRAIN, before)


async def _wait_quit(fd: int, scope: trio.CancelScope) -> None:
    while True:
        await trio.lowlevel.wait_readable(fd)
        keys = os.read(fd, 64)
        if not keys or _QUITTING.intersection(keys):
            scope.cancel()
            return
