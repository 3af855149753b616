"""The connection is cut, stalled or corrupted at a chosen frame: the source goes on, the destination keeps waiting."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING

import pytest

from fusemig.wire.native import FrameType
from support.hosts import MIB, assert_migrates, assert_unharmed, pread, pwrite, wait_until
from support.proxy import Fault, FaultProxy

if TYPE_CHECKING:
    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse


def outcome(source: Host) -> str:
    """Wait for the end of a migration that was started through QMP; return its text."""
    info = source.wait_phase("failed", "cancelled", "in-doubt")
    text: str = info["error-desc"]
    return text


def notice(destination: Host) -> str:
    """Wait until the destination knows; return what it says."""
    text: str = wait_until(lambda: destination.status()["incoming"].get("error-desc"), "the destination's notice")
    return text


def test_cut_in_the_bulk_phase(hosts: Hosts) -> None:
    """Exit code 1 and the peer's name; the retry sends everything."""
    source, destination = hosts.pair(8 * MIB)
    with FaultProxy(destination.uri) as proxy:
        proxy.arm(FrameType.DATA, Fault.CUT, nth=4)
        assert source.migrate(proxy.uri) == (1, "", f"fusemig: {proxy.uri} closed the connection\n")
        assert notice(destination).endswith(" closed the connection inside a frame")
        assert_unharmed(source, destination)
    assert_migrates(source, destination)


def test_cut_in_a_dirty_pass(hosts: Hosts) -> None:
    """What was on its way is dirty again."""
    source, destination = hosts.pair(8 * MIB)
    with FaultProxy(destination.uri) as proxy:
        source.migrate_to_pause(proxy.uri)
        proxy.arm(FrameType.DATA, Fault.CUT)
        pwrite(source.file(), b"never arrives" * 1000, 3 * MIB)
        assert outcome(source) == f"{proxy.uri} closed the connection"
        assert source.migration()["disk"]["remaining"] >= 13_000
        assert notice(destination).endswith(" closed the connection inside a frame")
        assert_unharmed(source, destination)
    assert_migrates(source, destination)
    assert pread(destination.file(), 13_000, 3 * MIB) == b"never arrives" * 1000


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.LOSE])
def test_cut_while_frozen(hosts: Hosts, fault: Fault) -> None:
    """FINAL is lost: the gate opens again, and the hand-off did not happen on either side."""
    source, destination = hosts.pair(8 * MIB)
    source.qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
    with FaultProxy(destination.uri) as proxy:
        source.migrate_to_pause(proxy.uri)
        proxy.arm(FrameType.FINAL, fault)
        source.proceed()
        assert outcome(source) == f"{proxy.uri} closed the connection"
        source.status()
        names = [name for name in source.qmp.event_names() if name != "MIGRATION_PASS"]
        assert names[-4:] == ["STOP", "MIGRATION device", "MIGRATION failed", "RESUME"]
        notice(destination)
        assert_unharmed(source, destination)
    assert_migrates(source, destination)


def test_the_destinations_prepared_is_lost(hosts: Hosts) -> None:
    """The destination is bound, the source is not: it writes ABORT down, goes on, and may send again."""
    source, destination = hosts.pair(8 * MIB)
    with FaultProxy(destination.uri) as proxy:
        source.migrate_to_pause(proxy.uri)
        proxy.arm(FrameType.PREPARED, Fault.LOSE)
        source.proceed()
        assert outcome(source) == f"{proxy.uri} closed the connection"
        assert_unharmed(source, destination)
    assert_migrates(source, destination)


