"""Daemons that end, crash or run out of space in the middle of a migration."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from fusemig.wire.native import FrameType
from support.hosts import MIB, assert_migrates, assert_unharmed, is_mounted, pread, pwrite, wait_until, write_random
from support.loops import mounted, run
from support.proxy import Fault, FaultProxy

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Command, Host, Hosts

pytestmark = pytest.mark.fuse

LOST = r"fusemig: (tcp:127\.0\.0\.1:\d+ closed the connection.*|connection to tcp:127\.0\.0\.1:\d+ lost: .*)\n"
"""What a peer's end looks like from here: the kernel may say it in two ways."""


def start_slowly(source: Host, destination: Host) -> Command:
    """Start a migration that stays in its bulk phase; return when some of it has arrived."""
    migrate = source.start_migrate(destination.uri, "--max-bandwidth", "1M")
    wait_until(lambda: source.migration()["disk"]["transferred"] > 0, "the first bytes")
    source.wait_phase("bulk")
    wait_until(lambda: destination.phase() == "bulk", "the destination's start")
    return migrate


def test_the_destinations_disk_is_full(hosts: Hosts, place: Path) -> None:
    """The source learns what failed and where; with room there the next migration completes."""
    start = write_random(place / "a.img", 2 * MIB)
    os.truncate(start, 8 * MIB)
    source = hosts.start("source", {"vda": start})
    with mounted("none", place / "small", "tmpfs", "size=4m") as small:
        image = small / "b.img"
        destination = hosts.start("destination", {"vda": image}, incoming="tcp:127.0.0.1:0")
        source.pause_before_switchover()
        migrate = source.start_migrate(destination.uri)
        source.wait_phase("pre-switchover")
        pwrite(source.file(), random.Random(5).randbytes(5 * MIB), 2 * MIB)  # what was offered had room
        done = migrate.finish()
        pattern = (
            rf"fusemig: {re.escape(destination.uri)} aborted the migration: disk 'vda' \({re.escape(str(image))}\): "
            r"write at \d+\+\d+: No space left on device; the disk stays at the source: "
            r"about .* are still to come: make room at the destination, then migrate again\n"
        )
        assert re.fullmatch(pattern, done.stderr), done.stderr
        assert done.exit_code == 1
        assert_unharmed(source, destination)
        assert destination.disk()["state"] == "incoming"
        run("mount", "-o", "remount,size=16m", small)
        assert_migrates(source, destination)
        assert destination.stop() == 0


def test_no_room_for_what_is_offered(hosts: Hosts, place: Path) -> None:
    """Known before a byte is sent."""
    source = hosts.start("source", {"vda": write_random(place / "a.img", 8 * MIB)})
    with mounted("none", place / "small", "tmpfs", "size=4m") as small:
        destination = hosts.start("destination", {"vda": small / "b.img"}, incoming="tcp:127.0.0.1:0")
        done = source.migrate(destination.uri)
        assert done.exit_code == 5
        assert done.stderr == (
            f"fusemig: {destination.uri} refused: disk 'vda' needs 8.0 MiB more there, and {small} has 4.0 MiB free: "
            "make room there, then migrate again\n"
        )
        assert_unharmed(source)
        assert destination.stop() == 0


def test_no_room_for_the_epoch_file(hosts: Hosts, place: Path) -> None:
    """The destination refuses, in words, before it takes a byte."""
    image = place / "a.img"
    with image.open("wb") as file:
        file.truncate(2 * MIB)
    source = hosts.start("source", {"vda": image})
    with mounted("none", place / "small", "tmpfs", "size=16k") as small:
        (small / "filler").write_bytes(bytes(16384))
        destination = hosts.start("destination", {"vda": small / "b.img"}, incoming="tcp:127.0.0.1:0")
        done = source.migrate(destination.uri)
        assert done.stderr == (
            f"fusemig: {destination.uri} refused: cannot write the epoch file {small}/b.img.fusemig: "
            "No space left on device; free space there first\n"
        )
        assert done.exit_code == 5
        assert_unharmed(source)
        assert destination.stop() == 0


def test_the_destination_is_killed_in_bulk(hosts: Hosts) -> None:
    """Exit code 1; the image stays marked incomplete, and a new destination receives into it."""
    source, destination = hosts.pair(24 * MIB)
    migrate = start_slowly(source, destination)
    destination.kill()
    done = migrate.finish()
    assert re.fullmatch(LOST, done.stderr), done.stderr
    assert done.exit_code == 1
    assert_unharmed(source)
    assert hosts.make("plain", destination.images).serve().exit_code == 2
    again = hosts.start("again", destination.images, incoming="tcp:127.0.0.1:0")
    assert_unharmed(source, again)
    assert_migrates(source, again)


def test_the_source_is_killed_in_bulk(hosts: Hosts) -> None:
    """It owned the disk and still does; the destination waits for the next one."""
    source, destination = hosts.pair(24 * MIB)
    migrate = start_slowly(source, destination)
    pwrite(source.file(), b"acknowledged", 4096, os.O_DSYNC)
    source.kill()
    done = migrate.finish()
    assert done.stderr == f"fusemig: the daemon at '{source.control}' closed the connection: see its log\n"
    assert done.exit_code == 1
    wait_until(lambda: destination.phase() == "failed", "the destination's notice")
    again = hosts.start("again", source.images)
    assert_unharmed(again, destination)
    assert pread(again.file(), 12, 4096) == b"acknowledged"
    assert_migrates(again, destination)


