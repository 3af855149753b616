"""A real `fusemig migrate --wire qemu` into a real QEMU with `-incoming`, and into another fusemig."""

from __future__ import annotations

import os
import random
import threading
from typing import TYPE_CHECKING

import pytest

from fusemig.core.units import CHUNK_SIZE
from support.hosts import assert_migrates, assert_unharmed, pread, pwrite, wait_until, write_random
from support.qemu import MACHINE, Drive, Qemu, QemuError, disk_bytes, is_available

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no access to /dev/fuse"),
]
needs_qemu = pytest.mark.skipif(not is_available(), reason="needs a QEMU older than 9.1: tools/setup test")

ODD = 5 * CHUNK_SIZE + 1536
TO_QEMU = ("--wire", "qemu", "--machine", MACHINE)


def make_source(hosts: Hosts, contents: dict[str, bytes]) -> Host:
    """Start a source with disks, in which what is zero is a hole."""
    images = {}
    for name, content in contents.items():
        images[name] = hosts.directory / f"{name}.source.img"
        with images[name].open("wb") as file:
            file.truncate(len(content))
            for at in range(0, len(content), 4096):
                if any(content[at : at + 4096]):
                    os.pwrite(file.fileno(), content[at : at + 4096], at)
    return hosts.start("source", images)


def make_drives(directory: Path, sizes: dict[str, int]) -> list[Drive]:
    """Make QEMU's disks, full of what must be overwritten."""
    drives = []
    for name, size in sizes.items():
        drives.append(Drive(name, directory / f"{name}.qemu.raw"))
        drives[-1].path.write_bytes(b"\xee" * size)
    return drives


def uri_of(qemu: Qemu) -> str:
    """Return where an incoming QEMU listens."""
    (address,) = qemu.migration()["socket-address"]
    return f"tcp:{address['host']}:{address['port']}"


def assert_given_away(source: Host, name: str) -> None:
    """See that a disk is read-only for good."""
    assert source.disk(name)["state"] == "handed-off"
    assert source.disk(name)["gate"] == "read-only"
    with pytest.raises(OSError, match="Read-only file system"):
        pwrite(source.file(name), b"x")


@needs_qemu
@pytest.mark.qemu
def test_to_qemu(hosts: Hosts) -> None:
    """QEMU's disks are what the source's are: holes, zeros, an odd size; and the source never writes again."""
    contents = {"vda": disk_bytes(ODD, seed=1), "vdb": os.urandom(3 * CHUNK_SIZE), "vdc": bytes(4 * CHUNK_SIZE)}
    source = make_source(hosts, contents)
    drives = make_drives(hosts.directory, {name: len(content) for name, content in contents.items()})
    with Qemu(hosts.directory, drives=drives, incoming="tcp:127.0.0.1:0") as qemu:
        done = source.migrate(uri_of(qemu), *TO_QEMU)
        assert done.exit_code == 0, done.stderr
        assert qemu.wait_migration()["status"] == "completed"
    assert "warning: QEMU's wire has no acknowledgement" in done.stderr
    for drive in drives:
        assert drive.path.read_bytes() == contents[drive.name]
        assert_given_away(source, drive.name)
    info = source.migration()
    assert info["x-fusemig"]["wire"] == "qemu"
    assert info["disk"]["remaining"] == 0
    # A restart does not give the disks back.
    assert source.stop() == 0
    again = hosts.start("again", source.images)
    for name in contents:
        assert_given_away(again, name)


class Guest:
    """Writes to a disk, as fast as it can, what it then expects to find on the other side."""

    def __init__(self, path: Path, content: bytes) -> None:
        """Begin at once."""
        self._path = path
        self.model = bytearray(content)
        self.n_writes = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        rng = random.Random(7)
        fd = os.open(self._path, os.O_WRONLY | os.O_DSYNC)
        try:
            while self._write(fd, rng):
                self.n_writes += 1
        finally:
            os.close(fd)

    def _write(self, fd: int, rng: random.Random) -> bool:
        length = rng.choice((512, 4096, 20_000))
        # The last chunk and the one before it overlap on the wire: write there often.
        low = len(self.model) - 2 * CHUNK_SIZE if rng.random() < 0.5 else 0
        offset = rng.randrange(low, len(self.model) - length)
        data = rng.randbytes(length)
        try:
            n = os.pwrite(fd, data, offset)  # fewer than asked for, when the disk goes in the middle of it
        except OSError:
            return False
        self.model[offset : offset + n] = data[:n]
        return True

    def join(self) -> None:
        """Wait for the write that is refused."""
        self._thread.join(30)
        assert not self._thread.is_alive()


