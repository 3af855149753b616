"""The commands and the control socket while a real migration runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from support.hosts import MIB, pwrite, wait_until

if TYPE_CHECKING:
    from support.hosts import Hosts

pytestmark = pytest.mark.fuse

SLOW = MIB  # bytes per second, at which the disks of these tests take the better part of a minute


def test_bandwidth_is_changed_while_the_migration_runs(hosts: Hosts) -> None:
    """--max-bandwidth holds it back; a QMP client lets it go."""
    source, destination = hosts.pair(48 * MIB)
    migrate = source.start_migrate(destination.uri, "--max-bandwidth", "1M")
    assert source.qmp.execute("query-migrate-parameters")["max-bandwidth"] == MIB
    wait_until(lambda: source.migration()["disk"]["transferred"] > 0, "the first bytes")
    assert source.migration()["disk"]["remaining"] > 24 * MIB
    assert migrate.process.poll() is None
    source.set_parameters(max_bandwidth=0)
    done = migrate.finish()
    assert done.exit_code == 0
    assert done.stderr.startswith("fusemig: completed in ")
    assert done.stdout == ""


def test_cancel_and_migrate_again(hosts: Hosts) -> None:
    """``cancel`` says what it does, ``migrate`` exits 6 and says where the disks are; the next migration completes."""
    source, destination = hosts.pair(32 * MIB)
    migrate = source.start_migrate(destination.uri, "--max-bandwidth", "1M")
    cancel = source.command("cancel")
    assert cancel == (0, "", "fusemig: cancelling; the disks stay here\n")
    assert migrate.finish() == (6, "", "fusemig: the migration was cancelled; the disks stay here\n")
    pwrite(source.file(), b"ours")
    assert source.command("cancel") == (0, "", "fusemig: no migration is running\n")
    destination.wait_free()
    assert source.migrate(destination.uri, "--max-bandwidth", "0").exit_code == 0
    assert source.images["vda"].read_bytes() == destination.images["vda"].read_bytes()


def test_continue_is_refused_where_nothing_waits(hosts: Hosts) -> None:
    """QEMU's text, exit code 1."""
    source, destination = hosts.pair(2 * MIB)
    assert source.command("continue") == (1, "", "fusemig: Migration not in expected state: none\n")
    source.migrate_to_pause(destination.uri)
    assert source.command("continue") == (0, "", "")
    source.wait_phase("completed")
    assert source.command("continue") == (1, "", "fusemig: Migration not in expected state: completed\n")


def test_progress_json_is_an_object_a_line(hosts: Hosts) -> None:
    """Every line of stdout is ``query-migrate``'s answer, the last one the outcome; stderr is silent."""
    source, destination = hosts.pair(2 * MIB)
    source.pause_before_switchover()  # for as long as it takes until the command has looked again
    command = source.start_command("migrate", destination.uri, "--progress", "json")
    wait_until(lambda: command.stdout().count("\n") > 1, "two lines")
    source.wait_phase("pre-switchover")
    source.proceed()
    done = command.finish()
    assert done.exit_code == 0
    assert done.stderr == ""
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) > 1
    assert answers[-1]["status"] == "completed"
    assert answers[-1]["disk"]["remaining"] == 0
    assert answers[-1]["downtime"] > 0
    for answer in answers:
        assert {"transferred", "remaining", "total", "dirty-sync-count"} <= answer["disk"].keys()
        assert {"total-time", "setup-time"} <= answer.keys()
        assert answer["x-fusemig"]["role"] == "source"


def test_detach_returns_at_once_and_status_tells_the_rest(hosts: Hosts) -> None:
    """The migration outlives the command; status shows both sides of it."""
    source, destination = hosts.pair(8 * MIB)
    source.pause_before_switchover()
    assert source.migrate(destination.uri, "--detach") == (0, "", "")
    source.wait_phase("pre-switchover")
    shown = source.command("status")
    assert shown.exit_code == 0
    assert "migration (source): pre-switchover, phase pre-switchover" in shown.stdout
    arriving = json.loads(destination.command("status", "--json").stdout)
    assert arriving["disks"][0]["state"] == "incoming"
    assert arriving["incoming"]["status"] == "active"
    source.proceed()
    source.wait_phase("completed")
    assert json.loads(source.command("status", "--json").stdout)["migration"]["status"] == "completed"
    taken = json.loads(destination.command("status", "--json").stdout)
    assert taken["disks"][0]["state"] == "owner"
    assert taken["migration"]["disk"]["remaining"] == 0


def test_events_come_in_qemus_order(hosts: Hosts) -> None:
    """STOP before `device`; RESUME at the destination before `completed`, which finds the disk writable."""
    source, destination = hosts.pair(4 * MIB)
    assert destination.qmp.greeting["QMP"]["version"]
    for host in source, destination:
        host.qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
    source.migrate_to_pause(destination.uri)
    source.proceed()
    source.wait_phase("completed")
    names = [name for name in source.qmp.event_names() if name != "MIGRATION_PASS"]
    assert names == [
        "MIGRATION setup",
        "MIGRATION active",
        "MIGRATION pre-switchover",
        "STOP",
        "MIGRATION device",
        "MIGRATION completed",
    ]
    passes = [event["data"]["pass"] for event in source.qmp.events if event["event"] == "MIGRATION_PASS"]
    assert passes == list(range(1, len(passes) + 1))
    destination.migration()
    assert destination.qmp.event_names() == [
        "MIGRATION setup",
        "MIGRATION active",
        "RESUME",
        "MIGRATION completed",
    ]


def test_a_second_migration_is_refused_while_one_runs(hosts: Hosts) -> None:
    """QEMU's text; the first one does not notice."""
    source, destination = hosts.pair(8 * MIB)
    source.migrate_to_pause(destination.uri)
    refused = source.migrate(destination.uri)
    assert refused == (1, "", "fusemig: There's a migration process in progress\n")
    source.proceed()
    source.wait_phase("completed")


def test_a_disk_that_was_handed_off_cannot_be_migrated(hosts: Hosts) -> None:
    """By name it is refused, and without a name there is nothing to migrate; also after a restart."""
    source, destination = hosts.pair(2 * MIB)
    assert source.migrate(destination.uri).exit_code == 0
    by_name = source.migrate(destination.uri, "--disk", "vda")
    assert by_name == (1, "", "fusemig: disk 'vda' is read-only here, so there is nothing to hand off\n")
    nothing = (1, "", "fusemig: no disk here is writable: there is nothing to migrate\n")
    assert source.migrate(destination.uri) == nothing
    assert source.stop() == 0
    again = hosts.start("again", source.images)
    assert again.migrate(destination.uri) == nothing
    with pytest.raises(OSError, match="Read-only"):
        pwrite(again.file(), b"no")


def test_a_command_without_a_daemon_says_so(hosts: Hosts) -> None:
    """The text names the socket and the way out."""
    source = hosts.make("source", {})
    expected = (
        f"fusemig: no daemon listens at '{source.control}': is `fusemig serve` running with "
        f"--control {source.control}?\n"
    )
    assert source.command("status") == (1, "", expected)
