"""A guest that is paused and resumed by commands: here a process that writes to the mount, stopped by a signal."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from support.hosts import MIB, assert_unharmed, pread, wait_until, write_random

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.hosts import Finished, Host, Hosts

pytestmark = pytest.mark.fuse

WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
number = 0
while True:
    number += 1
    os.pwrite(fd, number.to_bytes(8, "little") * 512, 0)
    os.fdatasync(fd)
    os.write(1, b"%d\\n" % number)
"""
"""The guest: it notes each number that is durable, and ends at the first error."""


class Stage(NamedTuple):
    """Two hosts and the guest between them."""

    source: Host
    destination: Host
    guest: subprocess.Popen[bytes]
    noted: Path
    """What the guest has noted."""
    calls: Path
    """What the commands have noted: a line each."""

    def last(self) -> int:
        """Return the last number that the guest noted."""
        lines = self.noted.read_text().split("\n")[:-1]
        return int(lines[-1]) if lines else 0

    def wait_writing(self) -> None:
        """Wait for its next number."""
        last = self.last()
        wait_until(lambda: self.last() > last, "a number of the guest")

    def migrate(self, pause: str, resume: str, *more: str) -> Finished:
        """Migrate with these commands, each of which notes the side it was told."""
        note = f'echo "{{}} $FUSEMIG_SIDE" >> {shlex.quote(str(self.calls))}'
        commands = ["--pause-command", f"{note.format('pause')}; {pause}"]
        commands += ["--resume-command", f"{note.format('resume')}; {resume}"]
        return self.source.migrate(self.destination.uri, *commands, *more)

    @property
    def stop(self) -> str:
        """The command that pauses the guest."""
        return f"kill -STOP {self.guest.pid}"

    @property
    def resume(self) -> str:
        """The command that lets it run on where it is, which is the source."""
        return f'if [ "$FUSEMIG_SIDE" = source ]; then kill -CONT {self.guest.pid}; fi'

    def called(self) -> list[str]:
        """Return the commands that were run."""
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@contextmanager
def writing(file: Path, noted: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the guest on ``file``."""
    with noted.open("wb") as out:
        guest = subprocess.Popen([sys.executable, "-c", WRITER, str(file)], stdout=out, stderr=subprocess.DEVNULL)
    try:
        yield guest
    finally:
        guest.kill()
        guest.wait(20)


@pytest.fixture
def stage(hosts: Hosts) -> Iterator[Stage]:
    """Start everything; the guest writes."""
    image = write_random(hosts.directory / "source.img", 8 * MIB)
    source = hosts.start("source", {"vda": image}, options=["--allow-guest-commands"])
    noted = hosts.directory / "noted"
    with writing(source.file(), noted) as guest:
        stage = Stage(source, hosts.destination(), guest, noted, hosts.directory / "calls")
        stage.wait_writing()
        yield stage


def test_a_guest_moves_by_commands(stage: Stage) -> None:
    """Paused before the last blocks, resumed there after the take-over; what it had noted is there."""
    done = stage.migrate(stage.stop, stage.resume)
    assert done.exit_code == 0, done.stderr
    assert stage.called() == ["pause source", "resume destination"]
    assert "it runs at the destination" in done.stderr
    number = int.from_bytes(pread(stage.destination.file(), 8), "little")
    assert number in (stage.last(), stage.last() + 1)  # stopped between fdatasync and its note, perhaps
    assert pread(stage.destination.file(), 4096) == number.to_bytes(8, "little") * 512
    guest = stage.source.migration()["x-fusemig"]["guest"]
    assert (guest["runtime"], guest["state"]) == ("command", "at-destination")


@pytest.mark.parametrize(
    ("pause", "deadline", "said"),
    [
        ("{stop}; echo no snapshot; exit 3", "40s", "the pause command failed with 3: no snapshot"),
        # Long enough for what the shells of both commands do.
        ("{stop}; sleep 60", "5s", "the pause command did not end in 5 s (--command-deadline) and was killed"),
    ],
)
def test_a_pause_command_that_fails_is_taken_back(stage: Stage, pause: str, deadline: str, said: str) -> None:
    """It may have got halfway, so the guest is resumed at the source."""
    done = stage.migrate(pause.format(stop=stage.stop), stage.resume, "--command-deadline", deadline)
    assert done.exit_code == 1, done.stderr
    assert said in done.stderr
    assert stage.called() == ["pause source", "resume source"]
    stage.wait_writing()
    stage.guest.kill()
    assert_unharmed(stage.source, stage.destination)


def test_a_destination_that_goes_away_while_the_guest_is_paused(stage: Stage) -> None:
    """The guest runs on at the source."""
    done = stage.migrate(f"{stage.stop}; kill -KILL {stage.destination.pid}; sleep 0.2", stage.resume)
    stage.destination.kill()
    assert done.exit_code == 1, done.stderr
    assert stage.called() == ["pause source", "resume source"]
    stage.wait_writing()


def test_cancel_ends_the_pause_command_and_what_it_started(stage: Stage) -> None:
    """Nothing of it goes on beside the resumed guest."""
    late = stage.calls.with_name("late")
    pause = f"sleep 61 & echo $! > {late}; {stage.stop}; sleep 60"
    command = stage.source.start_migrate(
        stage.destination.uri, "--pause-command", pause, "--resume-command", stage.resume
    )
    guest = stage.guest.pid
    wait_until(lambda: _state(guest) == "T", "the pause")
    command.process.send_signal(signal.SIGINT)
    assert command.finish().exit_code == 6
    stage.wait_writing()
    wait_until(lambda: not _is_running(int(late.read_text()), b"sleep"), "the end of what the command left behind")


def _is_running(pid: int, name: bytes) -> bool:
    """Tell whether a process of this name runs; one that nobody has waited for yet does not."""
    try:
        return name in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_a_resume_command_that_fails_at_the_destination(stage: Stage) -> None:
    """The disk has moved; the exit code says that the guest runs nowhere, and the text where it may."""
    done = stage.migrate(stage.stop, "echo cannot load; exit 1")
    assert done.exit_code == 9, done.stderr
    assert "the disks are at the destination and the guest does not run there: the resume command failed" in done.stderr
    assert "cannot load" in done.stderr
    assert stage.called() == ["pause source", "resume destination"]
    assert stage.destination.disk()["state"] == "owner"
    assert stage.last() > 0


def test_a_resume_command_that_fails_at_the_source(stage: Stage) -> None:
    """The same for a move that was called off."""
    done = stage.migrate(f"{stage.stop}; exit 1", "exit 2")
    assert done.exit_code == 9, done.stderr
    assert "the pause command failed with 1" in done.stderr
    assert "could not be resumed: the resume command failed with 2" in done.stderr
    assert stage.source.disk()["gate"] == "open"


def test_a_deadline_that_is_none(stage: Stage) -> None:
    """Refused before anything starts."""
    done = stage.migrate(stage.stop, stage.resume, "--command-deadline", "0")
    assert done.exit_code == 2
    assert "expects an integer in the range of 1 to" in done.stderr
    assert stage.called() == []


def test_nothing_is_run_before_the_disks_have_converged(stage: Stage) -> None:
    """A move that fails in the bulk phase has not touched the guest."""
    command = stage.source.start_migrate(
        stage.destination.uri, "--max-bandwidth", "500K", "--pause-command", stage.stop, "--resume-command", "false"
    )
    stage.source.wait_phase("bulk")
    stage.destination.kill()
    assert command.finish().exit_code == 1
    assert stage.called() == []
    stage.wait_writing()
