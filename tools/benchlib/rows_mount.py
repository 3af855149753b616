"""M1 to M4: the mount, where the guest lives all day."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchlib import images
from benchlib.exporters import QSD, exporters
from benchlib.fio import Job, run_job
from benchlib.measure import BenchError, Case, Contender, Goal, Row, Sample, Side, run_case
from benchlib.settings import GIB, MIB
from benchlib.stage import Stage, file_system_of, run, unmount
from benchlib.subject import why_missing

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchlib.exporters import Exporter
    from benchlib.fio import Figures
    from benchlib.program import Program
    from benchlib.settings import Settings


class Served:
    """An image of its own under every exporter, all up at once; one that cannot start is named with its reason."""

    def __init__(self, stage: Stage, size: int, *, only_ours: bool = False) -> None:
        """Make the images and start the exporters."""
        self.size = size
        self._stage = stage
        self.entries: list[tuple[Exporter, Path, Program | None, str]] = []
        for number, exporter in enumerate(exporters(stage)):
            if only_ours and exporter.kind != "us":
                continue
            reason, file, program = exporter.missing, Path(), None
            if not reason:
                try:
                    image = images.random_image(stage.images / f"image{number}", size)
                    file, program = exporter.serve(stage, image)
                except BenchError as error:
                    reason = str(error)
            self.entries.append((exporter, file, program, reason))

    def on_files(self, change: Callable[[Path], Path]) -> None:
        """Put something on each file (a loop device and a file system); fio then runs on what it returns."""
        for index, (exporter, file, program, reason) in enumerate(self.entries):
            if reason:
                continue
            try:
                self.entries[index] = (exporter, change(file), program, "")
            except BenchError as error:
                self.entries[index] = (exporter, file, program, str(error))

    def case(
        self, name: str, job: Job, *, unit: str = "IOPS", goals: tuple[Goal, ...] = (), size: int | None = None
    ) -> Case:
        """Measure one job on every file."""
        settings = self._stage.settings
        seconds = settings.pick(3.0, 0.4)

        def contender(exporter: Exporter, file: Path, program: Program | None, reason: str) -> Contender:
            def once() -> Sample:
                if program and not program.is_running:
                    raise BenchError(f"{program.name} has ended: {program.last_words()}")
                meter = program.meter() if program else None
                figures = run_job(self._stage, job, file, size or self.size, seconds)
                return Sample(_value(figures, unit), meter() if meter else None, None, {"p99_us": figures.p99_us})

            return Contender(exporter.name, exporter.kind, once, reason)

        contenders = [contender(*entry) for entry in self.entries]
        return run_case(name, unit, contenders, settings.rounds(), goals=goals)


def _value(figures: Figures, unit: str) -> float:
    return figures.iops if unit == "IOPS" else figures.bytes_per_s / MIB


def row_m1(settings: Settings) -> Row:
    """Sequential 1 MiB, O_DIRECT, queue depth 4."""
    row = Row("M1", "1 MiB sequential on the mount, O_DIRECT, queue depth 4")
    for on_disk in (False, *settings.pick((True,), ())):
        with Stage(settings, on_disk=on_disk) as stage:
            served = Served(stage, settings.pick(1 * GIB, 256 * MIB))
            place = "tmpfs" if not on_disk else f"{file_system_of(settings.directory)}, cached"
            for rw, bound in (("read", 4.0), ("write", 1.25)):
                goals = () if on_disk else (Goal(bound, QSD),)
                row.cases.append(served.case(f"{rw}, {place}", Job(rw, "1m", depth=4), unit="MiB/s", goals=goals))
    return row


def row_m2(settings: Settings) -> Row:
    """Random 4 KiB, O_DIRECT."""
    row = Row("M2", "4 KiB random on the mount, O_DIRECT, tmpfs")
    shapes = [
        ("1 job qd 1", 1, 1, (Goal(1.5, QSD), Goal(1.2, QSD, lane="pyfuse3"))),
        ("4 sync jobs", 4, 1, (Goal(1.5, QSD), Goal(1.2, QSD, lane="pyfuse3"))),
        ("4 jobs qd 8", 4, 8, (Goal(2.5, QSD), Goal(1.2, QSD, lane="pyfuse3"))),
    ]
    with Stage(settings) as stage:
        served = Served(stage, settings.pick(1 * GIB, 256 * MIB))
        for shape, n_jobs, depth, goals in shapes:
            for rw, word in (("randread", "read"), ("randwrite", "write"), ("randrw", "70/30 mix")):
                if settings.quick and (rw == "randrw" or (n_jobs, depth, rw) == (4, 1, "randread")):
                    continue
                job = Job(rw, n_jobs=n_jobs, depth=depth)
                row.cases.append(served.case(f"{word}, {shape}", job, goals=goals))
    if settings.quick:
        row.notes.append("--quick leaves out the 70/30 mix and the sync jobs' reads")
    return row


def row_m3(settings: Settings) -> Row:
    """Buffered, on a loop device, and with fdatasync each."""
    row = Row("M3", "buffered on the mount; ext4 on a loop device on it; 4 KiB with fdatasync each")
    size = settings.pick(1 * GIB, 256 * MIB)
    buffered = (Goal(1.5, QSD),)
    total = settings.pick(128 * MIB, 16 * MIB)
    with Stage(settings) as stage:
        served = Served(stage, size)
        for rw in ("randread", "randwrite"):
            row.cases.append(
                served.case(f"4 KiB {rw[4:]}, buffered, tmpfs", Job(rw, direct=False, total=total), goals=buffered)
            )
        if not settings.quick:
            for rw in ("read", "write"):
                job = Job(rw, "1m", direct=False, total=size)
                row.cases.append(served.case(f"1 MiB {rw}, buffered, tmpfs", job, unit="MiB/s", goals=buffered))
        served.on_files(lambda file: _ext4_on(stage, file))
        for rw in ("randread", "randwrite"):
            job = Job(rw, direct=False, total=total)
            case = served.case(f"4 KiB {rw[4:]}, ext4 on loop, buffered", job, goals=buffered, size=size // 2)
            row.cases.append(case)
    with Stage(settings, on_disk=True) as stage:
        served = Served(stage, settings.pick(256 * MIB, 64 * MIB))
        place = file_system_of(settings.directory)
        job = Job("randwrite", direct=False, fdatasync=True)
        row.cases.append(served.case(f"4 KiB write + fdatasync, {place}", job, goals=(Goal(1.0, QSD),)))
    row.notes.append("buffered writes are a fixed amount ended by an fsync, divided by the whole time")
    return row


def _ext4_on(stage: Stage, file: Path) -> Path:
    # Without direct I/O in the loop driver: with it, a file system just made on the export of qemu-storage-daemon 7.2
    # has wrong contents and cannot be mounted, so there would be nobody to compare with.
    device = run(["losetup", "--find", "--show", "--direct-io=off", file]).strip()
    stage.defer(_quietly, ["losetup", "--detach", device])
    run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", device], timeout_s=60)
    mountpoint = stage.path("x")
    mountpoint.mkdir()
    run(["mount", device, mountpoint])
    stage.defer(unmount, mountpoint)
    stage.defer(_quietly, ["umount", str(mountpoint)])
    return images.random_image(mountpoint / "file", file.stat().st_size // 2)


def _quietly(words: list[str]) -> None:
    subprocess.run(words, check=False, capture_output=True, timeout=60)


def row_m4(settings: Settings) -> Row:
    """What tracking adds to a write."""
    row = Row("M4", "tracking on against tracking left out of the path, as a share of a 4 KiB write on the mount")
    reason = why_missing(settings)
    if reason:
        row.cases.append(Case("added to a 4 KiB write", "%", [Side("fusemig", "us", reason=reason)], False))
        return row
    from fusemig.disk.raw import RawDisk
    from fusemig.disk.tracked import TrackedDisk

    with Stage(settings) as stage:
        served = Served(stage, 256 * MIB, only_ours=True)
        case = served.case("4 KiB write on the mount, 4 jobs qd 8", Job("randwrite", n_jobs=4, depth=8))
        row.cases.append(case)
        path = images.random_image(stage.images / "inside", 64 * MIB)
        raw = RawDisk("inside", path)
        stage.defer(raw.close)
        disk = TrackedDisk(raw)

        def ours(side: Side) -> Contender:
            def once() -> Sample:
                raw_s, idle_s = _per_write_s(raw.pwrite), _per_write_s(disk.pwrite)
                tracking = disk.start_tracking()
                try:
                    added_s = _per_write_s(disk.pwrite) - idle_s
                finally:
                    tracking.stop()
                extra = {"added_us": added_s * 1e6, "gate_us": (idle_s - raw_s) * 1e6}
                return Sample(100 * max(added_s, 0.0) * side.median, extra=extra)

            return Contender(side.name, "us", once, side.reason)

        contenders = [ours(side) for side in case.sides if side.kind == "us"]
        share = run_case(
            "added to a 4 KiB write",
            "%",
            contenders,
            settings.rounds(),
            higher_is_better=False,
            goals=(Goal(3.0, at_most=True),),
        )
        row.cases.append(share)
        for name, key in (
            ("added by a migration's tracker", "added_us"),
            ("gate and written map, always on", "gate_us"),
        ):
            row.cases.append(share.derive(name, "µs", key, higher_is_better=False))
    row.notes.append(
        "the share is what a running migration's marks add to the tracked layer's pwrite, in processor time of one "
        "thread on tmpfs, of the time between two writes on the mount; the gate, which is always on, is shown apart"
    )
    return row


def _per_write_s(pwrite: Callable[[bytes, int], None]) -> float:
    """Return the processor time of a write: what else the machine does is not in it."""
    data, n_writes = bytes(4096), 20_000
    offsets = [index * 2654435761 % (64 * MIB // 4096) * 4096 for index in range(n_writes)]
    began = time.thread_time()
    for offset in offsets:
        pwrite(data, offset)
    return (time.thread_time() - began) / n_writes
