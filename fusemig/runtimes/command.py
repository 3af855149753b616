"""CommandRuntime: a guest whose runtime is driven by two shell commands of its owner.

    wait_standstill      the pause command: the guest stands still, and its state is where the destination finds it
    run_there            the resume command with FUSEMIG_SIDE=destination
    run_here             the resume command with FUSEMIG_SIDE=source, once the pause command was begun

The pause command runs while the disks' passes go on; the resume command runs exactly once, or not at all where it is in
doubt who owns the disks. Each has a deadline, after which its whole process group is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Final

import structlog
import trio

from fusemig.core.guest import Side
from fusemig.errors import MigrationError

log = structlog.get_logger(__name__)

DEFAULT_DEADLINE_S: Final = 30.0
_MAX_OUTPUT: Final = 500
_MARGIN_S: Final = 5.0


@dataclass(frozen=True)
class CommandOptions:
    """What the guest's owner gave."""

    pause: str
    resume: str
    deadline_s: float = DEFAULT_DEADLINE_S
    """For each command."""


class CommandRuntime:
    """A guest that stands still and runs on by commands."""

    name = "command"

    def __init__(self, options: CommandOptions, session: str) -> None:
        """``session`` names the migration for the commands."""
        self._options = options
        self._session = session
        self._is_begun = False
        self.fall_back_deadline_s = self.run_deadline_s = options.deadline_s + _MARGIN_S

    async def prepare(self) -> None:
        """There is nothing that could be asked."""

    async def begin_copy(self) -> None:
        """Whatever is copied, the pause command copies it."""

    async def wait_standstill(self) -> None:
        """Run the pause command."""
        self._is_begun = True
        await self._run("pause", self._options.pause, Side.SOURCE)

    async def load(self) -> None:
        """The pause command has brought the guest's state to the destination."""

    async def run_there(self) -> None:
        """Run the resume command for the destination."""
        await self._run("resume", self._options.resume, Side.DESTINATION)

    async def run_here(self) -> None:
        """Run the resume command for the source, also if the pause command failed: it may have got halfway."""
        if self._is_begun:
            await self._run("resume", self._options.resume, Side.SOURCE)

    async def release(self) -> None:
        """Nothing is held."""

    async def _run(self, what: str, command: str, side: Side) -> None:
        """Run a command in a shell.

        Cancellation: it is killed, with what it started.

        Raises:
            MigrationError: it failed, in its own words, or took too long.
        """
        # No pipe: what a command leaves running in the background may keep it open.
        with tempfile.TemporaryFile() as output:
            await self._run_into(output, what, command, side)
            log.info("command", what=what, side=side.value, said=_last_words(output))

    async def _run_into(self, output: IO[bytes], what: str, command: str, side: Side) -> None:
        environment = {**os.environ, "FUSEMIG_SIDE": side.value, "FUSEMIG_SESSION": self._session}
        process = await trio.lowlevel.open_process(
            ["/bin/sh", "-c", command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with trio.fail_after(self._options.deadline_s):
                code = await process.wait()
        except trio.TooSlowError:
            raise MigrationError(
                f"the {what} command did not end in {self._options.deadline_s:g} s (--command-deadline) and was killed"
            ) from None
        finally:
            await _end(process)
        if code:
            raise MigrationError(f"the {what} command failed with {code}: {_last_words(output) or 'it said nothing'}")


def _last_words(output: IO[bytes]) -> str:
    """Return the end of what a command wrote."""
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _MAX_OUTPUT))
    return output.read().decode(errors="replace").strip()


async def _end(process: trio.Process) -> None:
    """Kill what is left of a command that was not waited for."""
    if process.returncode is not None:
        return
    with trio.CancelScope(shield=True):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
