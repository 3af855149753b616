"""Stage: what one measurement needs from the machine, and its removal in every case.

Whatever is made here is taken down in reverse order when the block ends, also by an error or Ctrl-C, and one failure
in taking down does not stop the rest.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from benchlib.measure import BenchError
from benchlib.program import Program
from benchlib.settings import MEMORY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from benchlib.settings import Settings


class Stage:
    """The directories, programs and mounts of one measurement; a context manager."""

    def __init__(self, settings: Settings, *, on_disk: bool = False) -> None:
        """Images go to memory, or to the chosen directory if ``on_disk``; everything else always to memory."""
        self.settings = settings
        self._stack = ExitStack()
        self._image_root = settings.directory if on_disk else MEMORY
        self._counter = 0

    def __enter__(self) -> Self:
        self.images = self._directory(self._image_root)
        self.work = self._directory(MEMORY)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def _directory(self, root: Path) -> Path:
        path = Path(tempfile.mkdtemp(prefix="fusemig-bench-", dir=root))
        # A mount that could not be taken down must not have its files deleted through it: rmtree does not cross it.
        self._stack.callback(_remove_tree, path)
        return path

    def path(self, name: str) -> Path:
        """Return a new name in the work directory: short, for sockets and mount points."""
        self._counter += 1
        return self.work / f"{name}{self._counter}"

    def defer(self, undo: Callable[..., object], *args: object) -> None:
        """Call ``undo`` when the stage is left."""
        self._stack.callback(undo, *args)

    def start(self, *argv: str | Path) -> Program:
        """Start a program that ends with the stage."""
        program = Program([str(word) for word in argv], self.work)
        self._stack.callback(program.stop)
        return program


def _remove_tree(path: Path) -> None:
    if any(line.split()[1].startswith(f"{path}/") for line in Path("/proc/mounts").read_text().splitlines()):
        return  # whatever is still mounted there said why already; deleting through it would be worse
    shutil.rmtree(path, ignore_errors=True)


def unmount(path: Path) -> None:
    """Detach a mount if it is still there."""
    if any(line.split()[1] == str(path) for line in Path("/proc/mounts").read_text().splitlines()):
        subprocess.run(["umount", "--lazy", str(path)], check=False, capture_output=True, timeout=20)


def run(argv: Sequence[str | Path], *, timeout_s: float = 30.0) -> str:
    """Run a short command and return its output.

    Raises:
        BenchError: it failed, is missing or took too long.
    """
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"{words[0]}: {error}") from error
    if done.returncode:
        raise BenchError(f"{' '.join(words[:4])} failed: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def missing(*programs: str) -> str:
    """Return why a side cannot run: the programs that are not installed; empty if all are."""
    absent = [name for name in programs if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def is_listening(port: int) -> bool:
    """Tell whether a local TCP port is listened on, without connecting (some servers take one connection only)."""
    wanted = f":{port:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(wanted) and fields[3] == "0A":
                return True
    return False


def file_system_of(path: Path) -> str:
    """Return the type of the file system that holds ``path``."""
    best = ("", "?")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        real = os.path.realpath(path)
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]
