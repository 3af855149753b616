"""Who copies an image from one place to another over TCP: fusemig's peers, and the limit.

Every function makes one copy and returns the seconds it took with what both ends cost. The destination image exists,
is empty and has the right size. Time runs from the command to the tool's own word that it is done; starting servers
is not counted, the start of a one-shot command is.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchlib import images, subject
from benchlib.exporters import QSD, quit_program
from benchlib.measure import BenchError, Sample
from benchlib.qmp import Qmp, is_answering
from benchlib.stage import free_port, is_listening, missing, run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from benchlib.program import Program
    from benchlib.settings import Settings
    from benchlib.stage import Stage

QEMU_MIGRATE = "QEMU migrate -b"
MIRROR = "blockdev-mirror + NBD"
NBDCOPY = "nbdcopy + nbdkit"
CONVERT = "qemu-img convert + qemu-nbd"
LIMIT = "sendfile, unverified"
MAX_COPY_S = 120.0
_UNCAPPED = 1 << 40
_DOWNTIMES_MS = (10, 1, 0)
"""Downtime limits to try: QEMU 7.2 may say completed with much of a disk unsent, the less often the lower the limit."""


@dataclass(frozen=True)
class Copier:
    """A way to copy an image."""

    name: str
    kind: str
    copy: Callable[[Stage, Path, Path], Sample]
    missing: str = ""


class QemuPair:
    """Two `qemu-system-x86_64` that run no guest: source with the image, destination incoming."""

    def __init__(self, stage: Stage, source: Path, destination: Path, *, zero_blocks: bool = False) -> None:
        """Start both and set the parameters: bandwidth uncapped, downtime limit 10 ms."""
        self.port = free_port()
        self.destination, control = self._start(stage, destination, "-incoming", "defer")
        self.destination_qmp = self._connect(stage, control)
        self.source, self.control = self._start(stage, source)
        self.qmp = self._connect(stage, self.control)
        for qmp in (self.qmp, self.destination_qmp):
            if zero_blocks:
                state = [{"capability": "zero-blocks", "state": True}]
                qmp.execute("migrate-set-capabilities", capabilities=state)
        self.destination_qmp.execute("migrate-incoming", uri=f"tcp:127.0.0.1:{self.port}")
        self.limit(_UNCAPPED)

    def _start(self, stage: Stage, image: Path, *more: str) -> tuple[Program, Path]:
        control = stage.path("qmp")
        program = stage.start(
            "qemu-system-x86_64", "-M", "q35,accel=tcg", "-m", "16", "-S", "-nodefaults", "-display", "none",
            "-drive", f"if=none,id=d,node-name=f,file={image},format=raw",
            "-device", "virtio-blk-pci,drive=d,share-rw=on",
            "-qmp", f"unix:{control},server=on,wait=off", *more,
        )  # fmt: skip
        program.wait_ready(lambda: control.exists())
        return program, control

    def _connect(self, stage: Stage, control: Path) -> Qmp:
        qmp = Qmp(control)
        stage.defer(qmp.__exit__, None, None, None)
        return qmp

    def limit(self, bytes_per_s: int, downtime_ms: int = _DOWNTIMES_MS[0]) -> None:
        """Set the bandwidth limit and the downtime limit."""
        self.qmp.execute("migrate-set-parameters", max_bandwidth=bytes_per_s, downtime_limit=downtime_ms)

    def start(self) -> None:
        """Start migrating."""
        self.qmp.execute("migrate", uri=f"tcp:127.0.0.1:{self.port}", blk=True)

    def query(self) -> dict[str, Any]:
        """Return query-migrate."""
        result: dict[str, Any] = self.qmp.execute("query-migrate")
        return result

    def wire_bytes(self) -> int:
        """Return what TCP has sent to the destination so far: `disk.transferred` counts the bulk phase only."""
        table = run(["ss", "-tniH", "dport", "=", f":{self.port}"])
        return sum(int(number) for number in re.findall(r"bytes_sent:(\d+)", table))

    def finish(self, timeout_s: float) -> dict[str, Any]:
        """Wait until both ends say completed; return the source's query-migrate.

        Raises:
            BenchError: it failed or took too long.
        """
        ended = {"completed", "failed", "cancelled"}
        result: dict[str, Any] = self.qmp.poll("query-migrate", lambda info: info.get("status") in ended, timeout_s)
        if result["status"] != "completed":
            raise BenchError(f"migrate -b: {result['status']}: {result.get('error-desc', '')}")
        self.destination_qmp.poll("query-migrate", lambda info: info.get("status") == "completed", 20)
        return result

    def stop(self) -> None:
        """End both in order, so that everything is in the images."""
        for qmp, program in ((self.qmp, self.source), (self.destination_qmp, self.destination)):
            qmp.quit()
            program.wait_ended(10)
            program.stop()


def qemu_migrate(stage: Stage, source: Path, destination: Path, *, zero_blocks: bool = False) -> Sample:
    """Copy with QEMU's block migration, again with a lower downtime limit where it ended before all was sent."""
    is_allocated = images.allocated(destination) > 0
    for downtime_ms in _DOWNTIMES_MS:
        if downtime_ms != _DOWNTIMES_MS[0]:
            images.empty_image(destination, source.stat().st_size)
            if is_allocated:
                images.fill(destination)
        sample = _qemu_migrate(stage, source, destination, downtime_ms, zero_blocks=zero_blocks)
        if images.first_difference(source, destination) is None:
            return sample
    raise BenchError("migrate -b says completed, but the destination differs from the source")


