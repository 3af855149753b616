"""A real QEMU as a peer: started paused under TCG, driven over QMP, always ended.

Everything here is plain blocking code with a deadline on each step: a test or a tool that uses it has nothing else to
do meanwhile, except reading the stream that the QEMU writes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from fusemig.core.units import CHUNK_SIZE
from fusemig.wire import qemu_block, savevm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PROGRAM = "qemu-system-x86_64"
MACHINE = "pc-q35-7.2"
DEADLINE_S = 60.0
"""For one step of a QEMU that shares the machine with other tests."""


class QemuError(Exception):
    """QEMU did not do what it was asked for; the text is its own."""


class Drive(NamedTuple):
    """A disk of the QEMU: `-drive id=name,file=path`."""

    name: str
    path: Path
    format: str = "raw"


def disk_bytes(size: int, *, seed: int) -> bytes:
    """Return a disk with a sector of random bytes at the start of each chunk but the second, which is all zeros."""
    source = random.Random(seed)
    disk = bytearray(size)
    for offset in range(0, size, CHUNK_SIZE):
        if offset != CHUNK_SIZE:
            disk[offset : offset + 512] = source.randbytes(512)
    return bytes(disk)


def is_available() -> bool:
    """Tell whether there is a QEMU that still has block migration (removed in 9.1)."""
    if shutil.which(PROGRAM) is None:
        return False
    major, minor = version().split(" ")[0].split(".")[:2]
    return (int(major), int(minor)) < (9, 1)


def version() -> str:
    """Return the version as QEMU prints it: ``7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)``."""
    text = subprocess.run([PROGRAM, "--version"], check=True, capture_output=True, text=True, timeout=DEADLINE_S).stdout
    return text.splitlines()[0].removeprefix("QEMU emulator version ")


class Qemu:
    """A paused QEMU without display, network or default devices; use it in a ``with`` block."""

    def __init__(
        self,
        directory: Path,
        *,
        drives: list[Drive],
        machine: str = MACHINE,
        incoming: str = "",
        bios: Path | None = None,
        memory_mib: int = 1,
        paused: bool = True,
        more: Sequence[str] = (),
    ) -> None:
        """Start it with ``more`` arguments; its sockets and its log are made in ``directory``."""
        self.control = directory / "qmp.sock"
        self._log = directory / "qemu.log"
        self.command = [PROGRAM, "-M", f"{machine},accel=tcg", "-m", str(memory_mib), "-nodefaults", "-display", "none"]
        if paused:
            self.command += ["-S"]
        self.command += more
        for drive in drives:
            self.command += ["-drive", f"if=none,id={drive.name},file={drive.path},format={drive.format}"]
            self.command += ["-device", f"virtio-blk-pci,drive={drive.name}"]
        if bios is not None:
            self.command += ["-bios", str(bios)]
        if incoming:
            self.command += ["-incoming", incoming]
        arguments = [*self.command, "-qmp", f"unix:{self.control},server=on,wait=off"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Return itself, already running."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    def _connect(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(DEADLINE_S)
        while True:
            try:
                self._socket.connect(os.fspath(self.control))
            except (FileNotFoundError, ConnectionRefusedError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise QemuError(self.log) from None
                time.sleep(0.02)
            else:
                break
        self._lines = self._socket.makefile("rb")
        self._message()
        self.execute("qmp_capabilities")

    def _message(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except ConnectionError:
            line = b""
        if not line:
            raise self._gone()
        found: dict[str, Any] = json.loads(line)
        return found

    def _gone(self) -> QemuError:
        """Wait for the end of a QEMU that closed its socket, and return its last words."""
        self._process.wait(DEADLINE_S)
        return QemuError(f"QEMU has gone: {self.log}")

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a QMP command and return what it returns; ``_`` in argument names stands for ``-``."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self._socket.sendall(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        except ConnectionError as exc:
            raise self._gone() from exc
        while "event" in (message := self._message()):
            pass
        if "error" in message:
            raise QemuError(message["error"]["desc"])
        return message["return"]

    def set_capabilities(self, **capabilities: bool) -> None:
        """Set migration capabilities."""
        self.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": name.replace("_", "-"), "state": on} for name, on in capabilities.items()],
        )

    def start_migration(self, uri: str, *, incremental: bool = False) -> None:
        """Start `migrate -b` (or `-i`) and do not wait for its end."""
        self.execute("migrate", uri=uri, blk=True, inc=incremental)

    def migration(self) -> dict[str, Any]:
        """Return `query-migrate`."""
        found: dict[str, Any] = self.execute("query-migrate")
        return found

    def wait_migration(self) -> dict[str, Any]:
        """Wait for the end of a migration, either way, and return `query-migrate`."""
        deadline = time.monotonic() + DEADLINE_S
        while (found := self.migration()).get("status") not in ("completed", "failed", "cancelled"):
            if time.monotonic() > deadline:
                raise QemuError(f"the migration does not end: {found}")
            time.sleep(0.02)
        return found

    def monitor(self, command: str) -> str:
        """Run a human monitor command, such as ``qemu-io drive0 "write -P 1 0 64k"``, and return its answer."""
        answer: str = self.execute("human-monitor-command", command_line=command)
        return answer

    def is_running(self) -> bool:
        """Tell whether the process has not ended."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process as a crash would, without waiting: its files may be on a mount that does not answer now."""
        self._process.kill()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if hasattr(self, "_lines"):
            self._lines.close()
        if hasattr(self, "_socket"):
            self._socket.close()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)