def test_the_destinations_taken_is_lost(hosts: Hosts) -> None:
    """Exit code 7: the destination owns the disk, and the source does not write to it until it has asked, nor then."""
    source, destination = hosts.pair(8 * MIB)
    source.pause_before_switchover()
    with FaultProxy(destination.uri) as proxy:
        migrate = source.start_migrate(proxy.uri)
        source.wait_phase("pre-switchover")
        proxy.arm(FrameType.TAKEN, Fault.LOSE)
        proxy.is_barred = True
        source.proceed()
        done = migrate.finish()
        assert done.exit_code == 7
        assert done.stderr == (
            f"fusemig: COMMIT was sent to {proxy.uri} and its answer is missing ({proxy.uri} closed the connection); "
            "the disks are read-only here until it is known who owns them: the destination is being asked, see "
            "`fusemig status`; if it is gone for good, see `fusemig resolve --help`\n"
        )
        assert source.disk()["state"] == "handed-off"
        assert destination.disk()["state"] == "owner"
        with pytest.raises(OSError, match="Read-only"):
            pwrite(source.file(), b"x")
        pwrite(destination.file(), b"x")
        refused = source.migrate(destination.uri)
        assert refused.exit_code == 7
        assert "in doubt" in refused.stderr
        # Whether what was asked comes before the end or after it, the kernel says differently.
        wait_until(lambda: re.search("closed the connection| lost: ", source.disk().get("in-doubt", "")), "a question")
        assert "IN DOUBT who owns it: " in source.command("status").stdout
        proxy.is_barred = False
        wait_until(lambda: source.disk()["state"] == "released", "the answer")
        assert "in-doubt" not in source.disk()
        assert source.phase() == "completed"
        assert source.migration()["status"] == "completed"
        with pytest.raises(OSError, match="Read-only"):
            pwrite(source.file(), b"x")
        pwrite(destination.file(), b"y")
        assert destination.status()["incoming"]["rejected-connections"] == 0


