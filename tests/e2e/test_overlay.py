"""Disks over a shared base: guests write, daemons are killed, disks move, and what does not fit is refused."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from support.heirs import ResilientHost
from support.hosts import MIB, pread, pwrite, wait_until, write_random

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse

SIZE = 12 * MIB + 512


def start(hosts: Hosts, name: str, place: Path) -> Host:
    """Serve the overlay of a host over the base that all share."""
    base = place / "golden.img"
    if not base.exists():
        write_random(base, SIZE)
    return hosts.start(name, {"vda": place / f"{name}.img"}, bases={"vda": base})


def scribble(host: Host, model: bytearray, seed: int, n_writes: int = 200) -> None:
    """Write at random places, never mind the blocks, and do the same to the model."""
    rng = random.Random(seed)
    fd = os.open(host.file(), os.O_WRONLY)
    try:
        for _ in range(n_writes):
            length = rng.randrange(1, 20_000)
            offset = rng.randrange(len(model) - length)
            data = rng.randbytes(length)
            assert os.pwrite(fd, data, offset) == length
            model[offset : offset + length] = data
        os.fdatasync(fd)
    finally:
        os.close(fd)


def test_a_killed_daemon_loses_nothing(hosts: Hosts, place: Path) -> None:
    """Neither what was synced nor what was only acknowledged; the base and other overlays see none of it."""
    host = start(hosts, "one", place)
    base = (place / "golden.img").read_bytes()
    model = bytearray(base)
    assert host.file().stat().st_size == SIZE
    assert host.file().read_bytes() == base
    for seed in range(2):
        scribble(host, model, seed)
        pwrite(host.file(), b"acknowledged", 4090 + seed * MIB)
        model[4090 + seed * MIB : 4102 + seed * MIB] = b"acknowledged"
        host.kill()
        host = start(hosts, "one", place)
        assert host.file().read_bytes() == model
    other = start(hosts, "two", place)
    assert other.file().read_bytes() == base
    assert other.file().stat().st_blocks == 0
    assert (place / "golden.img").read_bytes() == base


def test_a_base_that_was_written_keeps_no_guest_waiting(hosts: Hosts, place: Path) -> None:
    """A successor answers first and reads the base then: one that differs is an error for its guests' syncs."""
    base = write_random(place / "golden.img", SIZE)
    host = ResilientHost("host", place / "host", {"vda": place / "vda.img"}, bases={"vda": base})
    hosts.adopt(host)
    host.start()
    pwrite(host.file(), b"before", 5)
    pwrite(base, b"?" * 512, 2 * MIB)
    host.kill_daemon()
    host.wait_for_successor()
    assert pread(host.file(), 6, 5) == b"before"
    wait_until(lambda: host.status()["status"] == "io-error", "the base to be read")
    fd = os.open(host.file(), os.O_WRONLY)
    try:
        assert os.pwrite(fd, b"behind", 5) == 6
        with pytest.raises(OSError, match="Input/output"):
            os.fsync(fd)
    finally:
        os.close(fd)
    assert host.qmp.execute("query-block")[0]["io-status"] == "failed"


def test_an_overlay_is_not_served_without_its_base(hosts: Hosts, place: Path) -> None:
    """As a raw image it would read as zeros wherever it is the base's; over another base it would be garbage."""
    host = start(hosts, "one", place)
    pwrite(host.file(), b"x")
    assert host.stop() == 0
    image, base = place / "one.img", place / "golden.img"
    done = hosts.make("raw", {"vda": image}).serve()
    assert done.exit_code == 2
    assert (
        f"is an overlay, and much of its disk is in its base: name that (--disk vda={image},base=BASE)" in done.stderr
    )
    pwrite(base, b"?", 5)
    done = hosts.make("changed", {"vda": image}, bases={"vda": base}).serve()
    assert done.exit_code == 2
    assert f"base {base} of disk 'vda' is not the one that {image} was made over" in done.stderr
    assert "its contents differ" in done.stderr
    done = hosts.make("none", {"vda": image}, bases={"vda": place / "nowhere.img"}).serve()
    assert done.exit_code == 2
    assert "does not exist" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_overlay_moves_as_a_whole(hosts: Hosts, place: Path) -> None:
    """Over the native wire the destination gets what a guest sees, dirty passes included, and needs no base."""
    source = start(hosts, "source", place)
    model = bytearray((place / "golden.img").read_bytes())
    scribble(source, model, 1)
    destination = hosts.destination()
    source.migrate_to_pause(destination.uri, max_bandwidth=0, downtime_limit=2000)
    scribble(source, model, 2)
    source.proceed()
    source.wait_phase("completed")
    wait_until(lambda: destination.disk()["gate"] == "open", "the take-over")
    assert destination.images["vda"].read_bytes() == model
    pwrite(destination.file(), b"taken over")
    # And back, onto an overlay: it then holds all of the disk.
    back = hosts.start(
        "back", {"vda": place / "back.img"}, incoming="tcp:127.0.0.1:0", bases={"vda": place / "golden.img"}
    )
    done = destination.migrate(back.uri, "--max-bandwidth", "0", "--downtime-limit", "2s")
    assert done.exit_code == 0, done.stderr
    model[:10] = b"taken over"
    assert back.file().read_bytes() == model
    assert pread(back.images["vda"], SIZE) == model


def test_an_overlay_moves_over_qemus_wire(hosts: Hosts, place: Path) -> None:
    """As a whole too, onto a raw image and onto an overlay, which is complete whatever the progress said."""
    source = start(hosts, "source", place)
    model = bytearray((place / "golden.img").read_bytes())
    scribble(source, model, 1)
    image = place / "raw.img"
    image.write_bytes(b"\xee" * SIZE)
    destination = hosts.start("destination", {"vda": image}, incoming="tcp:127.0.0.1:0")
    assert source.migrate(destination.uri, "--wire", "qemu", "--downtime-limit", "2s").exit_code == 0
    destination.wait_phase("completed")
    assert image.read_bytes() == model
    back = hosts.start(
        "back", {"vda": place / "back.img"}, incoming="tcp:127.0.0.1:0", bases={"vda": place / "golden.img"}
    )
    assert destination.migrate(back.uri, "--wire", "qemu", "--downtime-limit", "2s").exit_code == 0
    back.wait_phase("completed")
    assert back.file().read_bytes() == model


def test_what_a_disk_option_may_say(hosts: Hosts, place: Path) -> None:
    """A base that is not named is refused, and so is an overlay that lies over itself."""
    image = write_random(place / "a.img", MIB)
    done = hosts.make("empty", {"vda": place / "a.img,base="}).serve()
    assert done.exit_code == 2
    assert "name the base, such as" in done.stderr
    done = hosts.make("self", {"vda": image}, bases={"vda": image}).serve()
    assert done.exit_code == 2
    assert "cannot be its own base" in done.stderr
    done = hosts.make("data", {"vda": image}, bases={"vda": write_random(place / "b.img", MIB)}).serve()
    assert done.exit_code == 2
    assert "so it is no overlay" in done.stderr
