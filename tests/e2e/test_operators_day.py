"""An operator's day: two hosts, five disks, a host that dies on the way, what is done then, and the way home."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.hosts import MIB, pwrite, wait_until, write_random
from support.network import ADDRESSES, link

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = [pytest.mark.fuse, pytest.mark.nightly, pytest.mark.timeout(300)]

SIZE = 24 * MIB
PLAIN = ("--insecure",)
DISKS = ("root", "data", "log", "swap", "scratch")


def write(host: Host, text: bytes) -> None:
    """Write a block into each disk, as guests do."""
    for number, disk in enumerate(DISKS):
        pwrite(host.file(disk), text.ljust(4096, b"."), (number + 1) * MIB)


def assert_moved(source: Host, destination: Host) -> None:
    """See that every disk is whole at the destination, and writable there alone."""
    wait_until(lambda: all(destination.disk(disk)["gate"] == "open" for disk in DISKS), "the take-over")
    for disk in DISKS:
        assert source.images[disk].read_bytes() == destination.images[disk].read_bytes(), disk
        with pytest.raises(OSError, match="Read-only file system"):
            pwrite(source.file(disk), b"no")


def test_five_disks_move_a_host_dies_and_they_come_home(hosts: Hosts, place: Path) -> None:
    """Nothing that was written is lost, what had arrived is not sent again, and home goes only what changed."""
    with link() as cable:
        (near, far), n_bytes = cable.prefixes, SIZE * len(DISKS)
        images = {disk: write_random(place / f"{disk}.img", SIZE, seed) for seed, disk in enumerate(DISKS)}
        copies = {disk: place / f"{disk}.copy" for disk in DISKS}
        home = hosts.start("home", images, prefix=near, options=PLAIN)
        away = hosts.start("away", copies, prefix=far, incoming=f"tcp:{ADDRESSES[1]}:4444", options=PLAIN)
        write(home, b"in the morning")

        # The destination dies when more than half has come, at a rate at which it has journaled some of it by then.
        moving = home.start_migrate(away.uri, "--max-bandwidth", "6M")
        home.wait_phase("bulk")
        wait_until(lambda: home.migration()["disk"]["transferred"] > n_bytes // 2, "half")
        away.kill()
        assert moving.finish().exit_code == 1
        assert home.phase() == "failed"
        write(home, b"at noon, while the other host is dead")

        # It comes back, and the operator goes on.
        away = hosts.start("away-again", copies, prefix=far, incoming=f"tcp:{ADDRESSES[1]}:4444", options=PLAIN)
        resumed = home.migrate(away.uri, "--resume", "--downtime-limit", "2s", "--max-bandwidth", "0")
        assert resumed.exit_code == 0, resumed.stderr
        assert home.migration()["x-fusemig"]["wire-bytes"] < n_bytes
        assert_moved(home, away)

        # Guests work there; in the evening the disks come home, to a host that waits for them now.
        write(away, b"in the afternoon")
        assert home.stop() == 0
        home = hosts.start("home-again", images, prefix=near, incoming=f"tcp:{ADDRESSES[0]}:4444", options=PLAIN)
        returned = away.migrate(home.uri, "--downtime-limit", "2s")
        assert returned.exit_code == 0, returned.stderr
        assert away.migration()["x-fusemig"]["wire-bytes"] < len(DISKS) * MIB
        assert_moved(away, home)
        write(home, b"in the evening")
