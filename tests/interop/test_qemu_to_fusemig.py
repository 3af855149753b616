"""A real QEMU runs `migrate` with `blk` to a real `fusemig serve --incoming`."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from fusemig.core.units import CHUNK_SIZE
from support.doorkeeper import Sluice
from support.hosts import pread, pwrite, wait_until
from support.qemu import Drive, Qemu, disk_bytes, is_available

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.qemu,
    pytest.mark.skipif(not is_available(), reason="needs a QEMU older than 9.1: tools/setup test"),
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no access to /dev/fuse"),
]

ODD = 5 * CHUNK_SIZE + 1536
UNHURRIED = {"downtime_limit": 1, "max_bandwidth": 500 << 20}
"""Parameters with which QEMU 7.2 to 9.0 finishes its bulk phase."""
BUG = "b5280437a7f4"


def make_drives(directory: Path, contents: dict[str, bytes]) -> list[Drive]:
    """Store QEMU's disks."""
    drives = []
    for name, content in contents.items():
        path = directory / f"{name}.qemu.raw"
        path.write_bytes(content)
        drives.append(Drive(name, path))
    return drives


def make_destination(hosts: Hosts, sizes: dict[str, int], wire: str | None = None) -> Host:
    """Start a destination with images of the right size, full of what must be overwritten."""
    images = {}
    for name, size in sizes.items():
        images[name] = hosts.directory / f"{name}.img"
        images[name].write_bytes(b"\xee" * size)
    return hosts.start("destination", images, incoming="tcp:127.0.0.1:0", wire=wire)


def wait_over(destination: Host) -> dict[str, object]:
    """Wait for the end of the incoming migration; return ``query-migrate``."""
    wait_until(lambda: destination.phase() in ("completed", "failed"), "the end of the incoming migration")
    return destination.migration()


def wait_received(destination: Host, n_bytes: int) -> None:
    """Wait until so much has come."""
    wait_until(lambda: destination.migration().get("disk", {}).get("transferred", 0) >= n_bytes, f"{n_bytes} bytes")


def assert_not_taken(destination: Host, name: str) -> None:
    """See that a disk waits, incomplete, and cannot be written."""
    assert destination.disk(name)["state"] == "incoming"
    assert destination.disk(name)["gate"] == "read-only"
    with pytest.raises(OSError, match="Read-only file system"):
        pwrite(destination.file(name), b"x")


@pytest.mark.parametrize("return_path", [False, True])
@pytest.mark.parametrize("zero_blocks", [False, True])
def test_two_disks(hosts: Hosts, zero_blocks: bool, return_path: bool) -> None:
    """Both arrive byte for byte, one with a short last chunk; QEMU ends with `completed`, and guests can write."""
    contents = {"vda": disk_bytes(ODD, seed=1), "vdb": os.urandom(3 * CHUNK_SIZE)}
    drives = make_drives(hosts.directory, contents)
    destination = make_destination(hosts, {name: len(content) for name, content in contents.items()}, "qemu")
    events_on = {"capability": "events", "state": True}
    destination.qmp.execute("migrate-set-capabilities", {"capabilities": [events_on]})
    with Qemu(hosts.directory, drives=drives) as qemu:
        qemu.set_capabilities(zero_blocks=zero_blocks, return_path=return_path)
        qemu.execute("migrate-set-parameters", **UNHURRIED)
        qemu.start_migration(destination.uri)
        assert qemu.wait_migration()["status"] == "completed"
        info = wait_over(destination)
    assert info["status"] == "completed", info
    for name, content in contents.items():
        assert destination.images[name].read_bytes() == content
        assert destination.disk(name)["state"] == "owner"
        pwrite(destination.file(name), b"taken over", 512)
        assert pread(destination.file(name), 10, 512) == b"taken over"
    assert destination.images["vda"].stat().st_blocks * 512 < ODD, "what reads as zeros is a hole"
    own = info["x-fusemig"]
    assert isinstance(own, dict)
    assert (own["wire"], own["role"]) == ("qemu", "destination")
    events = destination.qmp.event_names()
    assert events == ["MIGRATION setup", "MIGRATION active", "RESUME", "MIGRATION completed"]


