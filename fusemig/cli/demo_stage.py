"""What the demo sets up on this machine and takes down again: daemons, mounts, loop devices, files.

Everything is an ``async with`` block whose end is shielded and timed, so nothing outlives the demo however it ends.
Every program is started in a session of its own: Ctrl-C reaches the demo, which ends them in order. Only programs that
were started here are ever ended, by their process.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import trio

from fusemig.errors import ConfigError, FusemigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

_T = TypeVar("_T")

TOOL_DEADLINE_S: Final = 60.0
"""For mkfs, e2fsck, mount, umount and losetup."""
READY_DEADLINE_S: Final = 30.0
END_DEADLINE_S: Final = 20.0
DISK: Final = "vda"
_LOOP_PROGRAMS: Final = ("losetup", "mkfs.ext4", "e2fsck", "mount", "umount")
_SCRATCH_SIZE: Final = 8 << 20
_FILL_STEP: Final = 1 << 20


class DemoError(FusemigError):
    """A step of the demo failed."""


@dataclass(frozen=True)
class Place:
    """Directories of one demo; removed with all they hold."""

    work: Path
    """Mountpoints, control sockets, logs: a short path, because socket names are short."""
    images: Path


@asynccontextmanager
async def place(directory: Path | None, image_bytes: int) -> AsyncIterator[Place]:
    """Make directories with room for ``image_bytes`` of images, in ``directory`` if given.

    Raises:
        ConfigError: there is no such directory, or no room.
    """
    parent = directory or Path(tempfile.gettempdir())
    try:
        free = shutil.disk_usage(parent).free
        if free < image_bytes:
            raise ConfigError(
                f"the demo needs {image_bytes >> 20} MiB in {parent}, and {free >> 20} MiB are free there: "
                "give another --directory or a smaller --size"
            )
        images = Path(tempfile.mkdtemp(prefix="fusemig-demo-", dir=parent.absolute()))
    except OSError as exc:
        raise ConfigError(f"--directory {parent}: {exc.strerror}; give one that exists and is writable") from exc
    work = Path(tempfile.mkdtemp(prefix="fusemig-demo-"))
    try:
        yield Place(work, images)
    finally:
        shutil.rmtree(images, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)


async def in_thread(call: Callable[..., _T], *args: Any, deadline_s: float = TOOL_DEADLINE_S) -> _T:
    """Make a call that may wait for one of the mounts.

    Raises:
        DemoError: it did not return in time.
    """
    try:
        with trio.fail_after(deadline_s):
            return await trio.to_thread.run_sync(partial(call, *args), abandon_on_cancel=True)
    except trio.TooSlowError as exc:
        raise DemoError(f"{getattr(call, '__name__', call)} did not end in {deadline_s:g} s") from exc


async def tool(*command: str | Path) -> str:
    """Run a program to its end; return what it printed.

    Raises:
        DemoError: it failed, with its own words.
    """
    code, output = await tool_result(*command)
    if code:
        raise DemoError(f"{' '.join(map(str, command))} failed with {code}: {output or 'it said nothing'}")
    return output


async def tool_result(*command: str | Path) -> tuple[int, str]:
    """Run a program to its end; return its exit code and what it printed on stdout and stderr."""
    try:
        with trio.fail_after(TOOL_DEADLINE_S):
            done = await trio.run_process(
                [str(part) for part in command],
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                check=False,
                start_new_session=True,
            )
    except OSError as exc:
        raise DemoError(f"cannot run {command[0]}: {exc.strerror}") from exc
    except trio.TooSlowError as exc:
        raise DemoError(f"{' '.join(map(str, command))} did not end in {TOOL_DEADLINE_S:g} s") from exc
    return done.returncode, done.stdout.decode(errors="replace").strip()


class Program:
    """A program that runs beside the demo, with its stderr in a file."""

    def __init__(self, name: str, process: trio.Process, log: Path) -> None:
        """Made by `program`."""
        self.name = name
        self.process = process
        self.log = log

    def last_words(self) -> str:
        """Return the last line that it wrote to stderr."""
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def check_alive(self) -> None:
        """Raise `DemoError` if it has ended."""
        if self.process.poll() is not None:
            raise DemoError(f"the {self.name} ended with {self.process.returncode}: {self.last_words()}")

    async def wait(self, deadline_s: float) -> int:
        """Wait for its end; return its exit code.

        Raises:
            DemoError: it did not end in time.
        """
        with trio.move_on_after(deadline_s):
            return await self.process.wait()
        raise DemoError(f"the {self.name} did not end in {deadline_s:g} s")

    async def stop(self) -> None:
        """Ask it to end, and wait for that; raises as `wait` does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        await self.wait(END_DEADLINE_S)


def program(name: str, log: Path, *arguments: str | Path) -> AbstractAsyncContextManager[Program]:
    """Run ``python -m ARGUMENTS``; at the end it is asked to stop, and killed if it does not."""
    return command(name, log, sys.executable, "-m", *arguments)


