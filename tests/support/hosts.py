"""Real daemons for end-to-end tests: each a process of its own with a real mount, driven as users drive it.

Rules: whatever a test does, `Host.stop` ends the process by its pid and unmounts; a watchdog kills a daemon that a test
hangs on, because a request to a FUSE mount cannot be interrupted by anything else; waiting has a deadline that is
there to end a hang and measures nothing.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

DEADLINE_S = 40.0
WATCHDOG_S = 100.0
MIB = 1 << 20
OVER = ("completed", "failed", "cancelled")


class Finished(NamedTuple):
    """A command that has ended."""

    exit_code: int
    stdout: str
    stderr: str


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Return the first true value of ``condition``; fail when it does not come."""
    ends_at = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > ends_at:
            raise TimeoutError(f"never came: {what}")
        time.sleep(0.01)


def is_mounted(path: Path) -> bool:
    """Tell from the kernel's table, without asking the file system itself."""
    return any(line.split()[4] == str(path) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def write_random(path: Path, size: int, seed: int = 1) -> Path:
    """Create a file of ``size`` bytes that are the same for the same seed."""
    source = random.Random(seed)
    with path.open("wb") as file:
        for at in range(0, size, MIB):
            file.write(source.randbytes(min(MIB, size - at)))
    return path


def pwrite(path: Path, data: bytes, offset: int = 0, flags: int = 0) -> None:
    """Write to a file as it is, whatever its size."""
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
    except OSError:
        with suppress(OSError):  # of the two errors the write's tells more
            os.close(fd)
        raise
    os.close(fd)


def pread(path: Path, length: int, offset: int = 0) -> bytes:
    """Read a part of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


@contextmanager
def reserved_port() -> Iterator[int]:
    """Give a port of this host that only a listener gets that asks for it, also while none listens there."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
        yield port


class QmpRefusedError(Exception):
    """The daemon answered a command with an error; its text."""


class Qmp:
    """A blocking QMP client that keeps the events it meets."""

    def __init__(self, path: Path) -> None:
        """Connect and negotiate."""
        self.events: list[dict[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(DEADLINE_S)
            self._socket.connect(str(path))
            self._file = self._socket.makefile("rwb")
            self.greeting = self._receive()
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def _receive(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise ConnectionError("the daemon closed its control socket")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run a command; return its result.

        Raises:
            QmpRefusedError: the daemon said no.
        """
        self._file.write(json.dumps({"execute": command, "arguments": dict(arguments or {})}).encode())
        self._file.flush()
        while True:
            message = self._receive()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpRefusedError(message["error"]["desc"])
            else:
                return message["return"]

    def is_over(self) -> bool:
        """Whether the daemon has closed the connection; what it said before is kept."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def hear_out(self) -> None:
        """Read events until the daemon has closed the connection."""
        with suppress(OSError):
            while True:
                self.events.append(self._receive())

    def event_names(self) -> list[str]:
        """Return the events so far, MIGRATION with its status."""
        return [
            f"MIGRATION {event['data']['status']}" if event["event"] == "MIGRATION" else event["event"]
            for event in self.events
        ]

    def close(self) -> None:
        """Disconnect."""
        with suppress(OSError):
            self._file.close()
        self._socket.close()


class Command:
    """A fusemig command in the background."""

    def __init__(
        self,
        arguments: Iterable[object],
        directory: Path,
        label: str,
        failpoint: str = "",
        prefix: Iterable[object] = (),
    ) -> None:
        """Start ``fusemig ARGUMENTS``, behind ``prefix``; what it says goes to files in ``directory``."""
        environment = {name: value for name, value in os.environ.items() if name != "FUSEMIG_FAILPOINT"}
        if failpoint:
            environment["FUSEMIG_FAILPOINT"] = failpoint
        self._out, self._err = directory / f"{label}.out", directory / f"{label}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*map(str, prefix), sys.executable, "-m", "fusemig", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
            )

    def stdout(self) -> str:
        """Return its data so far."""
        return self._out.read_text()

    def stderr(self) -> str:
        """Return what it has said so far."""
        return self._err.read_text()

    def finish(self, deadline_s: float = DEADLINE_S) -> Finished:
        """Wait for its end."""
        try:
            self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise
        return Finished(self.process.returncode, self.stdout(), self.stderr())

    def end(self) -> None:
        """Kill it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE_S)


class Host:
    """A daemon, its mount and its images; made by `Hosts`."""

    def __init__(
        self,
        name: str,
        directory: Path,
        disks: Mapping[str, Path],
        *,
        incoming: str | None = None,
        readonly: Iterable[str] = (),
        state_dir: Path | None = None,
        wire: str | None = None,
        bases: Mapping[str, Path] | None = None,
        options: Iterable[object] = (),
        failpoint: str = "",
        prefix: Iterable[object] = (),
    ) -> None:
        """Prepare ``fusemig serve`` in ``directory``.

        ``incoming`` is a URI, of which port 0 is a free one; a disk in ``bases`` is an overlay over that image;
        ``options`` are passed on as they are; at ``failpoint`` the daemon kills itself; ``prefix`` goes before it.
        """
        self.name = name
        self.directory = directory
        self._failpoint = failpoint
        self.images = dict(disks)
        self.mount = directory / "mnt"
        self.control = directory / "control"
        self.mount.mkdir(parents=True, exist_ok=True)
        self._arguments: list[object] = ["serve", self.mount, "--control", self.control, *options]
        self._prefix = tuple(prefix)
        for disk, path in disks.items():
            base = f",base={bases[disk]}" if bases and disk in bases else ""
            self._arguments += ["--disk", f"{disk}={path}{base}"]
        for disk in readonly:
            self._arguments += ["--readonly", disk]
        if incoming is not None:
            self._arguments += ["--incoming", incoming]
        if state_dir is not None:
            self._arguments += ["--state-dir", state_dir]
        if wire is not None:
            self._arguments += ["--wire", wire]
        self._arguments += options
        self._commands: list[Command] = []
        self._qmp: Qmp | None = None
        self._daemon: Command | None = None
        self._watchdog: threading.Timer | None = None
        self.problems: list[str] = []

    @property
    def pid(self) -> int:
        """The daemon's."""
        assert self._daemon is not None
        return self._daemon.process.pid

    def serve(self) -> Finished:
        """Run the daemon where it is expected to refuse."""
        self.launch()
        assert self._daemon is not None
        return self._daemon.finish()

    def launch(self) -> None:
        """Start the daemon and wait for nothing."""
        self._daemon = Command(self._arguments, self.directory, "serve", self._failpoint, self._prefix)
        self._watchdog = threading.Timer(WATCHDOG_S, self._daemon.process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()

    def start(self) -> Host:
        """Start the daemon; return when every file of the mount can be stat'ed."""
        self.launch()
        wait_until(self._is_ready, f"the mount of {self.name}")
        return self

    def _is_ready(self) -> bool:
        assert self._daemon is not None
        if self._daemon.process.poll() is not None:
            raise AssertionError(f"{self.name} ended by itself: {self._daemon.stderr()}")
        # Only once it is mounted: a plain directory says nothing.
        return is_mounted(self.mount) and all(self.file(disk).exists() for disk in self.images)

    def file(self, disk: str = "vda") -> Path:
        """Return what guests open."""
        return self.mount / disk

    @property
    def qmp(self) -> Qmp:
        """A connection that lasts as long as the daemon, so that it sees every event from its first use on."""
        if self._qmp is None:
            self._qmp = Qmp(self.control)
        return self._qmp

    @property
    def uri(self) -> str:
        """Where it waits for disks."""
        uri: str = self.status()["incoming"]["uri"]
        return uri

    def status(self) -> dict[str, Any]:
        """Return ``x-fusemig-status``."""
        status: dict[str, Any] = self.qmp.execute("x-fusemig-status")
        return status

    def disk(self, name: str = "vda") -> dict[str, Any]:
        """Return a disk's part of the status."""
        return next(disk for disk in self.status()["disks"] if disk["name"] == name)

    def log(self) -> str:
        """Return what the daemon has said."""
        return "" if self._daemon is None else self._daemon.stderr()

    # Commands

    def start_command(self, verb: str, *arguments: object) -> Command:
        """Start ``fusemig VERB CONTROL ARGUMENTS``."""
        label = f"{verb}-{len(self._commands)}"
        command = Command([verb, self.control, *arguments], self.directory, label)
        self._commands.append(command)
        return command

    def command(self, verb: str, *arguments: object) -> Finished:
        """Run ``fusemig VERB CONTROL ARGUMENTS``."""
        return self.start_command(verb, *arguments).finish()

    def migrate(self, uri: str, *arguments: object) -> Finished:
        """Run ``fusemig migrate`` quietly, so that stderr holds the outcome alone; a lost connection stays lost."""
        return self.command("migrate", uri, "--progress", "none", "--reconnect", "0", *arguments)

    def start_migrate(self, uri: str, *arguments: object) -> Command:
        """Start ``fusemig migrate`` as `migrate` does; return when the daemon knows of it."""
        command = self.start_command("migrate", uri, "--progress", "none", "--reconnect", "0", *arguments)
        wait_until(lambda: command.process.poll() is not None or self.phase() != "none", "the migration's start")
        return command

    # The migration as QMP shows it

    def migration(self) -> dict[str, Any]:
        """Return ``query-migrate``."""
        info: dict[str, Any] = self.qmp.execute("query-migrate")
        return info

    def phase(self) -> str:
        """Return the migration's phase."""
        phase: str = self.migration().get("x-fusemig", {}).get("phase", "none")
        return phase

    def wait_phase(self, *phases: str) -> dict[str, Any]:
        """Wait for one of these phases; return ``query-migrate`` then. A migration that ends otherwise fails this."""

        def look() -> dict[str, Any] | None:
            info = self.migration()
            if "x-fusemig" not in info:
                return None
            if info["x-fusemig"]["phase"] in phases:
                return info
            assert info["status"] not in OVER, f"waited for {phases}: {info}"
            return None

        info: dict[str, Any] = wait_until(look, f"phase {phases} of {self.name}")
        return info

    def wait_free(self) -> None:
        """Wait until no migration that has failed holds a disk here: one that came before that would be told `busy`."""
        wait_until(lambda: self.phase() in ("none", *OVER), f"the end of what {self.name} receives")

    def pause_before_switchover(self, *, is_on: bool = True) -> None:
        """Have migrations wait for `proceed` once they have converged."""
        one = {"capability": "pause-before-switchover", "state": is_on}
        self.qmp.execute("migrate-set-capabilities", {"capabilities": [one]})

    def set_parameters(self, **parameters: int | bool) -> None:
        """Set migration parameters; underscores stand for hyphens."""
        self.qmp.execute(
            "migrate-set-parameters", {name.replace("_", "-"): value for name, value in parameters.items()}
        )

    def proceed(self) -> None:
        """Let a paused migration go on."""
        self.qmp.execute("migrate-continue", {"state": "pre-switchover"})

    def migrate_to_pause(self, uri: str, **parameters: int) -> None:
        """Start a migration through QMP and wait until it has converged and pauses."""
        self.pause_before_switchover()
        if parameters:
            self.set_parameters(**parameters)
        self.qmp.execute("migrate", {"uri": uri, "blk": True})
        self.wait_phase("pre-switchover")

    # The end

    def kill(self) -> None:
        """End the daemon as a crash would, and clear its mount away."""
        assert self._daemon is not None
        self.forget_qmp()
        self._daemon.process.kill()
        self._daemon.process.wait(DEADLINE_S)
        self._stop_watchdog()
        self._unmount()

    def wait_killed(self) -> None:
        """Wait until the daemon has killed itself at its failpoint, and clear its mount away."""
        assert self._daemon is not None
        assert self._daemon.process.wait(DEADLINE_S) == -signal.SIGKILL
        self.kill()

    def wait(self) -> int:
        """Wait for an end that was asked for otherwise; return the exit code."""
        assert self._daemon is not None
        return self._daemon.finish().exit_code

    def stop(self) -> int:
        """End the daemon with SIGTERM; return its exit code. Idempotent."""
        for command in self._commands:
            command.end()
        self.forget_qmp()
        if self._daemon is None:
            return 0
        process = self._daemon.process
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.problems.append(f"{self.name} did not end on SIGTERM")
                process.kill()
                process.wait(DEADLINE_S)
        self._stop_watchdog()
        if is_mounted(self.mount):
            self.problems.append(f"{self.name} left its mount behind")
            self._unmount()
        if "Traceback" in self.log():
            self.problems.append(f"{self.name} logged a traceback:\n{self.log()}")
        return process.returncode

    def forget_qmp(self) -> None:
        """Disconnect from the control socket: the daemon at the other end is going."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

    def _stop_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog.join()
            self._watchdog = None

    def _unmount(self) -> None:
        subprocess.run(["umount", "-l", self.mount], check=False, timeout=DEADLINE_S, capture_output=True)


class Hosts:
    """Makes the hosts of one test, in one directory, and ends them all."""

    def __init__(self, directory: Path) -> None:
        """Keep everything under ``directory``."""
        self.directory = directory
        self._hosts: list[Host] = []

    def make(self, name: str, disks: Mapping[str, Path], **options: Any) -> Host:
        """Prepare a host; it is stopped at the end of the test."""
        host = Host(name, self.directory / f"{name}{len(self._hosts)}", disks, **options)
        self._hosts.append(host)
        return host

    def adopt(self, host: Host) -> None:
        """Have a host stopped at the end of the test that was not made here."""
        self._hosts.append(host)

    def start(self, name: str, disks: Mapping[str, Path], **options: Any) -> Host:
        """Prepare and start a host."""
        return self.make(name, disks, **options).start()

    def pair(self, size: int = 8 * MIB, *, seed: int = 1) -> tuple[Host, Host]:
        """Start a source with a disk ``vda`` of random bytes, and a destination without an image."""
        image = write_random(self.directory / "source.img", size, seed)
        return self.start("source", {"vda": image}), self.destination()

    def destination(self, *disks: str, **options: Any) -> Host:
        """Start a destination whose images are still to come."""
        images = {disk: self.directory / f"{disk}.destination.img" for disk in disks or ("vda",)}
        return self.start("destination", images, **{"incoming": "tcp:127.0.0.1:0"} | options)

    def close(self) -> list[str]:
        """Stop all; return what was wrong."""
        problems = []
        for host in reversed(self._hosts):
            host.stop()
            problems += host.problems
            sys.stdout.write(f"--- {host.name}\n{host.log()}")  # shown when the test fails
        return problems


def assert_unharmed(source: Host, destination: Host | None = None, disk: str = "vda") -> None:
    """See that a failed migration left the source's disk to be written, and the destination's not."""
    where = source.file(disk).stat().st_size - 512
    for data in (b"after the failure", b"and once more...."):
        pwrite(source.file(disk), data, where, os.O_DSYNC)
        assert pread(source.images[disk], len(data), where) == data
    status = source.status()
    assert status["gates-closed"] == 0
    assert status["parked-writes"] == 0
    assert source.disk(disk)["state"] == "owner"
    assert source.disk(disk)["gate"] == "open"
    if destination is not None:
        assert destination.disk(disk)["gate"] == "read-only"
        assert destination.disk(disk)["state"] != "owner"
        with suppress(OSError):
            pwrite(destination.file(disk), b"x")
            raise AssertionError("the destination's file could be written")


def assert_migrates(source: Host, destination: Host, disk: str = "vda") -> None:
    """See that the next migration completes with every byte: what the failed one did not send was not forgotten."""
    source.pause_before_switchover(is_on=False)
    destination.wait_free()
    done = source.migrate(destination.uri, "--max-bandwidth", "0", "--downtime-limit", "2s")
    assert done.exit_code == 0, done.stderr
    assert source.images[disk].read_bytes() == destination.images[disk].read_bytes()
    pwrite(destination.file(disk), b"taken over")