@needs_qemu
@pytest.mark.qemu
def test_to_qemu_while_a_guest_writes(hosts: Hosts) -> None:
    """Every write that was acknowledged is in QEMU's image, dirty passes and the overlapping tail included."""
    content = os.urandom(24 * CHUNK_SIZE + 512)
    source = make_source(hosts, {"vda": content})
    drives = make_drives(hosts.directory, {"vda": len(content)})
    with Qemu(hosts.directory, drives=drives, incoming="tcp:127.0.0.1:0") as qemu:
        guest = Guest(source.file(), content)
        try:
            done = source.migrate(uri_of(qemu), *TO_QEMU, "--downtime-limit", "2s")
        finally:
            if source.disk()["gate"] != "read-only":
                source.stop()
            guest.join()
        assert done.exit_code == 0, done.stderr
        assert qemu.wait_migration()["status"] == "completed"
    assert source.migration()["disk"]["dirty-sync-count"] >= 3
    assert guest.n_writes > 10
    image = source.images["vda"].read_bytes()
    assert image == guest.model
    assert drives[0].path.read_bytes() == image


@needs_qemu
@pytest.mark.qemu
def test_a_qemu_of_another_machine(hosts: Hosts) -> None:
    """QEMU hangs up; the source serves on, and says what QEMU insists on."""
    content = os.urandom(16 * CHUNK_SIZE)
    source = make_source(hosts, {"vda": content})
    drives = make_drives(hosts.directory, {"vda": len(content)})
    with Qemu(hosts.directory, drives=drives, incoming="tcp:127.0.0.1:0") as qemu:
        done = source.migrate(uri_of(qemu), "--wire", "qemu")
        with pytest.raises(QemuError, match="Machine type received is 'fusemig'"):
            qemu.wait_migration()
    assert done.exit_code == 1
    assert_unharmed(source)
    assert source.images["vda"].read_bytes()[:CHUNK_SIZE] == content[:CHUNK_SIZE]


def test_to_fusemig(hosts: Hosts) -> None:
    """Between two fusemigs the wire works too; only the destination may write afterwards."""
    content = os.urandom(ODD)
    source = make_source(hosts, {"vda": content})
    image = hosts.directory / "destination.img"
    image.write_bytes(b"\xee" * ODD)
    destination = hosts.start("destination", {"vda": image}, incoming="tcp:127.0.0.1:0")
    done = source.migrate(destination.uri, "--wire", "qemu")
    assert done.exit_code == 0, done.stderr
    assert "no acknowledgement" in done.stderr
    destination.wait_phase("completed")
    assert image.read_bytes() == content
    assert_given_away(source, "vda")
    pwrite(destination.file(), b"taken over")
    assert pread(destination.file(), 10) == b"taken over"


def test_a_destination_without_the_image(hosts: Hosts) -> None:
    """It hangs up, for it cannot know the size; the source serves on, and the native wire needs no image."""
    source = hosts.start("source", {"vda": write_random(hosts.directory / "a.img", 16 * CHUNK_SIZE)})
    destination = hosts.destination()
    done = source.migrate(destination.uri, "--wire", "qemu")
    assert done.exit_code == 1
    wait_until(lambda: "truncate -s SIZE" in destination.log(), "the destination's word")
    assert_unharmed(source, destination)
    assert_migrates(source, destination)


def test_a_disk_that_qemu_cannot_load(hosts: Hosts) -> None:
    """A disk below 1 MiB is refused with the reason; `--machine` alone is refused too."""
    source = hosts.start("source", {"vda": write_random(hosts.directory / "a.img", 512 * 1024)})
    destination = hosts.destination()
    done = source.migrate(destination.uri, "--wire", "qemu")
    assert done.exit_code == 2
    assert "smaller than 1 MiB" in done.stderr
    done = source.migrate(destination.uri, "--machine", MACHINE)
    assert "'x-fusemig-machine' goes with 'x-fusemig-wire' qemu" in done.stderr
    assert done.exit_code != 0
    assert_migrates(source, destination)
