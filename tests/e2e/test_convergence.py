"""Guests that write more than the link carries: mirrored, held, throttled; and let go whatever happens."""

from __future__ import annotations

import filecmp
import mmap
import os
import random
import subprocess
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest

from fusemig.wire.native import FrameType
from support.hosts import MIB, QmpRefusedError, assert_unharmed, pread, pwrite, wait_until, write_random
from support.loops import run
from support.proxy import Fault, FaultProxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse

BLOCK = 4096
LINK = 16 * MIB
"""Bytes per second."""
BUSY = 24 * MIB
"""Size of the disks of busy guests: a pass over everything takes one and a half seconds."""
SLOW = ("--max-bandwidth", str(LINK), "--downtime-limit", "4ms")
"""Nothing is ever sent faster but in a freeze, so that must not be an easy way out."""


def pacing(source: Host) -> dict[str, Any]:
    """Return what the migration does to its guests."""
    now: dict[str, Any] = source.migration()["x-fusemig"]["pacing"]
    return now


def is_reached(source: Host, reach: str) -> bool:
    """Tell whether this is mirrored."""
    return bool(pacing(source)["mirror"] == reach)


@contextmanager
def busy_guest(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Have fio write at random places of a file, four times as much as the link carries, until it cannot."""
    command = [
        "fio", "--name=busy", f"--filename={path}", f"--size={BUSY}", "--rw=randwrite", "--bs=4k",
        "--ioengine=libaio", "--direct=1", "--iodepth=16", f"--rate={4 * LINK}", "--time_based", "--runtime=80",
        "--norandommap", "--allow_file_create=0",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as guest:
        try:
            yield guest
        finally:
            guest.kill()


def tell_events(source: Host) -> None:
    """Have the daemon send the events of migrations, as QEMU does only if asked."""
    one = {"capability": "events", "state": True}
    source.qmp.execute("migrate-set-capabilities", {"capabilities": [one]})


def told(source: Host) -> list[dict[str, Any]]:
    """Return what was told of pacing."""
    source.qmp.execute("query-status")
    return [event["data"] for event in source.qmp.events if event["event"] == "X_FUSEMIG_PACING"]


def finish(source: Host, destination: Host) -> None:
    """End both daemons and see that the images are equal."""
    assert source.stop() == 0
    assert destination.stop() == 0
    assert filecmp.cmp(source.images["vda"], destination.images["vda"], shallow=False)


@pytest.mark.qemu
@pytest.mark.parametrize(("lane", "lag"), [("data", "0"), pytest.param("pyfuse3", "20ms", marks=pytest.mark.nightly)])
def test_what_fio_wrote_while_it_was_mirrored_verifies_at_the_destination(
    hosts: Hosts, place: Path, lane: str, lag: str
) -> None:
    """In either lane; and with a lag of 0, a write that returned is in the destination's image."""
    image = write_random(place / "source.img", 8 * MIB)
    source = hosts.start("source", {"vda": image}, options=["--lane", lane])
    destination = hosts.destination(options=["--lane", lane])
    source.pause_before_switchover()
    migrate = source.start_migrate(destination.uri, "--mode", "mirror", "--mirror-lag", lag)
    assert source.wait_phase("pre-switchover")["x-fusemig"]["mode"] == "mirror"
    assert pacing(source)["mirror"] == "all"
    if lag == "0":
        rng = random.Random(1)
        for at in range(32):
            flags, data = os.O_DSYNC if at % 2 else os.O_DIRECT, rng.randbytes(BLOCK)
            offset = rng.randrange(8 * MIB // BLOCK) * BLOCK
            write_aligned(source.file(), data, offset, flags)
            assert pread(destination.images["vda"], BLOCK, offset) == data
    fio = [
        "fio", "--name=v", "--size=8m", "--rw=randwrite", "--bs=4k", "--ioengine=libaio", "--direct=1", "--iodepth=16",
        "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=7", "--allow_file_create=0",
    ]  # fmt: skip
    run(*fio, f"--filename={source.file()}", "--do_verify=0")
    assert pacing(source)["held-replies"] == 0
    assert source.command("continue").exit_code == 0
    assert migrate.finish().exit_code == 0
    run(*fio, f"--filename={destination.file()}", "--verify_only")
    finish(source, destination)


def write_aligned(path: Path, data: bytes, offset: int, flags: int) -> None:
    """Write a block from memory that O_DIRECT takes."""
    with mmap.mmap(-1, len(data)) as memory:
        memory[:] = data
        fd = os.open(path, os.O_WRONLY | flags)
        try:
            assert os.pwrite(fd, memory, offset) == len(data)
        finally:
            os.close(fd)


@pytest.mark.qemu
def test_passes_alone_do_not_end_and_mirroring_what_is_hot_does(hosts: Hosts) -> None:
    """A guest writes four times the link; the event, the status and the images say what became of it."""
    source, destination = hosts.pair(BUSY)
    tell_events(source)
    with busy_guest(source.file()) as guest:
        wait_until(lambda: source.disk()["dirty-bytes"] > 0, "fio's first write")
        migrate = source.start_migrate(destination.uri, *SLOW, "--no-auto-mirror")
        wait_until(lambda: source.migration().get("x-fusemig", {}).get("pass", 0) >= 4, "passes that do not help")
        assert pacing(source)["mirror"] == "none"
        assert source.migration()["disk"]["remaining"] > MIB  # sixteen times what the downtime limit allows
        source.set_parameters(x_fusemig_auto_mirror=True)
        assert migrate.finish().exit_code == 0
        said, _ = guest.communicate(timeout=40)
    assert "error=Read-only file system" in said
    assert {"mirror": "hot", "throttle-percentage": 0} in told(source)
    assert pacing(source)["mirror"] == "none"
    finish(source, destination)


@pytest.mark.qemu
def test_a_throttle_is_gentle_first_seen_while_it_lasts_and_ends_with_the_migration(hosts: Hosts) -> None:
    """The first step is 20 %, with events; after a cancel nothing is held back."""
    source, destination = hosts.pair(BUSY)
    tell_events(source)
    with busy_guest(source.file()):
        wait_until(lambda: source.disk()["dirty-bytes"] > 0, "fio's first write")
        migrate = source.start_migrate(destination.uri, *SLOW, "--no-auto-mirror", "--throttle-max", "50")
        wait_until(lambda: source.migration().get("x-fusemig", {}).get("pacing", {}).get("throttle-percentage"), "it")
        assert "guest writes throttled by" in source.command("status").stdout
        assert source.command("cancel").exit_code == 0
        assert migrate.finish().exit_code == 6
    assert pacing(source)["throttle-percentage"] == 0
    steps = [event["throttle-percentage"] for event in told(source)]
    assert steps[0] == 20
    assert steps[-1] == 0
    assert_unharmed(source, destination)


def test_a_silent_link_holds_no_write_for_long(hosts: Hosts) -> None:
    """With a lag of 0: the write is made, answered within the deadline and kept for the next try."""
    source, destination = hosts.pair(2 * MIB)
    with FaultProxy(destination.uri) as proxy:
        source.pause_before_switchover()
        migrate = source.start_migrate(proxy.uri, "--mode", "mirror", "--mirror-lag", "0")
        source.wait_phase("pre-switchover")
        proxy.arm(FrameType.DATA, Fault.STALL)
        pwrite(source.file(), b"held for a while" * 256, MIB, os.O_DSYNC)  # would hang here, and the watchdog bite
        assert proxy.struck.wait(40)
        assert pread(destination.images["vda"], BLOCK, MIB) != b"held for a while" * 256
        now = pacing(source)
        assert now["fallbacks"] == 1
        assert now["mirror"] == "none"
        pwrite(source.file(), b"not held" * 512, MIB, os.O_DSYNC)
        assert source.command("cancel").exit_code == 0
        assert migrate.finish().exit_code == 6
    assert_unharmed(source, destination)


def test_the_mode_is_changed_while_it_runs(hosts: Hosts) -> None:
    """Both ways; and refused where it cannot be honoured."""
    source, destination = hosts.pair(2 * MIB)
    with pytest.raises(QmpRefusedError, match="no migration is running whose mode could change"):
        source.qmp.execute("migrate-set-parameters", {"x-fusemig-mode": "mirror"})
    with pytest.raises(QmpRefusedError, match="is no lag: write a time such as 20ms"):
        source.qmp.execute("migrate-set-parameters", {"x-fusemig-mirror-lag": "soon"})
    refused = source.migrate(destination.uri, "--mode", "mirror", "--wire", "qemu")
    assert refused.exit_code != 0
    assert "nothing can be mirrored over QEMU's wire" in refused.stderr
    source.migrate_to_pause(destination.uri)
    assert pacing(source)["mirror"] == "none"
    for mode, reach in (("mirror", "all"), ("precopy", "none"), ("mirror", "all")):
        source.qmp.execute("migrate-set-parameters", {"x-fusemig-mode": mode})
        wait_until(partial(is_reached, source, reach), f"reach {reach}")
    source.proceed()
    source.wait_phase("completed")
    finish(source, destination)
