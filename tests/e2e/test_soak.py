"""A disk that moves back and forth under load leaves nothing behind in either daemon (nightly)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from support.hosts import MIB
from support.records import RecordWriter

if TYPE_CHECKING:
    from support.hosts import Host, Hosts

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(900)]

N_MOVES, N_MOVES_NIGHTLY = 4, 30
N_WARM = 6
"""Moves after which a daemon has everything that it keeps."""
GROWTH = 4 * MIB
"""Two daemons that kept the buffers of migrations that were over grew by 8 MiB in 24 moves."""


class Holding(NamedTuple):
    """What a daemon holds."""

    n_files: int
    n_threads: int
    resident_bytes: int


def holding(host: Host) -> Holding:
    """Look at a daemon from outside."""
    status = Path(f"/proc/{host.pid}/status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines())
    return Holding(
        len(os.listdir(f"/proc/{host.pid}/fd")), int(values["Threads"]), int(values["VmRSS"].split()[0]) * 1024
    )


def test_back_and_forth_under_load(hosts: Hosts, place: Path, nightly: bool) -> None:
    """Every move completes with every acknowledged record; files, threads and memory do not grow, mounts neither."""
    origin, first = hosts.pair(8 * MIB)
    assert origin.migrate(first.uri).exit_code == 0
    other = hosts.start("other", {"vda": place / "other.img"}, incoming="tcp:127.0.0.1:0")
    here, there = first, other
    downtimes: list[int] = []
    warm: dict[str, Holding] = {}
    n_moves = N_MOVES_NIGHTLY if nightly else N_MOVES
    for number in range(1, n_moves + 1):
        guest = RecordWriter(here.file(), 256)
        done = here.migrate(there.uri, "--downtime-limit", "2s")
        guest.stop()
        assert done.exit_code == 0, done.stderr
        assert not guest.lost(there.images["vda"])
        assert there.disk()["gate"] == "open"
        assert here.disk()["gate"] == "read-only"
        downtimes.append(here.migration()["downtime"])
        here, there = there, here
        if number in (N_WARM, N_WARM + 1):
            warm[here.name] = holding(here)
    downtimes.sort()
    print(f"{n_moves} moves, downtime in ms: median {downtimes[n_moves // 2]}, longest {downtimes[-1]}")
    for host in (first, other):
        now = holding(host)
        print(host.name, now, warm.get(host.name))
        if host.name in warm:
            assert now.n_files <= warm[host.name].n_files + 2
            assert now.n_threads <= warm[host.name].n_threads + 2
            assert now.resident_bytes <= warm[host.name].resident_bytes + GROWTH
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    assert sorted(mount for mount in mounts if mount.startswith(f"{place}/")) == sorted(
        str(host.mount) for host in (origin, first, other)
    )
