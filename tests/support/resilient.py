"""What a test does to a daemon that has successors: find it, kill it, and wait for the next one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from support.hosts import DEADLINE_S, MIB, wait_until, write_random

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.hosts import Host, Hosts

WRITE_DIRECT = (
    "import mmap; page = mmap.mmap(-1, 4096); page[:6] = b'direct'; "
    "print(os.pwrite(os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT), page, int(sys.argv[2])))"
)
WRITE = "fd = os.open(sys.argv[1], os.O_RDWR); print(os.pwrite(fd, sys.argv[2].encode(), int(sys.argv[3])))"
"""For `Background`: FILE TEXT OFFSET, and of the direct one FILE OFFSET."""
WRITE_WHEN_TOLD = (
    "fd = os.open(sys.argv[1], os.O_RDWR); print('open', flush=True); input(); "
    "print(os.pwrite(fd, b'told', int(sys.argv[2])))"
)
"""FILE OFFSET: says when it has opened the file, and writes when it is told to."""


def start(hosts: Hosts, *options: str, size: int = 8 * MIB, **how: object) -> Host:
    """Serve an image of random bytes resiliently."""
    image = write_random(hosts.directory / "vda.img", size)
    host = hosts.start("host", {"vda": image}, options=["--resilient", *options], **how)
    wait_until(lambda: n_served(host), "the word that it serves")
    return host


class Background:
    """A guest process with one call on a file of the mount, which may wait."""

    def __init__(self, code: str, *arguments: object) -> None:
        """Start it."""
        code = f"import os, sys\ntry:\n    {code}\nexcept OSError as exc:\n    print('errno', exc.errno)"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self) -> None:
        """Let it go on, if it waits for that."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def finish(self) -> str:
        """Wait for its end; return what it printed, which is an errno if the call failed."""
        out, _ = self.process.communicate(timeout=DEADLINE_S)
        return out.strip()

    @property
    def is_waiting(self) -> bool:
        """Tell whether it has not ended."""
        return self.process.poll() is None


def children(pid: int) -> list[int]:
    """Return the child processes of a single-threaded process."""
    with suppress(OSError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def has_fuse_open(pid: int) -> bool:
    """Tell whether a process has a /dev/fuse descriptor."""
    directory = Path(f"/proc/{pid}/fd")
    with suppress(OSError):
        for one in directory.iterdir():
            with suppress(OSError):
                if os.readlink(one) == "/dev/fuse":
                    return True
    return False


def daemon_of(host: Host) -> int:
    """Return the process id of the daemon under a host's holder."""
    found: list[int] = wait_until(lambda: [pid for pid in children(host.pid) if has_fuse_open(pid)], "the daemon")
    return found[0]


def n_served(host: Host) -> int:
    """Return how many daemons have come to serve."""
    return host.log().count("] serving ")


def kill_daemon(host: Host) -> int:
    """Kill the daemon as a crash would; return how many daemons have served until then."""
    before = n_served(host)
    host.forget_qmp()
    os.kill(daemon_of(host), signal.SIGKILL)
    return before


def kill_and_wait(host: Host) -> None:
    """Kill the daemon; return when the next one serves."""
    before = kill_daemon(host)
    wait_until(lambda: n_served(host) > before, "a successor")


@contextmanager
def killing(host: Host, seed: int, longest_s: float) -> Iterator[list[int]]:
    """Kill the daemon at random moments while the body runs, each time before long; the list grows with each kill."""
    kills: list[int] = []
    stop = threading.Event()

    def run() -> None:
        moments = random.Random(seed)
        while not stop.wait(moments.uniform(0.0, longest_s)):
            kill_and_wait(host)
            kills.append(len(kills) + 1)

    thread = threading.Thread(target=run, name="killer")
    thread.start()
    try:
        yield kills
    finally:
        stop.set()
        thread.join()