def test_the_source_is_asked_to_end_during_a_migration(hosts: Hosts) -> None:
    """SIGTERM calls the migration off and ends cleanly; the destination is told and waits on."""
    source, destination = hosts.pair(24 * MIB)
    start_slowly(source, destination)
    assert source.stop() == 0
    incoming = wait_until(lambda: destination.status()["incoming"].get("error-desc"), "the destination's notice")
    assert incoming.endswith(" called the migration off: cancelled at the source")
    again = hosts.start("again", source.images)
    assert_unharmed(again, destination)
    assert_migrates(again, destination)


def test_the_source_is_asked_to_end_at_the_pause(hosts: Hosts) -> None:
    """Converged or not: what is not handed off stays, and the daemon ends cleanly."""
    source, destination = hosts.pair(4 * MIB)
    source.migrate_to_pause(destination.uri)
    assert source.stop() == 0
    again = hosts.start("again", source.images)
    assert_unharmed(again, destination)


def test_the_destination_is_asked_to_end_in_bulk(hosts: Hosts) -> None:
    """It ends cleanly; the source serves on and says who left."""
    source, destination = hosts.pair(24 * MIB)
    migrate = start_slowly(source, destination)
    assert destination.stop() == 0
    done = migrate.finish()
    assert re.fullmatch(LOST, done.stderr), done.stderr
    assert done.exit_code == 1
    assert_unharmed(source)
    again = hosts.start("again", destination.images, incoming="tcp:127.0.0.1:0")
    assert_migrates(source, again)


def test_an_interrupted_command_cancels(hosts: Hosts) -> None:
    """Ctrl-C calls the migration off and waits for its end."""
    source, destination = hosts.pair(24 * MIB)
    migrate = start_slowly(source, destination)
    migrate.process.send_signal(signal.SIGINT)
    done = migrate.finish()
    assert done.exit_code == 6
    assert done.stderr == (
        "fusemig: cancelling (interrupt again to stop waiting)\n"
        "fusemig: the migration was cancelled; the disks stay here\n"
    )
    assert_unharmed(source, destination)


def test_a_command_that_is_killed_leaves_its_migration(hosts: Hosts) -> None:
    """The migration is the daemon's, not the command's."""
    source, destination = hosts.pair(8 * MIB)
    source.pause_before_switchover()
    migrate = source.start_migrate(destination.uri)
    source.wait_phase("pre-switchover")
    migrate.end()
    source.proceed()
    source.wait_phase("completed")
    assert destination.disk()["state"] == "owner"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_time_leaves_no_mount(hosts: Hosts, place: Path, number: signal.Signals) -> None:
    """From the moment that the mount exists, a signal unmounts it."""
    image = write_random(place / "a.img", MIB)
    for _ in range(3):
        host = hosts.make("short", {"vda": image})
        host.launch()
        wait_until(lambda host=host: is_mounted(host.mount), "the mount")  # type: ignore[misc]
        os.kill(host.pid, number)
        assert host.wait() == 0
        assert not is_mounted(host.mount)


def test_two_signals_are_as_good_as_one(hosts: Hosts, place: Path) -> None:
    """An impatient operator does no harm."""
    host = hosts.start("host", {"vda": write_random(place / "a.img", MIB)})
    fd = os.open(host.file(), os.O_RDWR)  # keeps the mount busy
    try:
        for _ in range(5):
            os.kill(host.pid, signal.SIGTERM)
        assert host.wait() == 0
    finally:
        with suppress(OSError):  # what it belongs to is gone
            os.close(fd)


def test_quit_and_an_unmount_from_outside_end_the_daemon(hosts: Hosts, place: Path) -> None:
    """Both are orderly ends."""
    image = write_random(place / "a.img", MIB)
    host = hosts.start("quit", {"vda": image})
    host.qmp.execute("quit")
    assert host.wait() == 0
    host = hosts.start("unmounted", {"vda": image})
    run("umount", host.mount)
    assert host.wait() == 0


def test_a_write_that_is_parked_at_sigterm_is_answered(hosts: Hosts) -> None:
    """Frozen for a switchover that the destination never answers, the source still ends in order."""
    source, destination = hosts.pair(4 * MIB)
    with FaultProxy(destination.uri) as proxy:
        source.migrate_to_pause(proxy.uri)
        proxy.arm(FrameType.FINAL, Fault.STALL)
        source.proceed()
        assert proxy.struck.wait(40)
        writer = threading.Thread(target=pwrite, args=[source.file(), b"parked", MIB], daemon=True)
        writer.start()
        # Not for longer than the freeze deadline, after which a late writer meets an open gate.
        wait_until(
            lambda: source.status()["parked-writes"] == 1 or source.phase() != "frozen", "the parked write, or the end"
        )
        assert source.stop() == 0
        writer.join(40)
        assert not writer.is_alive()
    assert pread(source.images["vda"], 6, MIB) == b"parked"
