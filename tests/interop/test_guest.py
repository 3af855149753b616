"""A Linux guest under TCG moves from one QEMU to another, with its disk from one fusemig to another, or stays whole."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import struct
from typing import TYPE_CHECKING, Any

import pytest

from fusemig.cli.demo_records import read_console
from support.guest import Guest, fill, is_made, read_records
from support.hosts import Hosts, pwrite, wait_until
from support.qemu import Drive, Qemu, is_available

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fusemig.cli.demo_records import Account
    from support.hosts import Command, Finished, Host

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.qemu,
    pytest.mark.skipif(not is_available(), reason="needs a QEMU older than 9.1: tools/setup test"),
    pytest.mark.skipif(not is_made(), reason="needs a guest's kernel: tools/setup test"),
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no access to /dev/fuse"),
]

SIZE = 64 << 20
SLOW = ("--max-bandwidth", "2M")
"""With this the disk's bulk phase outlasts whatever a test does in it."""


class Move:
    """Two hosts, each a fusemig and a QEMU, and the guest on the first."""

    def __init__(self, directory: Path) -> None:
        """Start nothing yet."""
        self.directory = directory
        self.hosts = Hosts(directory)
        self.guests: list[Guest] = []
        self.image, self.copy = directory / "source.img", directory / "destination.img"
        self.source: Host
        self.destination: Host
        self.here: Guest
        self.there: Guest

    def start(self) -> None:
        """Start everything and wait for the guest's first records."""
        fill(self.image, SIZE)
        with self.copy.open("wb") as file:
            file.truncate(SIZE)  # a QEMU asks for the size when it opens the file
        self.source = self.hosts.start("source", {"vda": self.image}, state_dir=self.directory / "state")
        self.here = self._guest("here", self.source)
        self.make_destination()
        self.here.wait_writing()

    def make_destination(self) -> None:
        """Start a destination, or the next one."""
        self.destination = self.hosts.start("destination", {"vda": self.copy}, incoming="tcp:127.0.0.1:0")
        name = f"there{len(self.guests)}"
        self.there = self._guest(name, self.destination, incoming=f"unix:{self.directory}/{name}.ram")

    def _guest(self, name: str, host: Host, **options: Any) -> Guest:
        guest = Guest(self.directory / name, host.file(), **options)
        self.guests.append(guest)
        return guest

    def close(self) -> list[str]:
        """End everything; return what was wrong."""
        try:
            for guest in self.guests:
                guest.close()
        finally:
            problems = self.hosts.close()
        return problems

    @property
    def options(self) -> list[str]:
        """What `fusemig migrate` is told of the guest."""
        return ["--guest", f"qmp:{self.here.migrator}", "--guest-destination", f"qmp:{self.there.migrator}"]

    def migrate(self, *more: str) -> Finished:
        """Run `fusemig migrate` to its end."""
        return self.source.migrate(self.destination.uri, *self.options, *more)

    def start_migrate(self, *more: str) -> Command:
        """Start it."""
        return self.source.start_migrate(self.destination.uri, *self.options, *more)

    def guest_info(self) -> dict[str, Any]:
        """Return what ``query-migrate`` tells of the guest."""
        info: dict[str, Any] = self.source.migration().get("x-fusemig", {}).get("guest", {})
        return info

    def wait_guest(self, state: str) -> None:
        """Wait until the guest has come to this state of its move."""
        wait_until(lambda: self.guest_info().get("state") == state, f"guest {state}")

    def start_copying(self) -> Command:
        """Start `fusemig migrate`; return when the memory is being copied, slowly, until `hurry`."""
        self.here.execute("migrate-set-parameters", max_bandwidth=1 << 20)
        command = self.start_migrate()
        self.wait_guest("copying")
        return command

    def hurry(self) -> None:
        """Have the memory copied as fast as can be."""
        self.here.execute("migrate-set-parameters", max_bandwidth=1 << 30)

    def hold_at_standstill(self) -> Command:
        """Start `fusemig migrate`, and stop the destination's daemon so that the guest stays at pre-switchover.

        For the freeze deadline at most, after which it is resumed.
        """
        command = self.start_copying()
        os.kill(self.destination.pid, signal.SIGSTOP)
        self.hurry()
        wait_until(
            lambda: self.here.run_state() == "finish-migrate" or self.source.phase() == "failed", "the standstill"
        )
        return command

    def let_go(self) -> None:
        """Let the destination's daemon go on."""
        os.kill(self.destination.pid, signal.SIGCONT)

    def check_records(self, image: Path, account: Account) -> None:
        """See that the guest never booted again and that what it reported durable is in ``image``, whole."""
        assert account.is_one_guest
        records = read_records(image, account.boots[0])
        assert not records.torn
        assert not records.missing(account.numbers)

    def check_runs_here(self) -> None:
        """See that the guest runs at the source, writes there, has lost nothing, and runs nowhere else."""
        self.here.wait_writing()
        assert self.here.run_state() == "running"
        assert self.there.console == ""
        assert self.source.disk()["state"] == "owner"
        assert self.source.disk()["gate"] == "open"
        self.check_records(self.image, read_console(self.here.console))

    def check_moved(self) -> None:
        """See that the guest runs at the destination, the same one, with all that it had written."""
        self.there.wait_writing()
        assert (self.here.run_state(), self.there.run_state()) == ("postmigrate", "running")
        said_here = self.here.console
        self.there.execute("stop")
        account = read_console(said_here, self.there.console)
        assert len(account.numbers) >= read_console(said_here).numbers[-1] + 200, "the numbering goes on there"
        self.check_records(self.copy, account)
        with pytest.raises(OSError, match="Read-only file system"):
            pwrite(self.source.file(), b"x")
        assert self.here.console == said_here


