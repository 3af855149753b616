"""QMP on real daemons: QEMU's own transcripts and a live QEMU as the measure, stop and cont, QEMU's own clients."""

from __future__ import annotations

import asyncio
import errno
import json
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.hosts import MIB, Qmp, QmpRefusedError, pread, pwrite, wait_until, write_random
from support.qemu import is_available

qmp_scenario = pytest.importorskip("support.qmp_scenario", reason="needs qemu.qmp: tools/setup test")

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.hosts import Host, Hosts
    from support.qmp_scenario import Transcript

pytestmark = pytest.mark.fuse

VECTORS = Path(__file__).parent.parent / "vectors" / "qmp"
SCENARIOS = sorted(qmp_scenario.SCENARIOS)
EVENTS_ON = {"capabilities": [{"capability": "events", "state": True}]}


# QEMU as the measure


def play_here(hosts: Hosts, place: Path, name: str) -> Transcript:
    """Put two daemons through a scenario."""
    image = write_random(place / "source.img", qmp_scenario.DISK_BYTES)
    source = hosts.start("source", {"vda": image})
    destination = hosts.start("destination", {"vda": place / "destination.img"}, incoming="defer")
    sockets = {"source": source.control, "destination": destination.control}
    transcript: Transcript = asyncio.run(
        qmp_scenario.play(qmp_scenario.SCENARIOS[name], sockets, f"unix:{place}/incoming")
    )
    return transcript


@pytest.mark.parametrize("name", SCENARIOS)
def test_golden_transcripts_of_qemu(hosts: Hosts, place: Path, name: str) -> None:
    """What a recorded QEMU 7.2 answered, we answer: members, types, error classes and texts, order of events."""
    golden = json.loads((VECTORS / f"{name}.json").read_text())
    assert golden["qemu"].startswith("7.2.")
    asked = [(step["side"], step["execute"], step["arguments"]) for step in golden["steps"]]
    assert asked == [step[:3] for step in qmp_scenario.SCENARIOS[name]], "record again: tools/capture_qmp"
    qemu = qmp_scenario.Transcript(golden["steps"], golden["events"])
    assert qmp_scenario.differences(qemu, play_here(hosts, place, name)) == []


@pytest.mark.qemu
@pytest.mark.skipif(not is_available(), reason="needs a QEMU older than 9.1: tools/setup test")
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_live_qemu_and_we_do_the_same(hosts: Hosts, place: Path, name: str) -> None:
    """One script, the `qemu.qmp` library, two QEMUs with block migration and two of us."""
    (place / "qemu").mkdir()
    with qmp_scenario.qemu_pair(place / "qemu") as sockets:
        qemu = asyncio.run(qmp_scenario.play(qmp_scenario.SCENARIOS[name], sockets, f"unix:{place}/qemu/incoming"))
    assert qmp_scenario.differences(qemu, play_here(hosts, place, name)) == []


def test_the_comparison_sees_differences() -> None:
    """Each kind of difference is told, so that an empty list means something."""
    golden = json.loads((VECTORS / "migration.json").read_text())
    qemu = qmp_scenario.Transcript(golden["steps"], golden["events"])
    assert qmp_scenario.differences(qemu, qemu) == []
    changes: tuple[Callable[[Any, Any], object], ...] = (
        lambda steps, _events: steps[5]["return"].pop("status"),
        lambda steps, _events: steps[5]["return"].update(status="failed"),
        lambda steps, _events: steps[5]["return"].update({"total-time": "1"}),
        lambda steps, _events: steps[5]["return"].update(surprise=1),
        lambda steps, _events: steps[0].update(error={"class": "GenericError", "desc": "no"}),
        lambda steps, _events: steps[8]["error"].update({"class": "CommandNotFound"}),
        lambda steps, _events: steps[8]["error"].update(desc="Something else"),
        lambda _steps, events: events["source"].reverse(),
        lambda _steps, events: events["destination"].pop(),
    )
    for change in changes:
        steps, events = json.loads(json.dumps(golden["steps"])), json.loads(json.dumps(golden["events"]))
        change(steps, events)
        assert len(qmp_scenario.differences(qemu, qmp_scenario.Transcript(steps, events))) == 1


# stop and cont