class Destination:
    """What a real QEMU migrates to: reads its stream from a socket, and keeps the disks in memory."""

    def __init__(self, devices: Sequence[qemu_block.Device], *, bases: Sequence[bytes] = ()) -> None:
        """Receive ``devices`` over what ``bases`` hold (zeros without)."""
        self.images = [bytearray(base) for base in bases] or [bytearray(device.size) for device in devices]
        self.completeness = qemu_block.BlockCompleteness(devices)
        self.events: list[object] = []
        """Every event but those with data, whose device and offset are in `chunks`."""
        self.chunks: list[tuple[int, int]] = []
        self.recorded = bytearray()
        self.drained_bytes = 0
        """How much came once the state of devices had begun."""
        self._decoder: savevm.Decoder[qemu_block.Event] = savevm.Decoder(
            {qemu_block.SECTION: qemu_block.Decoder(devices)}
        )
        self._has_return_path = False

    def receive(self, connection: socket.socket, *, until: Callable[[], bool] = lambda: False) -> None:
        """Receive until the source closes (and then insist on a whole stream), or ``until`` says that it is enough."""
        connection.settimeout(DEADLINE_S)
        decoder = self._decoder
        while not until():
            if decoder.needs_buffer:
                decoder.give_buffer(bytearray(CHUNK_SIZE))
            wanted = decoder.wanted
            n = connection.recv_into(wanted)
            if not n:
                decoder.close()
                return
            self.recorded += wanted[:n]
            if self.events and isinstance(self.events[-1], savevm.DeviceState):
                self.drained_bytes += n
            self._apply(decoder.advance(n), connection)
            if self._has_return_path and decoder.may_end:
                connection.sendall(savevm.encode_shut())
                self._has_return_path = False

    def _apply(self, event: savevm.Event | qemu_block.Event | None, connection: socket.socket) -> None:
        self.completeness.observe(event)
        match event:
            case None:
                return
            case qemu_block.BlockData(device, offset, payload):
                self.images[device][offset : offset + len(payload)] = payload
                self.chunks.append((device, offset))
                return
            case qemu_block.BlockZero(device, offset, length):
                self.images[device][offset : offset + length] = bytes(length)
                self.chunks.append((device, offset))
            case savevm.Command(savevm.CommandType.OPEN_RETURN_PATH):
                self._has_return_path = True
            case savevm.Command(savevm.CommandType.PING, value) if self._has_return_path:
                connection.sendall(savevm.encode_pong(value))
        self.events.append(event)