def test_a_guest_that_writes_meanwhile(hosts: Hosts) -> None:
    """What is written after it was sent comes again."""
    content = os.urandom(24 * CHUNK_SIZE)
    drives = make_drives(hosts.directory, {"vda": content})
    destination = make_destination(hosts, {"vda": len(content)})
    with Sluice(destination.uri) as sluice, Qemu(hosts.directory, drives=drives) as qemu:
        qemu.execute("migrate-set-parameters", **UNHURRIED)
        sluice.let(2 * CHUNK_SIZE)
        qemu.start_migration(sluice.uri)
        wait_received(destination, CHUNK_SIZE)
        qemu.monitor('qemu-io vda "write -P 0x5a 512k 1M"')
        sluice.open()
        assert qemu.wait_migration()["status"] == "completed"
        assert wait_over(destination)["status"] == "completed"
    expected = drives[0].path.read_bytes()
    assert expected != content
    assert destination.images["vda"].read_bytes() == expected


@pytest.mark.parametrize("zero_blocks", [False, True])
def test_guests_that_write_all_the_time(hosts: Hosts, zero_blocks: bool) -> None:
    """Two disks, written everywhere for as long as chunks come: at their short ends, in holes, with zeros, again."""
    rng = random.Random(3)
    contents = {"vda": disk_bytes(24 * CHUNK_SIZE + 1536, seed=1), "vdb": os.urandom(8 * CHUNK_SIZE + 512)}
    drives = make_drives(hosts.directory, contents)
    destination = make_destination(hosts, {name: len(content) for name, content in contents.items()})
    with Sluice(destination.uri) as sluice, Qemu(hosts.directory, drives=drives) as qemu:
        qemu.set_capabilities(zero_blocks=zero_blocks, return_path=True)
        qemu.execute("migrate-set-parameters", **UNHURRIED)
        sluice.let(CHUNK_SIZE // 2)
        qemu.start_migration(sluice.uri)
        for n_received in range(1, 9):
            sluice.let(CHUNK_SIZE)
            wait_received(destination, n_received * CHUNK_SIZE)
            for name, content in contents.items():
                n_sectors = len(content) // 512
                for first in (rng.randrange(n_sectors - 40), n_sectors - 1 - rng.randrange(4)):
                    n = min(rng.randrange(1, 40), n_sectors - first)
                    kind = "-z" if rng.random() < 0.2 else f"-P {rng.randrange(1, 256)}"
                    qemu.monitor(f'qemu-io {name} "write {kind} {first * 512} {n * 512}"')
        assert qemu.migration()["status"] == "active"
        sluice.open()
        assert qemu.wait_migration()["status"] == "completed"
        info = wait_over(destination)
    assert info["status"] == "completed", info
    for drive in drives:
        expected = drive.path.read_bytes()
        assert expected != contents[drive.name]
        assert expected[-2048:] != contents[drive.name][-2048:]
        assert destination.images[drive.name].read_bytes() == expected


@pytest.mark.parametrize("return_path", [False, True])
def test_early_finish(hosts: Hosts, return_path: bool) -> None:
    """With its default parameters QEMU forgets half of a disk: it is not taken over, and the next attempt succeeds."""
    content = os.urandom(4096).ljust(CHUNK_SIZE, b"x") * 64
    drives = make_drives(hosts.directory, {"vda": content})
    destination = make_destination(hosts, {"vda": len(content)})
    with Qemu(hosts.directory, drives=drives) as qemu:
        qemu.set_capabilities(return_path=return_path)
        qemu.start_migration(destination.uri)
        there = qemu.wait_migration()["status"]
        info = wait_over(destination)
        if info["status"] == "completed":  # it was quick enough this time: then everything must be here
            assert destination.images["vda"].read_bytes() == content
            pytest.skip("this QEMU sent the whole disk")
        assert there == "failed" or not return_path, "a source with a return path must hear of it"
        error = str(info["error-desc"])
        assert "not taken over: the source reported success with" in error
        assert "never sent: bytes 'vda' " in error
        assert BUG in error
        assert_not_taken(destination, "vda")
        # As the text says: the guest runs on there, and the next attempt is made with other parameters.
        qemu.execute("cont")
        qemu.execute("migrate-set-parameters", **UNHURRIED)
        qemu.start_migration(destination.uri)
        assert qemu.wait_migration()["status"] == "completed"
        wait_until(lambda: destination.disk("vda")["state"] == "owner", "the take-over")
        assert destination.images["vda"].read_bytes() == content


def test_a_missing_image(hosts: Hosts) -> None:
    """The stream tells no size: the error says how to make the image, and after that the same daemon receives it."""
    content = os.urandom(16 * CHUNK_SIZE)
    drives = make_drives(hosts.directory, {"vda": content})
    destination = hosts.destination()
    image = destination.images["vda"]
    with Qemu(hosts.directory, drives=drives) as qemu:
        qemu.execute("migrate-set-parameters", **UNHURRIED)
        qemu.start_migration(destination.uri)
        assert qemu.wait_migration()["status"] == "failed"
        wait_until(lambda: destination.status()["incoming"]["rejected-connections"] == 1, "the rejection")
        assert f"truncate -s SIZE {image}" in destination.log()
        assert destination.disk()["state"] == "waiting"
        with image.open("wb") as file:
            file.truncate(len(content))
        qemu.start_migration(destination.uri)
        assert qemu.wait_migration()["status"] == "completed"
        assert wait_over(destination)["status"] == "completed"
    assert image.read_bytes() == content
    assert destination.file().stat().st_size == len(content)


def test_a_source_that_is_cancelled(hosts: Hosts) -> None:
    """A cancelled migration takes nothing over; the images wait on."""
    content = os.urandom(16 * CHUNK_SIZE)
    drives = make_drives(hosts.directory, {"vda": content})
    destination = make_destination(hosts, {"vda": len(content)})
    with Sluice(destination.uri) as sluice, Qemu(hosts.directory, drives=drives) as qemu:
        sluice.let(2 * CHUNK_SIZE)
        qemu.start_migration(sluice.uri)
        wait_received(destination, CHUNK_SIZE)
        qemu.execute("migrate_cancel")
        sluice.open()
        assert qemu.wait_migration()["status"] == "cancelled"
        info = wait_over(destination)
    assert info["status"] == "failed"
    assert "QEMU has stopped or was cancelled" in str(info["error-desc"])
    assert_not_taken(destination, "vda")


def test_a_pinned_native_destination(hosts: Hosts) -> None:
    """`--wire native` refuses QEMU with the option to change, and marks nothing."""
    content = os.urandom(16 * CHUNK_SIZE)
    drives = make_drives(hosts.directory, {"vda": content})
    destination = make_destination(hosts, {"vda": len(content)}, "native")
    with Qemu(hosts.directory, drives=drives) as qemu:
        qemu.execute("migrate-set-parameters", **UNHURRIED)
        qemu.start_migration(destination.uri)
        assert qemu.wait_migration()["status"] == "failed"
    wait_until(lambda: destination.status()["incoming"]["rejected-connections"] == 1, "the rejection")
    assert "serve with --wire auto or --wire qemu" in destination.log()
    assert destination.disk()["state"] == "waiting"


def test_a_pinned_wire_without_incoming(hosts: Hosts) -> None:
    """An option that would have no effect is refused."""
    image = hosts.directory / "vda.img"
    image.write_bytes(bytes(CHUNK_SIZE))
    done = hosts.make("plain", {"vda": image}, wire="qemu").serve()
    assert done.exit_code == 2
    assert done.stderr == "fusemig: --wire qemu says what --incoming takes: add --incoming URI, or leave it out\n"
