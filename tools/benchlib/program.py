"""Program: something the bench started, which ends by its own pid and within a time.

CPU seconds come from /proc while a program runs (so that a server can be asked before and after a measurement) and
from wait4(2) once it has ended. Peak memory is the VmHWM of /proc, looked at every few milliseconds while a program is
waited for: the ru_maxrss of wait4 would include the bench's own memory, which the child shared before its exec.
Programs get a session of their own, so a Ctrl-C at the terminal reaches only the bench, which then ends them in order;
if the bench itself is killed, the kernel ends them.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchlib.measure import BenchError, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_NO_USAGE: Final = Usage(0.0, 0)
_LOOK_MS: Final = 10


class Program:
    """A running or ended program."""

    def __init__(self, argv: Sequence[str], logs: Path) -> None:
        """Start ``argv``; its output goes to files named after it in ``logs``.

        Raises:
            BenchError: it cannot be started.
        """
        self.name = Path(argv[0]).name
        stamp = f"{self.name}-{time.monotonic_ns()}"
        self.stdout, self.stderr = logs / f"{stamp}.out", logs / f"{stamp}.err"
        with self.stdout.open("wb") as out, self.stderr.open("wb") as err:
            try:
                popen = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "TERM", "--", *argv],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            except OSError as error:
                raise BenchError(f"{self.name} cannot be started: {error.strerror}") from error
        self._popen = popen
        self.pid = popen.pid
        self._exit_code: int | None = None
        self._final = _NO_USAGE
        self._peak = 0

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._reap(0) is None

    def _reap(self, timeout_s: float) -> int | None:
        if self._exit_code is not None:
            return self._exit_code
        pidfd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            deadline = time.monotonic() + timeout_s
            while not poll.poll(max(0.0, min(_LOOK_MS, (deadline - time.monotonic()) * 1000))):
                if time.monotonic() >= deadline:
                    return None
                self._look()
        finally:
            os.close(pidfd)
        _, status, rusage = os.wait4(self.pid, 0)
        self._exit_code = self._popen.returncode = os.waitstatus_to_exitcode(status)
        self._final = Usage(rusage.ru_utime + rusage.ru_stime, self._peak)
        return self._exit_code

    def _look(self) -> None:
        with suppress(OSError, ValueError, IndexError):  # it may end at this moment
            status = Path(f"/proc/{self.pid}/status").read_text()
            self._peak = int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024

    def wait(self, timeout_s: float) -> int:
        """Return the exit code; a program that takes longer than ``timeout_s`` is killed.

        Raises:
            BenchError: it took too long.
        """
        code = self._reap(timeout_s)
        if code is None:
            self.stop(signal.SIGKILL)
            raise BenchError(f"{self.name} did not end within {timeout_s:.0f} s")
        return code

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait for its end without insisting; tell whether it has ended."""
        return self._reap(timeout_s) is not None

    def check(self, timeout_s: float) -> None:
        """Wait for success.

        Raises:
            BenchError: it failed, or took too long.
        """
        code = self.wait(timeout_s)
        if code:
            raise BenchError(f"{self.name} failed with exit code {code}: {self.last_words()}")

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 15.0) -> None:
        """End it: ask with a signal, then insist; idempotent."""
        if self._reap(0) is not None:
            return
        os.kill(self.pid, number)
        if self._reap(timeout_s) is None:
            os.kill(self.pid, signal.SIGKILL)
            self._reap(timeout_s)

    def wait_ready(self, is_ready: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Wait until ``is_ready`` says so.

        Raises:
            BenchError: the program ended first, or took too long.
        """
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            if not self.is_running:
                raise BenchError(f"{self.name} ended at its start: {self.last_words()}")
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name} was not ready within {timeout_s:.0f} s: {self.last_words()}")
            time.sleep(0.01)

    def last_words(self) -> str:
        """Return the end of what it wrote to stderr, or else to stdout."""
        for path in (self.stderr, self.stdout):
            lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                return " / ".join(lines[-3:])[-400:]
        return "it said nothing"

    def usage(self) -> Usage:
        """Return what it has cost since its start."""
        if self._exit_code is None:
            with suppress(OSError, ValueError, IndexError):
                stat = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
                self._look()
                return Usage((int(stat[11]) + int(stat[12])) / _TICKS_PER_S, self._peak)
            self._reap(0)
        return self._final

    def resident_bytes(self) -> int:
        """Return its resident memory now."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split(maxsplit=1)[0]) * 1024

    def meter(self) -> Callable[[], Usage]:
        """Start a measurement; the returned function gives the CPU seconds and peak memory since."""
        with suppress(OSError):
            Path(f"/proc/{self.pid}/clear_refs").write_text("5")  # resets VmHWM; see proc(5)
        before = self.usage()

        def since() -> Usage:
            now = self.usage()
            return Usage(now.cpu_s - before.cpu_s, now.peak_rss_bytes)

        return since