def _qemu_migrate(stage: Stage, source: Path, destination: Path, downtime_ms: int, *, zero_blocks: bool) -> Sample:
    pair = QemuPair(stage, source, destination, zero_blocks=zero_blocks)
    pair.limit(_UNCAPPED, downtime_ms)
    images.warm(source, destination)
    meters = pair.source.meter(), pair.destination.meter()
    began = time.monotonic()
    pair.start()
    info = pair.finish(MAX_COPY_S)
    seconds = time.monotonic() - began
    source_usage, destination_usage = (meter() for meter in meters)
    pair.stop()
    extra = {"wall_s": seconds, "total_s": info["total-time"] / 1000, "downtime_ms": float(info["downtime"])}
    extra["downtime_limit_ms"] = float(downtime_ms)
    return Sample(seconds, source_usage, destination_usage, extra)


class MirrorPair:
    """A qemu-storage-daemon with the image and an NBD client node, and one that exports the destination."""

    def __init__(
        self,
        stage: Stage,
        source: Path,
        destination: Path,
        *,
        guest_export: str = "",
        host: str = "127.0.0.1",
        prefixes: tuple[Sequence[str], Sequence[str]] = ((), ()),
    ) -> None:
        """Start both; ``guest_export`` names a Unix socket on which the source disk is exported to a guest by NBD.

        With ``prefixes`` they run in network namespaces, where the destination has the address ``host``.
        """
        port = free_port()
        self._size = source.stat().st_size
        self.destination, _ = self._start(
            stage, destination, prefixes[1],
            "--nbd-server", f"addr.type=inet,addr.host={host},addr.port={port}",
            "--export", "type=nbd,id=e,node-name=f,name=disk,writable=on",
        )  # fmt: skip
        guest = []
        if guest_export:
            guest = ["--nbd-server", f"addr.type=unix,addr.path={guest_export}"]
            guest += ["--export", "type=nbd,id=g,node-name=f,name=disk,writable=on"]
        if not prefixes[1]:  # else its sockets are in another namespace's tables, and its control socket was enough
            self.destination.wait_ready(lambda: is_listening(port))
        self.source, control = self._start(stage, source, prefixes[0], *guest)
        self.qmp = Qmp(control)
        stage.defer(self.qmp.__exit__, None, None, None)
        server = {"type": "inet", "host": host, "port": str(port)}
        self.qmp.execute("blockdev-add", driver="nbd", node_name="t", server=server, export="disk")

    def _start(self, stage: Stage, image: Path, prefix: Sequence[str], *more: str) -> tuple[Program, Path]:
        control = stage.path("qmp")
        program = stage.start(
            *prefix, QSD, "--blockdev", f"driver=file,node-name=f,filename={image}",
            "--chardev", f"socket,id=c,path={control},server=on,wait=off", "--monitor", "chardev=c", *more,
        )  # fmt: skip
        program.wait_ready(lambda: is_answering(control))
        stage.defer(quit_program, program, control)
        return program, control

    def start(self, copy_mode: str = "background") -> None:
        """Start mirroring; guests' writes are copied later, or with ``write-blocking`` before they are answered."""
        self.qmp.execute("blockdev-mirror", job_id="j", device="f", target="t", sync="full", copy_mode=copy_mode)

    def wait_first_pass(self, timeout_s: float) -> None:
        """Wait until as much as the whole disk has been copied; under load the job may be far from ready then."""

        def is_over(jobs: list[dict[str, Any]]) -> bool:
            return self._is_ready(jobs) or bool(jobs[0]["current-progress"] >= self._size)

        self.qmp.poll("query-jobs", is_over, timeout_s)

    def wait_bulk(self, timeout_s: float) -> None:
        """Wait until the job is ready: the bulk is done and writes are being followed."""
        self.qmp.poll("query-jobs", self._is_ready, timeout_s)

    @staticmethod
    def _is_ready(jobs: list[dict[str, Any]]) -> bool:
        if not jobs or jobs[0].get("error"):
            raise BenchError(f"blockdev-mirror failed: {jobs[0]['error'] if jobs else 'the job is gone'}")
        return bool(jobs[0]["status"] == "ready")

    def finish(self, timeout_s: float) -> None:
        """End the job with the destination complete."""
        self.qmp.execute("job-complete", id="j")
        self.qmp.poll("query-jobs", lambda jobs: not jobs, timeout_s)
        failed = [event["data"]["error"] for event in self.qmp.events if event.get("data", {}).get("error")]
        if failed:
            raise BenchError(f"blockdev-mirror failed: {failed[0]}")