def test_the_sources_commit_is_lost(hosts: Hosts) -> None:
    """The destination waits, prepared; it is told again, and the disk moves after all, without another byte sent."""
    source, destination = hosts.pair(8 * MIB)
    destination.qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
    source.pause_before_switchover()
    with FaultProxy(destination.uri) as proxy:
        migrate = source.start_migrate(proxy.uri)
        source.wait_phase("pre-switchover")
        proxy.arm(FrameType.COMMIT, Fault.LOSE)
        proxy.is_barred = True
        source.proceed()
        assert migrate.finish().exit_code == 7
        assert destination.disk()["state"] == "prepared"
        with pytest.raises(OSError, match="Read-only"):
            pwrite(destination.file(), b"x")
        proxy.is_barred = False
        wait_until(lambda: source.disk()["state"] == "released", "the answer")
        assert destination.disk()["state"] == "owner"
        assert source.images["vda"].read_bytes() == destination.images["vda"].read_bytes()
        pwrite(destination.file(), b"y")
        assert destination.qmp.event_names()[-2:] == ["RESUME", "MIGRATION completed"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_flipped_bit_in_bulk(hosts: Hosts, seed: int) -> None:
    """Found by the frame's hash; the destination says so and nothing is handed over."""
    source, destination = hosts.pair(8 * MIB)
    with FaultProxy(destination.uri, seed) as proxy:
        proxy.arm(FrameType.DATA, Fault.FLIP, nth=2 + seed)
        done = source.migrate(proxy.uri)
        assert done.exit_code == 1
        assert done.stderr.startswith(f"fusemig: {proxy.uri} aborted the migration: ")
        assert re.search("hash|check|damaged", done.stderr), done.stderr
        assert_unharmed(source, destination)
    assert_migrates(source, destination)


def test_a_flipped_bit_in_a_dirty_pass(hosts: Hosts) -> None:
    """As in bulk; the block is dirty again."""
    source, destination = hosts.pair(8 * MIB)
    with FaultProxy(destination.uri) as proxy:
        source.migrate_to_pause(proxy.uri)
        proxy.arm(FrameType.DATA, Fault.FLIP)
        pwrite(source.file(), b"spoiled" * 1000, MIB)
        assert outcome(source).startswith(f"{proxy.uri} aborted the migration: ")
        assert_unharmed(source, destination)
    assert_migrates(source, destination)


def test_a_flipped_bit_while_frozen(hosts: Hosts) -> None:
    """A spoiled FINAL proves nothing: the source thaws."""
    source, destination = hosts.pair(8 * MIB)
    with FaultProxy(destination.uri) as proxy:
        source.migrate_to_pause(proxy.uri)
        proxy.arm(FrameType.FINAL, Fault.FLIP)
        source.proceed()
        assert outcome(source).startswith(f"{proxy.uri} aborted the migration: ")
        assert_unharmed(source, destination)
    assert_migrates(source, destination)


def test_a_flipped_bit_from_the_destination(hosts: Hosts) -> None:
    """The source does not believe a damaged acknowledgement."""
    source, destination = hosts.pair(8 * MIB)
    with FaultProxy(destination.uri) as proxy:
        proxy.arm(FrameType.ACK, Fault.FLIP)
        done = source.migrate(proxy.uri)
        assert done.exit_code == 1
        assert re.search("hash|check|damaged|magic", done.stderr), done.stderr
        assert_unharmed(source, destination)
    assert_migrates(source, destination)


TOO_LATE = (
    1,
    "",
    (
        "fusemig: the switchover took longer than the freeze deadline of 5 s; the guests run on here: "
        "migrate again, with a lower --downtime-limit or at a quieter time\n"
    ),
)


def test_the_freeze_deadline(hosts: Hosts) -> None:
    """A destination that falls silent cannot keep the guest frozen: the parked write goes through."""
    source, destination = hosts.pair(8 * MIB)
    source.pause_before_switchover()
    with FaultProxy(destination.uri) as proxy:
        migrate = source.start_migrate(proxy.uri)
        source.wait_phase("pre-switchover")
        proxy.arm(FrameType.FINAL, Fault.STALL)
        source.proceed()
        assert proxy.struck.wait(40)
        writer = threading.Thread(target=pwrite, args=[source.file(), b"parked", 2 * MIB], daemon=True)
        writer.start()
        # A writer that is late meets an open gate.
        wait_until(
            lambda: source.status()["parked-writes"] == 1 or migrate.process.poll() is not None, "a parked write"
        )
        assert migrate.finish() == TOO_LATE
        writer.join(40)
        assert not writer.is_alive()
        assert pread(source.images["vda"], 6, 2 * MIB) == b"parked"
        assert_unharmed(source)
    notice(destination)
    assert_unharmed(source, destination)
    assert_migrates(source, destination)


# Cancel, phase by phase; the proxy holds the migration where it is to be cancelled

CANCELLED = (6, "", "fusemig: the migration was cancelled; the disks stay here\n")


@pytest.mark.parametrize(
    ("held_at", "phase"),
    [(FrameType.HELLO, "setup"), (FrameType.DATA, "bulk"), (FrameType.SYNC, "dirty"), (FrameType.FINAL, "frozen")],
)
def test_cancel_in_each_phase(hosts: Hosts, held_at: FrameType, phase: str) -> None:
    """Exit code 6, the source is written again, the destination waits on."""
    source, destination = hosts.pair(8 * MIB)
    with FaultProxy(destination.uri) as proxy:
        proxy.arm(held_at, Fault.STALL)
        migrate = source.start_migrate(proxy.uri)
        assert proxy.struck.wait(40)
        done = CANCELLED
        if phase == "frozen":  # by whoever comes first, the freeze deadline or we
            source.qmp.execute("migrate_cancel")
            wait_until(lambda: source.migration()["status"] in ("cancelled", "failed"), "its end")
            done = done if source.migration()["status"] == "cancelled" else TOO_LATE
        else:
            source.wait_phase(phase)
            assert source.command("cancel").exit_code == 0
        assert migrate.finish() == done
        assert_unharmed(source)
    assert_unharmed(source, None if phase == "setup" else destination)
    # The destination learns of it from the proxy's end, and its reservation ends then.
    wait_until(lambda: destination.phase() in ("none", "failed"), "the end of the reservation")
    assert_migrates(source, destination)


def test_cancel_at_the_pause(hosts: Hosts) -> None:
    """The destination is told, and by whom."""
    source, destination = hosts.pair(8 * MIB)
    source.pause_before_switchover()
    migrate = source.start_migrate(destination.uri)
    source.wait_phase("pre-switchover")
    assert source.command("cancel").exit_code == 0
    assert migrate.finish() == CANCELLED
    assert notice(destination).endswith(" called the migration off: cancelled at the source")
    assert_unharmed(source, destination)
    assert_migrates(source, destination)
