"""Who serves an image as a file: fusemig, qemu-storage-daemon, and the bare file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchlib.qmp import Qmp, is_answering
from benchlib.stage import file_system_of, missing, unmount
from benchlib.subject import Daemon, side_name, why_missing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchlib.program import Program
    from benchlib.stage import Stage

QSD = "qemu-storage-daemon"
NATIVE = "native file"


@dataclass(frozen=True)
class Exporter:
    """A way to serve an image."""

    name: str
    kind: str
    serve: Callable[[Stage, Path], tuple[Path, Program | None]]
    """Serve an image until the stage ends; returns the file to open and the program that serves it."""
    missing: str = ""


def _serve_natively(_stage: Stage, image: Path) -> tuple[Path, None]:
    return image, None


def serve_with_qsd(stage: Stage, image: Path) -> tuple[Path, Program]:
    """Serve an image with the FUSE export of qemu-storage-daemon."""
    file, control = stage.path("q"), stage.path("qmp")
    file.touch()
    stage.defer(unmount, file)
    program = stage.start(
        QSD,
        "--blockdev", f"driver=file,node-name=f,filename={image}",
        "--export", f"type=fuse,id=e,node-name=f,mountpoint={file},writable=on",
        "--chardev", f"socket,id=c,path={control},server=on,wait=off",
        "--monitor", "chardev=c",
    )  # fmt: skip
    program.wait_ready(lambda: is_answering(control) and file_system_of(file).startswith("fuse"))
    # It spins for ever once its export is unmounted from outside, so it is asked to end before anybody unmounts.
    stage.defer(quit_program, program, control)
    return file, program


def quit_program(program: Program, control: Path) -> None:
    """End one of QEMU's programs by its own QMP, or else by a signal."""
    if program.is_running and is_answering(control):
        with Qmp(control) as qmp:
            qmp.quit()
        if program.is_running:
            program.wait_ended(10)
    program.stop()


def exporters(stage: Stage) -> list[Exporter]:
    """Return who is compared on the mount's rows: every lane of ours, QSD, the bare file."""
    reason = why_missing(stage.settings)

    def ours(lane: str | None) -> Exporter:
        def serve(stage: Stage, image: Path) -> tuple[Path, Program]:
            daemon = Daemon(stage, {"disk": image}, lane=lane)
            return daemon.file(), daemon.program

        return Exporter(side_name(lane), "us", serve, reason)

    return [
        *(ours(lane) for lane in stage.settings.lanes),
        Exporter(QSD, "peer", serve_with_qsd, missing(QSD)),
        Exporter(NATIVE, "limit", _serve_natively),
    ]