@pytest.fixture
def move(tmp_path: Path) -> Iterator[Move]:
    """Make the two hosts and the guest; everything is ended afterwards, and nothing may have misbehaved."""
    move = Move(tmp_path)
    try:
        move.start()
        yield move
    finally:
        problems = move.close()
    assert not problems, problems


def test_a_running_guest_moves_with_its_disk(move: Move) -> None:
    """It is the same boot, nothing that it had reported durable is lost or torn, and its standstill is told."""
    done = move.migrate()
    assert done.exit_code == 0, done.stderr
    move.check_moved()
    assert re.search(r"^fusemig: completed in [\d.]+ s, \d+ passes, downtime \d+ ms$", done.stderr, re.MULTILINE)
    parts = r"\(disks [\d.]+, memory [\d.]+, hand-off [\d.]+, start [\d.]+\)$"
    assert re.search(rf"^fusemig:   it stood still for [\d.]+ ms {parts}", done.stderr, re.MULTILINE)
    info = move.guest_info()
    assert [step["state"] for step in info["timeline"]] == [
        "copying", "standing-still", "loading", "loaded", "given", "arrived", "at-destination",
    ]  # fmt: skip
    assert info["downtime-ms"] > 0


def test_there_and_back_again(move: Move) -> None:
    """The destination's daemon moves the guest on as the source's did, into the image that was released."""
    assert move.migrate().exit_code == 0
    move.there.wait_writing()
    back = move.hosts.start("back", {"vda": move.directory / "back.img"}, incoming="tcp:127.0.0.1:0")
    with (move.directory / "back.img").open("wb") as file:
        file.truncate(SIZE)
    # The daemon opens an image that was created after its start when a source offers the disk, QEMU needs it before:
    assert back.file().stat().st_size == 0
    early = move._guest("early", back, incoming=f"unix:{move.directory}/early.ram")
    options = ["--guest", f"qmp:{move.there.migrator}", "--guest-destination", f"qmp:{early.migrator}"]
    refused = move.destination.migrate(back.uri, *options)
    assert refused.exit_code == 1
    assert "has 0 bytes in the QEMU at the destination and 67108864 here" in refused.stderr
    back.stop()
    back = move.hosts.start("back", {"vda": move.directory / "back.img"}, incoming="tcp:127.0.0.1:0")
    home = move._guest("home", back, incoming=f"unix:{move.directory}/home.ram")
    options[-1] = f"qmp:{home.migrator}"
    done = move.destination.migrate(back.uri, *options)
    assert done.exit_code == 0, done.stderr
    home.wait_writing()
    home.execute("stop")
    account = read_console(move.here.console, move.there.console, home.console)
    move.check_records(move.directory / "back.img", account)


