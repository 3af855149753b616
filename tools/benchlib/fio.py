"""One fio job and its figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from benchlib.measure import BenchError

if TYPE_CHECKING:
    from pathlib import Path

    from benchlib.stage import Stage

_MAX_S: Final = 60.0


@dataclass(frozen=True)
class Job:
    """What fio does to a file."""

    rw: str
    """fio's name: read, write, randread, randwrite, randrw."""
    block: str = "4k"
    n_jobs: int = 1
    depth: int = 1
    direct: bool = True
    fdatasync: bool = False
    total: int = 0
    """Work of this many bytes, ended by an fsync and divided by the whole time; 0: work for a time."""


@dataclass(frozen=True)
class Figures:
    """What a job reached, reads and writes together."""

    iops: float
    bytes_per_s: float
    p99_us: float


def run_job(stage: Stage, job: Job, path: Path, size: int, seconds: float) -> Figures:
    """Run a job on a file of ``size`` bytes.

    Raises:
        BenchError: fio failed.
    """
    words = [
        "fio",
        "--name=job",
        f"--filename={path}",
        f"--rw={job.rw}",
        f"--bs={job.block}",
        f"--size={job.total or size}",
        f"--filesize={size}",
        f"--numjobs={job.n_jobs}",
        f"--direct={int(job.direct)}",
        "--group_reporting",
        "--randrepeat=0",
        "--allow_file_create=0",
        "--fallocate=none",
        "--output-format=json",
    ]
    words += ["--ioengine=libaio", f"--iodepth={job.depth}"] if job.depth > 1 else ["--ioengine=psync"]
    words += ["--norandommap", "--thread"]
    words += ["--rwmixread=70"] if job.rw == "randrw" else []
    words += ["--fdatasync=1"] if job.fdatasync else []
    if job.total:
        words.append("--end_fsync=1")
    else:
        words += ["--time_based", f"--runtime={int(seconds * 1000)}ms"]
    program = stage.start(*words)
    program.check(seconds + _MAX_S)
    text = program.stdout.read_text()
    try:
        result: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    except (ValueError, LookupError) as error:
        raise BenchError(f"fio said something else than figures: {text[:200]}") from error
    parts = [result[kind] for kind in ("read", "write") if result[kind]["total_ios"]]
    if not parts:
        raise BenchError("fio did no I/O")
    tails = [part["clat_ns"].get("percentile", {}).get("99.000000", 0) for part in parts]
    if job.total:
        elapsed_s = result["job_runtime"] / job.n_jobs / 1000 or 0.001
        n_ios, n_bytes = sum(part["total_ios"] for part in parts), sum(part["io_bytes"] for part in parts)
        return Figures(n_ios / elapsed_s, n_bytes / elapsed_s, max(tails) / 1000)
    return Figures(sum(part["iops"] for part in parts), sum(part["bw_bytes"] for part in parts), max(tails) / 1000)
