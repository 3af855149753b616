"""A command in a terminal of its own, whose screen is read as a person would see it (pyte)."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pyte

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

DEADLINE_S = 40.0


class Terminal:
    """A pseudo-terminal and what runs in it."""

    def __init__(self, command: Iterable[object], environment: Mapping[str, str], columns: int, lines: int) -> None:
        """Start the command."""
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._theirs = theirs  # kept open, so that its modes can be looked at after the command
        self.modes_before = termios.tcgetattr(theirs)
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self.output = b""
        self.process = subprocess.Popen(
            [*map(str, command)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=dict(environment),
            start_new_session=True,
        )

    def read(self, timeout_s: float = 0.05) -> str:
        """Take in what has come; return the screen."""
        while select.select([self._ours], [], [], timeout_s)[0]:
            data = os.read(self._ours, 65536)
            self.output += data
            self._stream.feed(data)
            timeout_s = 0.0
        return "\n".join(self._screen.display)

    def wait_for(self, text: str, *, is_there: bool = True) -> str:
        """Wait until a text is on the screen, or is not any more; return the screen."""
        deadline = time.monotonic() + DEADLINE_S
        while (text in (screen := self.read())) is not is_there:
            assert self.process.poll() is None, f"it has ended: {screen}"
            assert time.monotonic() < deadline, f"never came: {text}\n{screen}"
        return screen

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._ours, keys)

    def resize(self, columns: int, lines: int) -> None:
        """Change the size; the command is told by the kernel's signal."""
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._screen.resize(lines, columns)
        self.process.send_signal(28)  # SIGWINCH: the terminal is no controlling one

    def finish(self) -> int:
        """Wait for the command's end; return its exit code."""
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            self.read()
            assert time.monotonic() < deadline, "it does not end"
        self.read()
        return self.process.returncode

    @property
    def is_as_before(self) -> bool:
        """Whether the modes are those from before, the first screen is shown again, and the cursor is to be seen."""
        shown = self.output.rfind(b"\x1b[?1049l") > self.output.rfind(b"\x1b[?1049h")
        cursor = self.output.rfind(b"\x1b[?25h") > self.output.rfind(b"\x1b[?25l")
        return shown and cursor and termios.tcgetattr(self._theirs) == self.modes_before

    def close(self) -> None:
        """Kill what still runs."""
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(DEADLINE_S)
        os.close(self._ours)
        os.close(self._theirs)


@contextmanager
def terminal(
    command: Iterable[object], *, columns: int = 100, lines: int = 30, **environment: str
) -> Iterator[Terminal]:
    """Run a command in a terminal while the block runs."""
    base = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    one = Terminal(command, base | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"} | environment, columns, lines)
    try:
        yield one
    finally:
        one.close()
