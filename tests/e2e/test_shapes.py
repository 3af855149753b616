"""Disks of every shape move: odd sizes, sparse, block devices, groups, read-only neighbours, and back again."""

from __future__ import annotations

import errno
import filecmp
import os
import random
from typing import TYPE_CHECKING

import pytest

from support.hosts import MIB, pread, pwrite, write_random
from support.loops import loop_device

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse


def assert_same(source: Host, destination: Host, *disks: str) -> None:
    """Compare images through their backing files."""
    for disk in disks:
        assert filecmp.cmp(source.images[disk], destination.images[disk], shallow=False)


def test_a_small_odd_disk_and_a_large_sparse_one_move_together(
    hosts: Hosts, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """5 MiB + 1536 bytes and 3 GiB with 10 MiB of data: few bytes on the wire, and holes stay holes."""
    small = write_random(place / "small.img", 5 * MIB + 1536)
    sparse = place / "sparse.img"
    with sparse.open("wb") as file:
        for at in range(10):
            file.seek(at * 300 * MIB + 12288)
            file.write(random.Random(at).randbytes(MIB))
        file.truncate(3 << 30)
    source = hosts.start("source", {"vda": small, "vdb": sparse})
    destination = hosts.destination("vda", "vdb")
    assert source.migrate(destination.uri).exit_code == 0
    info = source.migration()
    wire = info["x-fusemig"]["wire-bytes"]
    with capsys.disabled():
        print(f"\n5 MiB + 1536 bytes and 3 GiB with 10 MiB of data: {wire} bytes sent in {info['total-time']} ms")
    assert info["disk"]["total"] == 5 * MIB + 1536 + (3 << 30)
    assert wire <= 5 * MIB + 1536 + 10 * 2 * MIB + 64 * 1024  # a MiB of data may touch two chunks
    image = destination.images["vdb"].stat()
    assert image.st_size == 3 << 30
    assert image.st_blocks * 512 <= 10 * 2 * MIB
    assert destination.file("vda").stat().st_size == 5 * MIB + 1536
    assert_same(source, destination, "vda")
    with source.file("vdb").open("rb") as here, destination.file("vdb").open("rb") as there:
        for at in range(10):
            for side in here, there:
                side.seek(at * 300 * MIB)
            assert here.read(2 * MIB) == there.read(2 * MIB)


def test_a_hole_overwrites_old_data_at_the_destination(hosts: Hosts, place: Path) -> None:
    """An image that is there already is made equal, also where the source has nothing."""
    image = place / "source.img"
    image.write_bytes(b"")
    os.truncate(image, 8 * MIB)
    pwrite(image, b"data", 5 * MIB)
    old = write_random(place / "old.img", 8 * MIB)
    source = hosts.start("source", {"vda": image})
    destination = hosts.start("destination", {"vda": old}, incoming="tcp:127.0.0.1:0")
    assert source.migrate(destination.uri).exit_code == 0
    assert_same(source, destination, "vda")
    assert old.stat().st_blocks * 512 <= 2 * MIB


def test_a_block_device_moves_to_a_block_device_and_to_a_file(hosts: Hosts, place: Path) -> None:
    """Loop devices serve as images on both sides; the size need not be a multiple of a MiB."""
    size = 6 * MIB + 1024
    backing = write_random(place / "backing", size)
    other = write_random(place / "other", size, seed=2)
    with loop_device(backing) as here, loop_device(other) as there:
        source = hosts.start("source", {"vda": here}, state_dir=place / "here")
        first = hosts.start("first", {"vda": there}, incoming="tcp:127.0.0.1:0", state_dir=place / "there")
        try:
            assert source.file().stat().st_size == size
            pwrite(source.file(), b"through the mount", 4096)
            assert source.migrate(first.uri).exit_code == 0
            second = hosts.destination()
            assert first.migrate(second.uri).exit_code == 0
            assert source.stop() == 0
            assert first.stop() == 0
            assert backing.read_bytes() == other.read_bytes() == second.images["vda"].read_bytes()
            assert other.read_bytes()[4096:].startswith(b"through the mount")
        finally:
            source.stop()
            first.stop()


def test_a_block_device_needs_a_directory_for_its_state(hosts: Hosts, place: Path) -> None:
    """/dev is emptied by a reboot, so what says who owns the disk may not lie there."""
    with loop_device(write_random(place / "backing", MIB)) as device:
        done = hosts.make("source", {"vda": device}).serve()
    assert done.exit_code == 2
    assert "is a block device" in done.stderr
    assert "--state-dir" in done.stderr
    assert not device.with_name(f"{device.name}.fusemig").exists()


def test_a_whole_group_is_handed_over_at_once(hosts: Hosts, place: Path) -> None:
    """Without --disk every writable disk goes; a read-only one stays and is not counted."""
    disks = {f"vd{letter}": write_random(place / f"{letter}.img", 2 * MIB, ord(letter)) for letter in "abcd"}
    fixed = write_random(place / "fixed.img", MIB)
    source = hosts.start("source", {**disks, "cd": fixed}, readonly=["cd"])
    destination = hosts.destination(*disks)
    assert source.migrate(destination.uri).exit_code == 0
    assert_same(source, destination, *disks)
    assert [disk["name"] for disk in source.migration()["x-fusemig"]["disks"]] == list(disks)
    assert source.migration()["disk"]["total"] == 8 * MIB
    for name in disks:
        with pytest.raises(OSError, match="Read-only") as refused:
            pwrite(source.file(name), b"x")
        assert refused.value.errno == errno.EROFS
        pwrite(destination.file(name), b"x")
    assert pread(source.file("cd"), MIB) == fixed.read_bytes()


def test_a_read_only_disk_cannot_be_chosen(hosts: Hosts, place: Path) -> None:
    """It has nothing to hand off, and the refusal says so."""
    source = hosts.start(
        "source",
        {"vda": write_random(place / "a.img", MIB), "cd": write_random(place / "cd.img", MIB)},
        readonly=["cd"],
    )
    done = source.migrate("tcp:127.0.0.1:1", "--disk", "cd")
    assert done.stderr == "fusemig: disk 'cd' is read-only here, so there is nothing to hand off\n"
    assert done.exit_code == 1
    assert source.phase() == "none"


def test_chosen_disks_go_and_the_others_stay(hosts: Hosts, place: Path) -> None:
    """--disk picks; what was not picked goes on being written, and can go elsewhere later."""
    disks = {name: write_random(place / f"{name}.img", 2 * MIB, seed) for seed, name in enumerate(["vda", "vdb"])}
    source = hosts.start("source", disks)
    first = hosts.destination("vdb")
    assert source.migrate(first.uri, "--disk", "vdb").exit_code == 0
    assert_same(source, first, "vdb")
    assert source.disk("vda")["gate"] == "open"
    assert source.disk("vdb")["state"] == "released"
    pwrite(source.file("vda"), b"still here")
    with pytest.raises(OSError, match="Read-only"):
        pwrite(source.file("vdb"), b"gone")
    second = hosts.destination("vda")
    assert source.migrate(second.uri).exit_code == 0
    assert_same(source, second, "vda")


def test_an_unknown_disk_cannot_be_chosen(hosts: Hosts, place: Path) -> None:
    """The refusal names what is served."""
    source = hosts.start("source", {"vda": write_random(place / "a.img", MIB)})
    done = source.migrate("tcp:127.0.0.1:1", "--disk", "vdz")
    assert done.stderr == "fusemig: Device 'vdz' not found; served are: vda\n"
    assert done.exit_code == 2


def test_there_and_back_again(hosts: Hosts, place: Path) -> None:
    """The disk returns into the image that was released, with what was written on the way."""
    first = hosts.start("first", {"vda": write_random(place / "a.img", 4 * MIB)})
    second = hosts.destination()
    assert first.migrate(second.uri).exit_code == 0
    pwrite(second.file(), b"written at the second host", MIB)
    assert first.stop() == 0
    again = hosts.start("again", first.images, incoming="tcp:127.0.0.1:0")
    with pytest.raises(OSError, match="Read-only"):
        pwrite(again.file(), b"too early")
    assert second.migrate(again.uri).exit_code == 0
    assert again.disk()["epoch"] == 2
    pwrite(again.file(), b"home", 2 * MIB)
    assert pread(again.file(), 26, MIB) == b"written at the second host"
    with pytest.raises(OSError, match="Read-only"):
        pwrite(second.file(), b"too late")
    # And once more, while both daemons run on: each is now a source and a destination.
    assert again.migrate(second.uri).exit_code == 0
    assert second.migrate(again.uri).exit_code == 0
    assert again.disk()["epoch"] == 4
    assert pread(again.file(), 4, 2 * MIB) == b"home"
    pwrite(again.file(), b"owner")
    assert second.stop() == 0
    assert again.stop() == 0


def test_a_unix_socket_carries_a_migration(hosts: Hosts, place: Path) -> None:
    """--incoming unix:PATH; the socket file is gone at the end."""
    source = hosts.start("source", {"vda": write_random(place / "a.img", 3 * MIB)})
    socket = place / "incoming"
    destination = hosts.start("destination", {"vda": place / "b.img"}, incoming=f"unix:{socket}")
    assert source.migrate(f"unix:{socket}").exit_code == 0
    assert_same(source, destination, "vda")
    assert destination.stop() == 0
    assert not socket.exists()
