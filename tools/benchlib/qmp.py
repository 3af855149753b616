"""Qmp: a small synchronous QMP client, enough for QEMU's own tools as peers."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from benchlib.measure import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType


class Qmp:
    """One connection; every call is bounded in time."""

    def __init__(self, path: Path, *, timeout_s: float = 20.0) -> None:
        """Connect and negotiate.

        Raises:
            BenchError: nobody answers.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise BenchError(f"QMP socket: {error}") from error
        self._lines = self._socket.makefile("rb")
        self.events: list[dict[str, Any]] = []
        self._receive()  # greeting
        self.execute("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lines.close()
        self._socket.close()

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except OSError as error:
            raise BenchError(f"no QMP answer: {error}") from error
        if not line:
            raise BenchError("the QMP connection was closed")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(self, command: str, /, **arguments: Any) -> Any:
        """Run a command and return its result; arguments are spelled with ``_`` for ``-``.

        Raises:
            BenchError: the command was refused.
        """
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise BenchError(f"QMP {command}: {error}") from error
        while True:
            message = self._receive()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise BenchError(f"QMP {command}: {message['error'].get('desc')}")
            else:
                return message["return"]

    def poll(self, command: str, is_done: Callable[[Any], bool], timeout_s: float, pause_s: float = 0.005) -> Any:
        """Repeat a query until its result is the wanted one.

        Raises:
            BenchError: that took longer than ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        while not is_done(result := self.execute(command)):
            if time.monotonic() > deadline:
                raise BenchError(f"QMP {command}: not done within {timeout_s:.0f} s")
            time.sleep(pause_s)
        return result

    def quit(self) -> None:
        """Ask the program to end; it may hang up before it answers."""
        with suppress(BenchError):
            self.execute("quit")


def is_answering(path: Path) -> bool:
    """Tell whether somebody listens on a control socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
