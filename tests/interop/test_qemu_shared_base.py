"""A real QEMU runs `migrate` with `inc`, from a qcow2 overlay over a base, to a fusemig that has one too."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from fusemig.core.units import CHUNK_SIZE
from support.doorkeeper import Sluice
from support.hosts import pread, pwrite, wait_until
from support.qemu import DEADLINE_S, Drive, Qemu, is_available

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from support.hosts import Host, Hosts

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.qemu,
    pytest.mark.skipif(not is_available(), reason="needs a QEMU older than 9.1: tools/setup test"),
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-utils: tools/setup test"),
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no access to /dev/fuse"),
]

SIZE = 24 * CHUNK_SIZE + 1536
UNHURRIED = {"downtime_limit": 1, "max_bandwidth": 500 << 20}
"""Parameters with which QEMU 7.2 to 9.0 finishes its bulk phase."""


def run(*command: object) -> None:
    """Run a program of QEMU's."""
    subprocess.run([str(word) for word in command], check=True, timeout=DEADLINE_S, stdout=subprocess.DEVNULL)


def make_base(path: Path, size: int = SIZE) -> Path:
    """Store a base: random bytes with a hole in the middle."""
    with path.open("wb") as file:
        file.truncate(size)
        rng = random.Random(1)
        for chunk in range(size // CHUNK_SIZE):
            if chunk % 8 != 5:
                os.pwrite(file.fileno(), rng.randbytes(CHUNK_SIZE), chunk * CHUNK_SIZE)
    return path


def make_overlay(path: Path, base: Path, *writes: str) -> Drive:
    """Make a qcow2 overlay in which ``writes`` were made; return it as QEMU's drive `vda`."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path)
    for write in writes:
        run("qemu-io", "-c", write, path)
    return Drive("vda", path, "qcow2")


def converted(drive: Drive) -> bytes:
    """Return what a guest of the QEMU reads from a drive."""
    raw = drive.path.with_suffix(".converted")
    run("qemu-img", "convert", "-f", drive.format, "-O", "raw", drive.path, raw)
    return raw.read_bytes()


def start_destination(hosts: Hosts, bases: dict[str, Path], *, raw: tuple[str, ...] = (), size: int = SIZE) -> Host:
    """Start a destination with overlays over ``bases``, which do not exist yet, and with raw disks."""
    images = {name: hosts.directory / f"{name}.overlay.img" for name in bases}
    for name in raw:
        images[name] = hosts.directory / f"{name}.img"
        images[name].write_bytes(b"\xee" * size)
    return hosts.start("destination", images, incoming="tcp:127.0.0.1:0", bases=bases)


def wait_over(destination: Host) -> dict[str, Any]:
    """Wait for the end of the incoming migration; return ``query-migrate``."""
    wait_until(lambda: destination.phase() in ("completed", "failed"), "the end of the incoming migration")
    return destination.migration()


@pytest.mark.parametrize("return_path", [False, True])
def test_a_shared_base(hosts: Hosts, return_path: bool) -> None:
    """Only what the overlay holds comes, also what a guest writes meanwhile; a raw disk beside it comes as a whole."""
    drive = make_overlay(
        hosts.directory / "source.qcow2",
        make_base(hosts.directory / "golden.source.raw"),
        "write -P 7 2M 64k",
        "write -P 8 11000k 300k",
        "write -z 17M 1M",
    )
    other = Drive("vdb", hosts.directory / "vdb.raw")
    other.path.write_bytes(random.Random(2).randbytes(3 * CHUNK_SIZE + 512))
    golden = make_base(hosts.directory / "golden.raw")
    destination = start_destination(hosts, {"vda": golden}, raw=("vdb",), size=3 * CHUNK_SIZE + 512)
    with Sluice(destination.uri) as sluice, Qemu(hosts.directory, drives=[drive, other]) as qemu:
        qemu.set_capabilities(return_path=return_path)
        qemu.execute("migrate-set-parameters", **UNHURRIED)
        sluice.let(CHUNK_SIZE + CHUNK_SIZE // 2)
        qemu.start_migration(sluice.uri, incremental=True)
        wait_until(lambda: destination.migration().get("disk", {}).get("transferred", 0) >= CHUNK_SIZE, "a chunk")
        qemu.monitor('qemu-io vda "write -P 9 2100k 9k"')  # sent already
        qemu.monitor('qemu-io vda "write -P 9 20M 4k"')  # the base's until now
        sluice.open()
        assert qemu.wait_migration()["status"] == "completed"
        info = wait_over(destination)
        assert info["status"] == "completed", info
    expected = converted(drive)
    assert expected[20 << 20 : (20 << 20) + 4096] == b"\x09" * 4096
    assert destination.file().read_bytes() == expected
    assert destination.file("vdb").read_bytes() == other.path.read_bytes()
    image = destination.images["vda"]
    assert image.stat().st_blocks * 512 <= 5 * CHUNK_SIZE, "what is the base's takes no space"
    # Guests write above the base, and all of it is there after a restart.
    pwrite(destination.file(), b"taken over", 5000)
    assert destination.stop() == 0
    again = hosts.start("again", {"vda": image}, bases={"vda": golden})
    assert again.file().read_bytes() == expected[:5000] + b"taken over" + expected[5010:]
    assert golden.read_bytes() == (hosts.directory / "golden.source.raw").read_bytes()


def test_what_a_failed_attempt_left_is_forgotten(hosts: Hosts) -> None:
    """A chunk that came in an attempt that was cancelled, and is the base's in the next one, reads as the base."""
    base = make_base(hosts.directory / "golden.source.raw")
    first = make_overlay(hosts.directory / "first.qcow2", base, "write -P 7 0 12M")
    second = make_overlay(hosts.directory / "second.qcow2", base, "write -P 8 20M 64k")
    destination = start_destination(hosts, {"vda": make_base(hosts.directory / "golden.raw")})
    with Sluice(destination.uri) as sluice, Qemu(hosts.directory, drives=[first]) as qemu:
        sluice.let(2 * CHUNK_SIZE)
        qemu.start_migration(sluice.uri, incremental=True)
        wait_until(lambda: destination.migration().get("disk", {}).get("transferred", 0) >= CHUNK_SIZE, "a chunk")
        qemu.execute("migrate_cancel")
        sluice.open()
        assert qemu.wait_migration()["status"] == "cancelled"
        assert wait_over(destination)["status"] == "failed"
    # QEMU reads chunks side by side and sends them as they come, so it need not be the first that has come.
    assert b"\x07" * 4 in [pread(destination.file(), 4, chunk * CHUNK_SIZE) for chunk in range(12)]
    with Qemu(hosts.directory, drives=[second]) as qemu:
        qemu.execute("migrate-set-parameters", **UNHURRIED)
        qemu.start_migration(destination.uri, incremental=True)
        assert qemu.wait_migration()["status"] == "completed"
        wait_until(lambda: destination.disk()["state"] == "owner", "the take-over")
    assert destination.file().read_bytes() == converted(second)


def test_without_a_base(hosts: Hosts) -> None:
    """A raw destination lacks what was left out, and is not taken over; a whole migration then succeeds."""
    base = make_base(hosts.directory / "golden.source.raw")
    drive = make_overlay(hosts.directory / "source.qcow2", base, "write -P 7 2M 64k")
    destination = start_destination(hosts, {}, raw=("vda",))
    with Qemu(hosts.directory, drives=[drive]) as qemu:
        qemu.set_capabilities(return_path=True)
        qemu.execute("migrate-set-parameters", **UNHURRIED)
        qemu.start_migration(destination.uri, incremental=True)
        assert qemu.wait_migration()["status"] == "failed"
        error = wait_over(destination)["error-desc"]
        assert "never sent: bytes 'vda' 0-2097151, 'vda' 3145728-25167359" in error
        assert "Or it was to leave out what a base has (`inc`): then give the disk here its base" in error
        assert destination.disk()["state"] == "incoming"
        assert destination.disk()["gate"] == "read-only"
        qemu.execute("cont")
        qemu.start_migration(destination.uri)
        assert qemu.wait_migration()["status"] == "completed"
        wait_until(lambda: destination.disk()["state"] == "owner", "the take-over")
    assert destination.file().read_bytes() == converted(drive)


def test_a_base_of_another_size(hosts: Hosts) -> None:
    """A smaller one has no place for what comes; a larger one does not fit its overlay; neither is taken over."""
    base = make_base(hosts.directory / "golden.source.raw")
    drive = make_overlay(hosts.directory / "source.qcow2", base, "write -P 7 23M 64k")
    small = make_base(hosts.directory / "small.raw", 20 * CHUNK_SIZE)
    destination = start_destination(hosts, {"vda": small})
    with Qemu(hosts.directory, drives=[drive]) as qemu:
        qemu.set_capabilities(return_path=True)
        qemu.execute("migrate-set-parameters", **UNHURRIED)
        qemu.start_migration(destination.uri, incremental=True)
        assert qemu.wait_migration()["status"] == "failed"
    assert (
        "sector 47104 is beyond the end of block device 'vda', which has 40960" in wait_over(destination)["error-desc"]
    )
    assert destination.disk()["gate"] == "read-only"
    assert destination.stop() == 0
    large = make_base(hosts.directory / "large.raw", SIZE + CHUNK_SIZE)
    done = hosts.make(
        "large", {"vda": destination.images["vda"]}, incoming="tcp:127.0.0.1:0", bases={"vda": large}
    ).serve()
    assert done.exit_code == 2
    assert f"it has {SIZE + CHUNK_SIZE} bytes, not {20 * CHUNK_SIZE}" in done.stderr


@pytest.mark.parametrize("return_path", [False, True])
def test_an_early_finish(hosts: Hosts, return_path: bool) -> None:
    """With its default parameters QEMU forgets much of an overlay: only its progress tells, and it does."""
    base = make_base(hosts.directory / "golden.source.raw", 96 * CHUNK_SIZE)
    drive = make_overlay(hosts.directory / "source.qcow2", base, "write -P 7 0 80M")
    golden = make_base(hosts.directory / "golden.raw", 96 * CHUNK_SIZE)
    destination = start_destination(hosts, {"vda": golden})
    with Qemu(hosts.directory, drives=[drive]) as qemu:
        qemu.set_capabilities(return_path=return_path)
        qemu.start_migration(destination.uri, incremental=True)
        there = qemu.wait_migration()["status"]
        info = wait_over(destination)
        if info["status"] == "completed":  # it was quick enough this time: then everything must be here
            assert destination.file().read_bytes() == converted(drive)
            pytest.skip("this QEMU sent all that the overlay holds")
        assert there == "failed" or not return_path, "a source with a return path must hear of it"
        error = info["error-desc"]
        assert "not taken over: the source finished before it had read its disks: its last progress was" in error
        assert "b5280437a7f4" in error
        assert destination.disk()["state"] == "incoming"
        assert destination.disk()["gate"] == "read-only"
        qemu.execute("cont")
        qemu.execute("migrate-set-parameters", **UNHURRIED)
        qemu.start_migration(destination.uri, incremental=True)
        assert qemu.wait_migration()["status"] == "completed"
        wait_until(lambda: destination.disk()["state"] == "owner", "the take-over")
    assert destination.file().read_bytes() == converted(drive)