@asynccontextmanager
async def command(name: str, log: Path, *words: str | Path) -> AsyncIterator[Program]:
    """Run any program as `program` does.

    Raises:
        DemoError: it cannot be run.
    """
    with log.open("wb") as stderr:
        try:
            process = await trio.lowlevel.open_process(
                [str(word) for word in words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        except OSError as exc:
            raise DemoError(f"cannot run {words[0]}: {exc.strerror}") from exc
    running = Program(name, process, log)
    try:
        yield running
    finally:
        with trio.CancelScope(shield=True):
            try:
                await running.stop()
            except DemoError:
                process.kill()
                await running.wait(END_DEADLINE_S)


@asynccontextmanager
async def daemon(name: str, where: Place, image: Path, *options: str) -> AsyncIterator[tuple[Program, Path, Path]]:
    """Serve ``image``; yield the daemon, its control socket and the disk's file, which is there.

    Raises:
        DemoError: it could not be started, and why.
    """
    mountpoint, control = where.work / name, where.work / f"{name}.sock"
    mountpoint.mkdir()
    log = where.work / f"{name}.log"
    serve: tuple[str | Path, ...] = (
        "fusemig",
        "serve",
        mountpoint,
        "--disk",
        f"{DISK}={image}",
        "--control",
        control,
        *options,
    )
    file = mountpoint / DISK
    try:
        async with program(f"{name} daemon", log, *serve) as running:
            await _wait_served(running, file)
            yield running, control, file
    finally:
        if _is_mounted(mountpoint):  # only where it had to be killed
            detach = ("umount", "-l", mountpoint) if os.geteuid() == 0 else ("fusermount3", "-u", "-z", mountpoint)
            with trio.CancelScope(shield=True):
                await tool_result(*detach)


async def _wait_served(running: Program, file: Path) -> None:
    try:
        with trio.fail_after(READY_DEADLINE_S):
            while not await in_thread(file.exists):
                running.check_alive()
                await trio.sleep(0.02)
    except trio.TooSlowError as exc:
        raise DemoError(
            f"the {running.name} does not serve after {READY_DEADLINE_S:g} s: {running.last_words()}"
        ) from exc


def _is_mounted(path: Path) -> bool:
    """Tell from the kernel's table, without asking the file system."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        return any(line.split()[4] == str(path) for line in table)


class LoopMount:
    """ext4 on a loop device on a file; `close` flushes both and may be called early."""

    def __init__(self, file: Path, mountpoint: Path) -> None:
        """Nothing is set up before `open`."""
        self.mountpoint = mountpoint
        self._file = file
        self._device = ""
        self._is_mounted = False

    async def open(self) -> None:
        """Attach and mount.

        Raises:
            DemoError: there is no loop device to be had, or it cannot be mounted.
        """
        # Shielded, so that what was attached is always known; each step has its deadline.
        with trio.CancelScope(shield=True):
            self._device = await tool("losetup", "--find", "--show", self._file)
            await in_thread(self.mountpoint.mkdir)
            await tool("mount", "-t", "ext4", self._device, self.mountpoint)
            self._is_mounted = True

    async def close(self) -> None:
        """Unmount and detach, which flushes everything; idempotent.

        Raises:
            DemoError: it does not let go.
        """
        with trio.CancelScope(shield=True):
            if self._is_mounted:
                await tool("umount", self.mountpoint)
                self._is_mounted = False
            if self._device:
                await tool("losetup", "--detach", self._device)
                self._device = ""

    async def force_close(self) -> None:
        """Close, or else detach lazily: whoever still uses it loses it."""
        try:
            await self.close()
        except DemoError:
            with trio.CancelScope(shield=True):
                await tool_result("umount", "-l", self.mountpoint)
                if self._device:
                    await tool_result("losetup", "--detach", self._device)


@asynccontextmanager
async def loop_mount(file: Path, mountpoint: Path) -> AsyncIterator[LoopMount]:
    """Mount the ext4 that is in ``file``; raises as `LoopMount.open` does."""
    mount = LoopMount(file, mountpoint)
    try:
        await mount.open()
        yield mount
    finally:
        await mount.force_close()


async def why_no_loop(where: Place) -> str:
    """Return why ext4 on a loop device cannot be had here; empty if it can, which is found by trying."""
    if os.geteuid() != 0:
        return "not run as root"
    for name in _LOOP_PROGRAMS:
        if shutil.which(name) is None:
            return f"{name} is not installed"
    scratch = where.images / "scratch"
    try:
        await in_thread(_make_sparse, scratch)
        await make_ext4(scratch)
        async with loop_mount(scratch, where.work / "scratch"):
            pass
    except DemoError as exc:
        return str(exc).splitlines()[0]
    finally:
        scratch.unlink(missing_ok=True)
    return ""


def _make_sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(_SCRATCH_SIZE)


async def make_ext4(file: Path) -> None:
    """Make an ext4 that leaves the rest of the file's content as it is.

    Raises:
        DemoError: mkfs failed.
    """
    # No discard, so that a full image stays full; nothing lazy, so that the kernel does not write behind our back.
    extended = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
    await tool("mkfs.ext4", "-q", "-F", "-E", extended, file)


def fill_with_random(path: Path, size: int) -> None:
    """Make an image of ``size`` bytes without a hole or a zero chunk in it."""
    with path.open("wb") as stream:
        for offset in range(0, size, _FILL_STEP):
            stream.write(os.urandom(min(_FILL_STEP, size - offset)))