def test_the_destinations_daemon_is_killed_in_pre_copy(move: Move) -> None:
    """The guest has not even noticed; QEMU was asked for nothing."""
    command = move.start_migrate(*SLOW)
    move.source.wait_phase("bulk")
    move.destination.kill()
    done = command.finish()
    assert done.exit_code == 1, done.stderr
    assert move.guest_info()["state"] == "returned"
    assert "downtime-ms" not in move.guest_info()
    assert move.here.migration() == {}
    move.check_runs_here()


def test_the_destinations_qemu_is_killed_in_pre_copy(move: Move) -> None:
    """It is noticed when the memory's turn comes, which is early enough: the guest runs on."""
    command = move.start_migrate(*SLOW)
    move.source.wait_phase("bulk")
    move.there.kill()
    move.source.set_parameters(max_bandwidth=0)
    done = command.finish()
    assert done.exit_code == 1
    assert "the QEMU at the destination at" in done.stderr
    assert "closed the connection: it has ended" in done.stderr
    assert move.here.migration() == {}
    move.check_runs_here()


def test_the_destinations_qemu_is_killed_at_pre_switchover(move: Move) -> None:
    """The source's QEMU would not see it before it sends the rest; the guest runs on and can move later."""
    command = move.hold_at_standstill()
    move.there.kill()
    move.let_go()
    done = command.finish()
    assert done.exit_code == 1, done.stderr
    assert "it stood still for" in done.stderr
    assert [step["state"] for step in move.guest_info()["timeline"]][-2:] == ["returning", "returned"]
    move.check_runs_here()
    found = {one["capability"]: one["state"] for one in move.here.execute("query-migrate-capabilities")}
    assert not found["pause-before-switchover"], "QEMU is as it was"
    move.destination.stop()
    move.make_destination()
    done = move.migrate()
    assert done.exit_code == 0, done.stderr
    move.check_moved()


def test_the_destinations_daemon_is_killed_at_pre_switchover(move: Move) -> None:
    """Its connection ends, and the guest runs on."""
    command = move.hold_at_standstill()
    move.destination.kill()
    done = command.finish()
    assert done.exit_code == 1, done.stderr
    move.check_runs_here()
    wait_until(lambda: not move.there.is_running(), "the end of the QEMU that holds a copy of the guest")


def test_the_hand_off_fails_when_the_destination_holds_all_of_the_guest(move: Move) -> None:
    """The last moment before COMMIT: QEMU's own migration has completed, and the source's must be told to go on."""
    command = move.start_copying()
    shutil.rmtree(move.directory / "state")  # `handed-off` cannot be made durable
    move.hurry()
    done = command.finish()
    assert done.exit_code == 1, done.stderr
    assert "the destination holds all of it, not running" in done.stderr
    assert "cannot write the epoch file" in done.stderr
    assert move.here.migration()["status"] == "completed"
    move.check_runs_here()
    wait_until(lambda: not move.there.is_running(), "the end of the QEMU that holds a copy of the guest")


def test_the_sources_daemon_is_killed_at_pre_switchover(move: Move) -> None:
    """Its disk has gone with it, so the guest can run nowhere, and nobody lets it run on the destination's copy."""
    command = move.hold_at_standstill()
    account = read_console(move.here.console)
    move.source.kill()
    is_late = "freeze deadline" in move.source.log()
    move.let_go()
    assert command.finish().exit_code == 1
    wait_until(lambda: move.destination.phase() == "failed", "the end at the destination")
    assert move.destination.disk()["state"] == "incoming"
    assert move.here.run_state() == "finish-migrate" or is_late
    assert move.there.run_state() == "inmigrate"
    assert move.there.console == ""
    move.check_records(move.image, account)


