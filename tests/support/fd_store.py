"""systemd's side of its store of descriptors, as sd_pid_notify_with_fds(3) and sd_listen_fds(3) describe it."""

from __future__ import annotations

import array
import fcntl
import os
import signal
import socket
import subprocess
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from support.hosts import DEADLINE_S, WATCHDOG_S, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_HIGH = 200
"""Stored descriptors are kept from here on, out of the way of those that a service gets from 3 on."""


class StoringManager:
    """Starts a service, keeps the descriptors that its main process sends, and gives them to the next one."""

    def __init__(self, path: Path, command: Sequence[object], log: Path) -> None:
        """Listen at ``path``; nothing is started."""
        self.stored: list[tuple[str, int]] = []
        self.said: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._command = list(map(str, command))
        self._log = log.open("ab")
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(path))
        self._watchdog: threading.Timer | None = None

    def start(self) -> None:
        """Start the service with what is stored; return when it has said READY=1."""
        self.said.clear()
        sources = [fd for _, fd in self.stored]
        names = ":".join(name for name, _ in self.stored)
        # The shell becomes the service, so its process id is the service's.
        moves = " ".join(f"{number}<&{fd} {fd}<&-" for number, fd in enumerate(sources, 3))
        environment = {**os.environ, "NOTIFY_SOCKET": str(self._path), "FDSTORE": "64"}
        if sources:
            environment |= {"LISTEN_FDS": str(len(sources)), "LISTEN_FDNAMES": names}
        self.process = subprocess.Popen(
            ["bash", "-c", f'export LISTEN_PID=$$; exec "$@" {moves}', "bash", *self._command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment,
            pass_fds=sources,
        )
        self._watchdog = threading.Timer(WATCHDOG_S, self.process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()
        wait_until(self._is_ready, "READY=1")

    def _is_ready(self) -> bool:
        self._hear()
        return "READY=1" in self.said

    def _hear(self) -> None:
        assert self.process is not None
        with suppress(BlockingIOError):
            while True:
                text, ancillary, _, _ = self._socket.recvmsg(4096, 4096, socket.MSG_CMSG_CLOEXEC)
                descriptors, pid = array.array("i"), 0
                for _, kind, data in ancillary:
                    if kind == socket.SCM_RIGHTS:
                        descriptors.frombytes(data)
                    else:
                        pid = int.from_bytes(data[:4], "little")
                lines = text.decode().splitlines()
                if pid == self.process.pid:  # NotifyAccess=main
                    self._obey(lines, descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)

    def _obey(self, lines: Sequence[str], descriptors: Sequence[int]) -> None:
        self.said += lines
        name = next((line.partition("=")[2] for line in lines if line.startswith("FDNAME=")), "stored")
        if "FDSTORE=1" in lines:  # several of one name are kept beside each other
            self.stored += [(name, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH)) for fd in descriptors]
        if "FDSTOREREMOVE=1" in lines:
            for stored in [one for one in self.stored if one[0] == name]:
                os.close(stored[1])
                self.stored.remove(stored)

    def end(self, number: signal.Signals) -> int:
        """Send a signal; return how the service has ended."""
        assert self.process is not None
        assert self._watchdog is not None
        self.process.send_signal(number)
        code = self.process.wait(DEADLINE_S)
        self._watchdog.cancel()
        self._hear()
        return code

    def forget(self) -> None:
        """Close everything that is stored, as systemd does when it does not start the service again."""
        for _, fd in self.stored:
            os.close(fd)
        self.stored.clear()

    def close(self) -> None:
        """End the service, whatever a test did."""
        if self.process is not None and self.process.poll() is None:
            self.end(signal.SIGKILL)
        self.forget()
        self._socket.close()
        self._log.close()