def mirror(stage: Stage, source: Path, destination: Path) -> Sample:
    """Copy with blockdev-mirror to the NBD export of another qemu-storage-daemon."""
    pair = MirrorPair(stage, source, destination)
    images.warm(source, destination)
    meters = pair.source.meter(), pair.destination.meter()
    began = time.monotonic()
    pair.start()
    pair.wait_bulk(MAX_COPY_S)
    pair.finish(30)
    seconds = time.monotonic() - began
    return Sample(seconds, meters[0](), meters[1](), {"wall_s": seconds})


def _one_shot(stage: Stage, server: Program, *command: str | Path) -> Sample:
    meter = server.meter()
    began = time.monotonic()
    program = stage.start(*command)
    program.check(MAX_COPY_S)
    seconds = time.monotonic() - began
    destination = meter()
    server.stop()
    return Sample(seconds, program.usage(), destination, {"wall_s": seconds})


def nbdcopy(stage: Stage, source: Path, destination: Path) -> Sample:
    """Copy with nbdcopy to the file plugin of nbdkit; the destination is known to be empty, and is flushed."""
    port = free_port()
    server = stage.start(
        "nbdkit", "--foreground", "--threads", "4", "-i", "127.0.0.1", "-p", str(port), "file", destination
    )
    server.wait_ready(lambda: is_listening(port))
    images.warm(source, destination)
    return _one_shot(
        stage, server, "nbdcopy", "--flush", "--destination-is-zero", source, f"nbd://127.0.0.1:{port}"
    )  # fmt: skip


def convert(stage: Stage, source: Path, destination: Path) -> Sample:
    """Copy with qemu-img convert, 16 requests at once in any order, to qemu-nbd."""
    port = free_port()
    server = stage.start(
        "qemu-nbd", "-f", "raw", "-x", "disk", "-b", "127.0.0.1", "-p", str(port), "-e", "16", "--persistent",
        "--discard=unmap", destination,
    )  # fmt: skip
    server.wait_ready(lambda: is_listening(port))
    target = f"nbd://127.0.0.1:{port}/disk"
    images.warm(source, destination)
    return _one_shot(
        stage, server, "qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", source, target
    )  # fmt: skip


def limit(
    stage: Stage,
    source: Path,
    destination: Path,
    *,
    host: str = "127.0.0.1",
    prefixes: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> Sample:
    """Copy with sendfile into a loop of recv and pwrite, verifying nothing."""
    port = free_port()
    command = [sys.executable, "-m", "benchlib.raw_copy"]
    receiver = stage.start(*prefixes[1], *command, "receive", host, str(port), destination)
    if prefixes[1]:
        time.sleep(1)  # its sockets are in another namespace's tables
    else:
        receiver.wait_ready(lambda: is_listening(port))
    images.warm(source, destination)
    sender = stage.start(*prefixes[0], *command, "send", host, str(port), source)
    sender.check(MAX_COPY_S)
    receiver.check(20)
    seconds = float(sender.stdout.read_text())
    return Sample(seconds, sender.usage(), receiver.usage(), {"wall_s": seconds})


def ours(settings: Settings) -> list[Copier]:
    """Return our sides, one a lane."""
    reason = subject.why_missing(settings)

    def copier(lane: str | None) -> Copier:
        def copy(stage: Stage, source: Path, destination: Path) -> Sample:
            return subject.copy(stage, source, destination, lane=lane, timeout_s=MAX_COPY_S)

        return Copier(subject.side_name(lane), "us", copy, reason)

    return [copier(lane) for lane in settings.lanes]


def peers() -> dict[str, Copier]:
    """Return the peers and the limit by name."""

    def zeroing(stage: Stage, source: Path, destination: Path) -> Sample:
        return qemu_migrate(stage, source, destination, zero_blocks=True)

    qemu = missing("qemu-system-x86_64")
    table = [
        Copier(QEMU_MIGRATE, "peer", qemu_migrate, qemu),
        Copier(f"{QEMU_MIGRATE}, zero-blocks", "peer", zeroing, qemu),
        Copier(MIRROR, "peer", mirror, missing(QSD)),
        Copier(NBDCOPY, "peer", nbdcopy, missing("nbdcopy", "nbdkit")),
        Copier(CONVERT, "peer", convert, missing("qemu-img", "qemu-nbd")),
        Copier(LIMIT, "limit", limit),
    ]
    return {copier.name: copier for copier in table}
