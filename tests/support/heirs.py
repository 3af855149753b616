"""Hosts whose daemon is started again when it dies, by `fusemig serve --resilient`; what they run, and guests."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from support.hosts import Host, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from support.hosts import Qmp

BLOCK = 4096


class Installation:
    """What a daemon's interpreter meets first: a test changes the installed fusemig with it."""

    def __init__(self, directory: Path) -> None:
        """Change nothing yet."""
        directory.mkdir()
        self.directory = directory

    def install(self, code: str) -> None:
        """Have every interpreter that is started from now on run this before anything else."""
        (self.directory / "sitecustomize.py").write_text(code)


class ResilientHost(Host):
    """A host behind a holder: `pid` is the holder's, and the daemon changes."""

    def __init__(self, name: str, directory: Path, disks: Mapping[str, Path], **options: Any) -> None:
        """Prepare it; with ``failpoint`` the first daemon to come there dies, and its successors do not."""
        failpoint = options.pop("failpoint", "")
        if failpoint:
            directory.mkdir(parents=True, exist_ok=True)
            trigger = directory / "trigger"
            trigger.touch()
            failpoint = f"{failpoint}:kill:{trigger}"
        arguments: Iterable[object] = options.pop("options", ())
        super().__init__(
            name, directory, disks, failpoint=failpoint, options=("--resilient", "--standby", *arguments), **options
        )
        self.killed: set[int] = set()

    @property
    def qmp(self) -> Qmp:
        """A connection to the daemon that serves now."""
        if self._qmp is not None and self._qmp.is_over():
            self.forget_qmp()
        return super().qmp

    def _patiently(self, command: str) -> Any:
        """Run a command that changes nothing, of whichever daemon answers."""

        def ask() -> list[Any] | None:
            try:
                return [self.qmp.execute(command)]
            except OSError:
                self.forget_qmp()  # what it said last may still be unread
                return None

        (answer,) = wait_until(ask, f"an answer of {self.name}")
        return answer

    def status(self) -> dict[str, Any]:
        """Return ``x-fusemig-status``, also while one daemon follows the other."""
        status: dict[str, Any] = self._patiently("x-fusemig-status")
        return status

    def migration(self) -> dict[str, Any]:
        """Return ``query-migrate``, likewise."""
        info: dict[str, Any] = self._patiently("query-migrate")
        return info

    @property
    def daemon(self) -> int:
        """The process that serves now."""
        pid: int = self.status()["pid"]
        return pid

    def kill_daemon(self) -> None:
        """End the daemon as a crash would; its mount stays."""
        pid = self.daemon
        self.killed.add(pid)
        os.kill(pid, signal.SIGKILL)

    def wait_for_successor(self) -> None:
        """Wait until another one answers than those that were killed."""
        wait_until(lambda: self.daemon not in self.killed, f"a successor of {self.name}")

    def n_daemons(self) -> int:
        """Tell how many have served, this one included."""
        n: int = self.status()["succession"]["predecessors"]
        return n + 1


class BusyGuest:
    """Writes blocks of its own all over a disk, and knows what must be in each; every write must succeed."""

    def __init__(self, path: Path, size: int, seed: int = 1, pause_s: float = 0.0) -> None:
        """Begin at once."""
        self.n_written = 0
        self.error: OSError | None = None
        self._path = path
        self._blocks: dict[int, bytes] = {}
        self._n_blocks = size // BLOCK
        self._rng = random.Random(seed)
        self._pause_s = pause_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()
        wait_until(lambda: self.n_written > 10, "the first writes")

    def _write(self) -> None:
        try:
            fd = os.open(self._path, os.O_WRONLY)
            try:
                while not self._is_over.wait(self._pause_s):
                    block, data = self._rng.randrange(self._n_blocks), self._rng.randbytes(BLOCK)
                    os.pwrite(fd, data, block * BLOCK)
                    self._blocks[block] = data
                    self.n_written += 1
                    if self.n_written % 32 == 0:
                        os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as exc:
            self.error = exc

    def stop(self) -> None:
        """Let it end."""
        self._is_over.set()

    def end(self) -> None:
        """End it; it must not wait for ever."""
        self.stop()
        self._thread.join(40)
        assert not self._thread.is_alive(), "a write was never answered"

    def check(self, path: Path) -> None:
        """See that every acknowledged write is in a file."""
        with path.open("rb") as file:
            for block, data in self._blocks.items():
                file.seek(block * BLOCK)
                assert file.read(BLOCK) == data, f"block {block} is not what was written last"


@contextmanager
def verifying(path: Path) -> Iterator[None]:
    """Have fio write at random to a file of 16 MiB while the body runs, direct and buffered, and verify each block.

    The body must end within 90 seconds.
    """
    fixed = ("--rw=randwrite", "--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--verify_state_save=0")
    jobs = []
    for name, offset, *options in (
        ("direct", 0, "--bs=4k", "--direct=1", "--iodepth=8", "--ioengine=libaio"),
        ("buffered", 8, "--bs=64k", "--fdatasync=16"),
    ):
        where = (f"--filename={path}", f"--offset={offset}m", "--size=8m", "--time_based", "--runtime=90")
        command = ["fio", f"--name={name}", "--allow_file_create=0", *where, *fixed, *options]
        jobs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        yield
        assert all(job.poll() is None for job in jobs), "fio was over before the body was"
    finally:
        for job in jobs:
            job.terminate()
        said = [job.communicate(timeout=40)[0] for job in jobs]
    for text in said:
        assert "err= 0" in text, text
        assert "verify:" not in text, text