def test_cancel_at_pre_switchover(move: Move) -> None:
    """`fusemig cancel` lets the guest run on, and the next move succeeds with all that it wrote in between."""
    command = move.hold_at_standstill()
    move.source.qmp.execute("migrate_cancel")
    done = command.finish()
    assert done.exit_code == 6 or "freeze deadline" in done.stderr, done.stderr
    move.let_go()
    move.check_runs_here()
    move.destination.stop()
    move.make_destination()
    done = move.migrate()
    assert done.exit_code == 0, done.stderr
    move.check_moved()


def test_interrupt_while_the_memory_is_copied(move: Move) -> None:
    """Ctrl-C cancels all of it."""
    command = move.start_copying()
    command.process.send_signal(signal.SIGINT)
    done = command.finish()
    assert done.exit_code == 6, done.stderr
    assert move.here.migration()["status"] == "cancelled"
    assert "downtime-ms" not in move.guest_info()
    move.check_runs_here()


def test_whoever_asked_for_the_move_is_killed(move: Move) -> None:
    """The move is the daemon's: it goes on, and the guest never stands still for want of an order."""
    command = move.start_copying()
    command.process.kill()
    move.hurry()
    move.source.wait_phase("completed")
    assert move.guest_info()["state"] == "at-destination"
    move.check_moved()


def test_the_sources_daemon_ends_in_order(move: Move) -> None:
    """It calls QEMU's migration off before it takes the disk away; nothing was handed over."""
    command = move.start_copying()
    account = read_console(move.here.console)
    os.kill(move.source.pid, signal.SIGTERM)
    assert command.finish().exit_code in (1, 6)
    assert move.here.migration()["status"] == "cancelled"
    assert move.here.run_state() == "running"
    move.here.close()  # whatever holds a file of the mount keeps the daemon from unmounting it
    assert move.source.wait() == 0
    wait_until(lambda: move.destination.phase() == "failed", "the end at the destination")
    assert move.destination.disk()["state"] == "incoming"
    move.check_records(move.image, account)


def test_the_sources_qemu_is_killed(move: Move) -> None:
    """Nothing is handed over; the error says that the guest runs nowhere, with an exit code of its own."""
    command = move.start_copying()
    account = read_console(move.here.console)
    move.here.kill()
    done = command.finish()
    assert done.exit_code == 9, done.stderr
    assert "the guest's disks are here and the guest could not be resumed: no QEMU at the source" in done.stderr
    assert move.source.disk()["gate"] == "open"
    assert move.there.console == ""
    move.check_records(move.image, account)


def test_the_destination_cannot_open_its_disk(move: Move) -> None:
    """The disk has gone there when QEMU finds it locked: the guest runs nowhere, least of all at the source."""
    with move.destination.file().open("r+b") as file:
        # What QEMU's file locking asks for (block/file-posix.c) is refused to it while anybody holds all of the file.
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        done = move.migrate()
        assert done.exit_code == 9, done.stderr
        assert "the disks are at the destination and the guest does not run there" in done.stderr
        assert "Failed to lock byte" in done.stderr, "QEMU's own words"
        assert move.here.run_state() == "postmigrate"
        assert move.destination.disk()["state"] == "owner"
    move.there.execute("cont")
    move.check_moved()