class Writer:
    """A write in a thread, because it may be parked."""

    def __init__(self, path: Path, data: bytes, offset: int = 0) -> None:
        """Start it."""
        self.error: OSError | None = None
        self._arguments = (path, data, offset)
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        try:
            pwrite(*self._arguments, os.O_DSYNC)
        except OSError as error:
            self.error = error

    @property
    def is_alive(self) -> bool:
        """Whether it still waits."""
        return self._thread.is_alive()

    def join(self) -> OSError | None:
        """Wait for its end; return what it failed with."""
        self._thread.join(30)
        assert not self._thread.is_alive(), "the write was never answered"
        return self.error


def stopped(host: Host) -> Writer:
    """Stop a daemon and have a write parked there."""
    host.qmp.execute("stop")
    writer = Writer(host.file(), b"parked")
    wait_until(lambda: host.status()["parked-writes"] == 1, "a parked write")
    assert writer.is_alive
    return writer


def test_stop_parks_writes_and_cont_makes_them(hosts: Hosts, place: Path) -> None:
    """Reads and syncs go on, what was acknowledged is durable, the image stands still until `cont`."""
    source = hosts.start("source", {"vda": write_random(place / "a.img", MIB)})
    pwrite(source.file(), b"before", 4096)
    source.qmp.execute("stop")
    fd = os.open(source.file(), os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    # Before a write is parked: its page is locked from then on, and whoever looks at the file after the kernel's
    # attributes have expired waits for that page.
    assert pread(source.file(), 6, 4096) == b"before"
    writer = stopped(source)
    before = source.images["vda"].read_bytes()
    assert before[4096:4102] == b"before"
    assert source.qmp.execute("query-status") == {"running": False, "status": "paused", "singlestep": False}
    assert source.disk()["gate"] == "closed"
    assert source.images["vda"].read_bytes() == before
    source.qmp.execute("cont")
    assert writer.join() is None
    assert pread(source.images["vda"], 6) == b"parked"
    assert source.qmp.execute("query-status")["status"] == "running"
    assert source.qmp.event_names() == ["STOP", "RESUME"]


def test_quit_answers_what_stop_has_parked(hosts: Hosts, place: Path) -> None:
    """The image that was stopped is not written again; the write fails and does not hang."""
    source = hosts.start("source", {"vda": write_random(place / "a.img", MIB)})
    writer = stopped(source)
    before = source.images["vda"].read_bytes()
    source.qmp.execute("quit")
    error = writer.join()
    assert error is not None
    assert error.errno == errno.EROFS
    assert source.wait() == 0
    assert source.images["vda"].read_bytes() == before


def test_stores_through_mmap_are_in_the_stopped_image(hosts: Hosts, place: Path) -> None:
    """What a guest stored before `stop` is there, though it never synced."""
    source = hosts.start("source", {"vda": write_random(place / "a.img", MIB)})
    code = (
        "import mmap, sys; file = open(sys.argv[1], 'r+b'); memory = mmap.mmap(file.fileno(), 4096); "
        "memory[:6] = b'stored'; print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(source.file())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as guest:
        assert guest.stdout is not None
        guest.stdout.readline()
        source.qmp.execute("stop")
        assert pread(source.images["vda"], 6) == b"stored"
        source.qmp.execute("cont")
        guest.communicate(b"\n", timeout=30)


def test_a_failed_migration_leaves_stopped_disks_stopped(hosts: Hosts) -> None:
    """Neither cancelling nor failing undoes `stop`: a write parked by it stays parked."""
    source, destination = hosts.pair(4 * MIB)
    writer = stopped(source)
    source.migrate_to_pause(destination.uri)
    assert source.qmp.execute("query-status")["status"] == "paused"
    source.qmp.execute("migrate_cancel")
    wait_until(lambda: source.migration()["status"] == "cancelled", "the cancellation")
    assert writer.is_alive
    assert source.disk()["gate"] == "closed"
    assert source.qmp.execute("query-status")["status"] == "paused"
    source.qmp.execute("cont")
    assert writer.join() is None
    assert source.qmp.event_names() == ["STOP", "RESUME"]


def test_stopped_disks_can_be_migrated(hosts: Hosts) -> None:
    """The hand-off answers what was parked; `cont` is refused at the source, whose disk is somebody else's now."""
    source, destination = hosts.pair(4 * MIB)
    writer = stopped(source)
    done = source.migrate(destination.uri)
    assert done.exit_code == 0, done.stderr
    error = writer.join()
    assert error is not None
    assert error.errno == errno.EROFS
    assert source.images["vda"].read_bytes() == destination.images["vda"].read_bytes()
    with pytest.raises(QmpRefusedError, match=r"disk 'vda' was handed off to .*: migrate it back to write it here"):
        source.qmp.execute("cont")
    assert source.qmp.execute("query-status")["status"] == "postmigrate"
    with pytest.raises(OSError, match="Read-only"):
        pwrite(source.file(), b"x")
    assert source.qmp.event_names() == ["STOP"]
    pwrite(destination.file(), b"taken over")


def test_stop_forces_a_migration_to_converge(hosts: Hosts) -> None:
    """As in QEMU: what cannot be written cannot get dirty."""
    source, destination = hosts.pair(4 * MIB)
    source.qmp.execute("migrate-set-parameters", {"max-bandwidth": MIB // 4})
    source.qmp.execute("migrate", {"uri": destination.uri, "blk": True})
    source.qmp.execute("stop")
    source.qmp.execute("migrate-set-parameters", {"max-bandwidth": 0})
    source.wait_phase("completed")
    assert source.images["vda"].read_bytes() == destination.images["vda"].read_bytes()


def test_a_stopped_destination_takes_over_without_writing(hosts: Hosts) -> None:
    """As QEMU's -S: `stop` before the take-over holds the disk, `cont` afterwards opens it."""
    source, destination = hosts.pair(4 * MIB)
    destination.qmp.execute("migrate-set-capabilities", EVENTS_ON)
    destination.qmp.execute("stop")
    done = source.migrate(destination.uri)
    assert done.exit_code == 0, done.stderr
    assert destination.qmp.execute("query-status")["status"] == "paused"
    assert destination.disk()["state"] == "owner"
    assert destination.disk()["gate"] == "closed"
    destination.qmp.execute("cont")
    pwrite(destination.file(), b"taken over")
    assert destination.qmp.event_names()[-2:] == ["MIGRATION completed", "RESUME"]


def test_cont_never_makes_a_second_writer(hosts: Hosts) -> None:
    """Refused where the disk is still to come and where it was handed off, each with the reason; nothing changes."""
    source, destination = hosts.pair(4 * MIB)
    with pytest.raises(QmpRefusedError, match="disk 'vda' is still to come"):
        destination.qmp.execute("cont")
    source.migrate_to_pause(destination.uri)
    with pytest.raises(QmpRefusedError, match="disk 'vda' is still to come"):
        destination.qmp.execute("cont")
    assert destination.disk()["gate"] == "read-only"
    source.proceed()
    source.wait_phase("completed")
    with pytest.raises(QmpRefusedError, match="was handed off to tcp:127"):
        source.qmp.execute("cont")
    assert source.disk()["gate"] == "read-only"


# migrate-incoming


def test_migrate_incoming(hosts: Hosts, place: Path) -> None:
    """A daemon with `--incoming defer` listens when and where it is told; a bad place can be tried again."""
    source = hosts.start("source", {"vda": write_random(place / "a.img", 4 * MIB)})
    destination = hosts.start("destination", {"vda": place / "b.img"}, incoming="defer")
    assert destination.uri == "defer"
    assert destination.qmp.execute("query-status")["status"] == "inmigrate"
    for uri, text in (
        ("exec:cat", "unknown migration protocol: exec:cat: 'exec:' is not supported"),
        (f"unix:{place}/missing/socket", "cannot listen at"),
    ):
        with pytest.raises(QmpRefusedError, match=text):
            destination.qmp.execute("migrate-incoming", {"uri": uri})
    destination.qmp.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    with pytest.raises(QmpRefusedError, match="The incoming migration has already been started"):
        destination.qmp.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    (address,) = destination.migration()["socket-address"]
    assert destination.uri == f"tcp:{address['host']}:{address['port']}"
    done = source.migrate(destination.uri)
    assert done.exit_code == 0, done.stderr
    assert source.images["vda"].read_bytes() == destination.images["vda"].read_bytes()
    with pytest.raises(QmpRefusedError, match="'-incoming' was not specified on the command line"):
        source.qmp.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})


# Clients


def test_blockstats_count_what_guests_did(hosts: Hosts, place: Path) -> None:
    """Requests and bytes of reads, writes and syncs."""
    source = hosts.start("source", {"vda": write_random(place / "a.img", MIB)})
    fd = os.open(source.file(), os.O_RDWR | os.O_DIRECT)
    try:
        page = mmap.mmap(-1, 4096)
        for _ in range(3):
            os.pwritev(fd, [page], 8192)
        os.preadv(fd, [page], 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    (info,) = source.qmp.execute("query-blockstats")
    stats = info["stats"]
    assert (stats["wr_operations"], stats["wr_bytes"], stats["wr_highest_offset"]) == (3, 3 * 4096, 3 * 4096)
    assert (stats["rd_operations"], stats["rd_bytes"]) == (1, 4096)
    assert stats["flush_operations"] >= 1


def test_qmp_shell_drives_a_migration(hosts: Hosts, place: Path) -> None:
    """From capabilities to `completed`, by typing."""
    shell = Path(sys.executable).with_name("qmp-shell")
    if not shell.exists():
        pytest.skip("qmp-shell is not installed beside this Python")
    source, destination = hosts.pair(4 * MIB)
    out = place / "shell.out"
    with (
        out.open("wb") as output,
        subprocess.Popen([shell, source.control], stdin=subprocess.PIPE, stdout=output, stderr=output) as process,
    ):
        assert process.stdin is not None

        def type_line(line: str) -> None:
            assert process.stdin is not None
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()

        type_line(
            'migrate-set-capabilities capabilities=[{"capability":"events","state":true},'
            '{"capability":"pause-before-switchover","state":true}]'
        )
        type_line("migrate-set-parameters max-bandwidth=500000000 downtime-limit=300")
        type_line(f"migrate uri={destination.uri} blk=true")
        wait_until(lambda: source.migration().get("status") == "pre-switchover", "pre-switchover")
        type_line("query-migrate")
        type_line("migrate-continue state=pre-switchover")
        wait_until(lambda: source.migration()["status"] == "completed", "completed")
        type_line("query-migrate")
        type_line("cont")
        process.communicate(timeout=30)
    text = out.read_text()
    assert '"status": "pre-switchover"' in text or "'status': 'pre-switchover'" in text, text
    assert "completed" in text
    assert "was handed off" in text, "what cannot be honoured is refused in the shell too"
    assert source.images["vda"].read_bytes() == destination.images["vda"].read_bytes()


def test_qmp_shell_in_human_mode(hosts: Hosts, place: Path) -> None:
    """`qmp-shell -H` asks for the list of commands, and has three kinds of info."""
    shell = Path(sys.executable).with_name("qmp-shell")
    if not shell.exists():
        pytest.skip("qmp-shell is not installed beside this Python")
    source = hosts.start("source", {"vda": write_random(place / "a.img", MIB)})
    done = subprocess.run(
        [shell, "-H", source.control],
        input="info status\ninfo block\ninfo migrate\ninfo block -v vda\ndevice_add x\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "VM status: running" in done.stdout, done.stderr
    assert f"vda (vda): {source.images['vda']} (raw)" in done.stdout
    assert "virtual size: 1 MiB (1048576 bytes)" in done.stdout
    assert "unknown command: 'device_add'" in done.stdout


def test_several_clients_see_one_migration(hosts: Hosts) -> None:
    """Each hears every event in the same order; one that hangs up, and one that never reads, cost nothing."""
    source, destination = hosts.pair(8 * MIB)
    source.qmp.execute("migrate-set-capabilities", EVENTS_ON)
    first, second, leaver, sleeper = (Qmp(source.control) for _ in range(4))
    try:
        sleeper._file.write(b'{"execute":"query-qmp-schema"}' * 2000)
        sleeper._file.flush()
        source.migrate_to_pause(destination.uri)
        leaver.execute("query-migrate")
        leaver.close()
        assert second.execute("query-status")["status"] == "running"
        second.execute("migrate-continue", {"state": "pre-switchover"})
        source.wait_phase("completed")
        for client in first, second:
            client.execute("query-status")
        assert first.events == second.events
        assert first.event_names()[-1] == "MIGRATION completed"
    finally:
        for client in first, second, leaver, sleeper:
            client.close()
    assert source.images["vda"].read_bytes() == destination.images["vda"].read_bytes()


def test_the_schema_of_a_running_daemon(hosts: Hosts, place: Path) -> None:
    """`query-qmp-schema` tells exactly the commands that `query-commands` does, and every type it names."""
    source = hosts.start("source", {"vda": write_random(place / "a.img", MIB)})
    infos: list[dict[str, Any]] = source.qmp.execute("query-qmp-schema")
    commands = {info["name"] for info in infos if info["meta-type"] == "command"}
    assert commands == {item["name"] for item in source.qmp.execute("query-commands")}