def test_a_paused_guest_stays_paused(move: Move) -> None:
    """It moves as it is."""
    move.here.execute("stop")
    said = move.here.console
    done = move.migrate("--progress", "json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["x-fusemig"]["guest"]["state"] == "at-destination"
    assert move.there.run_state() == "paused"
    move.there.execute("cont")
    move.there.wait_writing()
    assert move.here.console == said
    move.check_moved()


class TestRefusals:
    """What is found out before anything moves; a QEMU without a kernel is enough."""

    @pytest.fixture
    def pair(self, tmp_path: Path) -> Iterator[tuple[Host, Host]]:
        """Start a source and a destination with a disk of 8 MiB."""
        hosts = Hosts(tmp_path)
        try:
            yield hosts.pair()
        finally:
            problems = hosts.close()
        assert not problems, problems

    @staticmethod
    def migrate(pair: tuple[Host, Host], here: Path, there: Path) -> str:
        """Run `fusemig migrate`, which must fail before anything has moved; return the error."""
        done = pair[0].migrate(pair[1].uri, "--guest", f"qmp:{here}", "--guest-destination", f"qmp:{there}")
        assert done.exit_code == 1, done.stderr
        assert pair[0].migration()["x-fusemig"]["phase"] == "failed"
        assert pair[1].disk()["state"] == "waiting"
        return done.stderr

    @staticmethod
    def qemu(directory: Path, name: str, image: Path | None, **options: Any) -> Qemu:
        """Start a paused QEMU with two QMP sockets, on an image of its own."""
        (directory / name).mkdir()
        drives = [] if image is None else [Drive("vda", image)]
        more = ["-qmp", f"unix:{directory / name}/migrator.sock,server=on,wait=off"]
        return Qemu(directory / name, drives=drives, more=more, **options)

    @staticmethod
    def image(directory: Path, name: str, size: int) -> Path:
        """Make an image that no daemon serves."""
        path = directory / name
        with path.open("wb") as file:
            file.truncate(size)
        return path

    def test_no_qemu_at_the_source(self, pair: tuple[Host, Host], tmp_path: Path) -> None:
        """The text names the socket and the option that makes it."""
        error = self.migrate(pair, tmp_path / "none.sock", tmp_path / "none.sock")
        assert f"no QEMU at the source listens at '{tmp_path}/none.sock': is QEMU running with -qmp unix:" in error

    def test_a_socket_that_another_client_holds(self, pair: tuple[Host, Host], tmp_path: Path) -> None:
        """QEMU answers one client at a time."""
        with self.qemu(tmp_path, "a", None) as qemu:
            error = self.migrate(pair, qemu.control, qemu.control)
        assert "does not greet as QMP does: QEMU serves one client per socket" in error

    def test_a_destination_that_does_not_wait(self, pair: tuple[Host, Host], tmp_path: Path) -> None:
        """A QEMU without -incoming holds another guest."""
        with self.qemu(tmp_path, "a", None), self.qemu(tmp_path, "b", None):
            error = self.migrate(pair, tmp_path / "a/migrator.sock", tmp_path / "b/migrator.sock")
        assert "the QEMU at the destination is prelaunch: start it anew with -incoming" in error or (
            "the QEMU at the source is prelaunch" in error
        )

    @pytest.mark.parametrize(
        ("size", "said"),
        [(4 << 20, "disk 'vda' has 4194304 bytes in the QEMU at the destination and 8388608 here"), (None, "no disk")],
    )
    def test_other_disks(self, pair: tuple[Host, Host], tmp_path: Path, size: int | None, said: str) -> None:
        """A disk of another size, or none, is found before anything moves."""
        here = self.image(tmp_path, "here.img", 8 << 20)
        there = None if size is None else self.image(tmp_path, "there.img", size)
        with (
            self.qemu(tmp_path, "a", here) as source,
            self.qemu(tmp_path, "b", there, incoming=f"unix:{tmp_path}/ram"),
        ):
            source.execute("cont")
            error = self.migrate(pair, tmp_path / "a/migrator.sock", tmp_path / "b/migrator.sock")
        assert said in error

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--guest", "qmp:/a"], "give --guest and --guest-destination"),
            (["--guest-uri", "tcp:a:1"], "give --guest and --guest-destination"),
            (["--guest", "/a", "--guest-destination", "qmp:/b"], "guest '/a': write qmp:PATH"),
            (["--guest", "qmp:/a", "--guest-destination", "qmp:/b", "--pause-command", "true"], "not both"),
            (["--pause-command", "true"], "give --pause-command and --resume-command"),
            (["--pause-command", "true", "--resume-command", "true"], "start it with --allow-guest-commands"),
            (["--guest", "qmp:/a", "--guest-destination", "qmp:/b", "--wire", "qemu"], "over the native wire only"),
        ],
    )
    def test_options_that_do_not_fit(self, pair: tuple[Host, Host], options: list[str], said: str) -> None:
        """Nothing is started."""
        done = pair[0].migrate(pair[1].uri, *options)
        assert done.exit_code in (1, 2)
        assert said in done.stderr
        assert "x-fusemig" not in pair[0].migration()
