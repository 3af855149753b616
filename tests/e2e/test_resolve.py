"""`fusemig resolve`: a person's word where nobody can be asked, and its refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fusemig.records.epoch import EpochFile
from support.hosts import MIB, Finished, QmpRefusedError, assert_migrates, pwrite, wait_until, write_random

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse

FENCED = "--i-have-fenced-the-other"
UNFENCED = "fusemig: this decides who may write the disk, and nothing checks it: first see to it that the other side "


def resolve(target: Path, *arguments: object) -> Finished:
    """Run ``fusemig resolve`` on an image, or a socket."""
    command = [sys.executable, "-m", "fusemig", "resolve", target, *arguments]
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, timeout=40)
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def doubtful(hosts: Hosts, place: Path) -> tuple[Host, Path, str]:
    """Return a source in doubt, the image of its destination, which is dead and prepared, and its URI."""
    uri = f"unix:{place}/incoming"
    image, copy = write_random(place / "a.img", 4 * MIB), place / "b.img"
    source = hosts.start("source", {"vda": image})
    destination = hosts.start("destination", {"vda": copy}, incoming=uri, failpoint="after-commit-received:kill")
    assert source.migrate(uri).exit_code == 7
    destination.wait_killed()
    wait_until(lambda: "in-doubt" in source.disk(), "the doubt")
    return source, copy, uri


def test_the_source_takes_its_disk_back(hosts: Hosts, doubtful: tuple[Host, Path, str]) -> None:
    """Logged; the epoch is one that the destination cannot have used; and the disk can be migrated again."""
    source, copy, uri = doubtful
    done = source.command("resolve", "--disk", "vda", "--owner", "source", FENCED)
    assert done == (0, "", "fusemig: vda: the source owns it from now on\n")
    assert source.disk()["state"] == "owner"
    assert source.disk()["epoch"] == 2
    pwrite(source.file(), b"mine again")
    assert source.migration()["status"] == "failed"
    assert "resolved by hand" in source.log()
    assert source.qmp.execute("query-status")["status"] == "running"
    # The destination is prepared for what the source has not given it; it hears of that with the next migration.
    destination = hosts.start("again", {"vda": copy}, incoming=uri)
    assert_migrates(source, destination)
    assert destination.disk()["epoch"] == 3


def test_the_destination_is_said_to_own_it(hosts: Hosts, doubtful: tuple[Host, Path, str]) -> None:
    """On both sides, each by its own; the destination's without a daemon, and then it is served plainly."""
    source, copy, _ = doubtful
    done = source.command("resolve", "--disk", "vda", "--owner", "destination", FENCED)
    assert done.exit_code == 0, done.stderr
    assert source.disk()["state"] == "released"
    assert source.phase() == "completed"
    with pytest.raises(OSError, match="Read-only"):
        pwrite(source.file(), b"x")
    done = resolve(copy, "--owner", "destination", FENCED)
    assert done.exit_code == 0, done.stderr
    assert "resolved by hand" in done.stderr
    assert done.stderr.endswith("the destination owns it from now on; serve it to write it\n")
    pwrite(hosts.start("plain", {"vda": copy}).file(), b"taken over")


def test_a_prepared_destination_is_told_to_forget(hosts: Hosts, doubtful: tuple[Host, Path, str]) -> None:
    """Then the source, which asks, takes its disk back by itself."""
    source, copy, uri = doubtful
    destination = hosts.make("again", {"vda": copy}, incoming=uri)
    assert resolve(copy, "--owner", "source", FENCED).exit_code == 0
    destination.start()
    assert destination.disk()["state"] == "incoming"
    wait_until(lambda: source.disk()["state"] == "owner", "the answer")
    pwrite(source.file(), b"mine again")
    assert_migrates(source, destination)


def test_a_destination_that_moved_is_asked_where_it_is(
    hosts: Hosts, doubtful: tuple[Host, Path, str], place: Path
) -> None:
    """`--ask`: its word settles it, and nobody's else is needed; also where the first answer does not come at once."""
    source, copy, uri = doubtful
    moved = f"unix:{place}/moved"
    done = source.command("resolve", "--disk", "vda", "--ask", moved)
    assert done.exit_code == 7, done.stderr
    assert f"cannot connect to {moved}" in done.stderr
    assert source.disk()["state"] == "handed-off"
    destination = hosts.start("moved", {"vda": copy}, incoming=moved)
    wait_until(lambda: source.disk()["state"] == "released", "the answer at the new address")
    pwrite(destination.file(), b"taken over")
    done = source.command("resolve", "--disk", "vda", "--ask", uri)
    assert done.exit_code == 1
    assert "disk 'vda' is not in doubt: there is nothing to ask" in done.stderr


def test_asking_settles_it_at_once(hosts: Hosts, doubtful: tuple[Host, Path, str], place: Path) -> None:
    """With the destination there already, the command returns when the owner is known."""
    source, copy, _ = doubtful
    destination = hosts.start("moved", {"vda": copy}, incoming=f"unix:{place}/moved")
    done = source.command("resolve", "--disk", "vda", "--ask", f"unix:{place}/moved")
    assert done == (0, "", "fusemig: vda: settled; see `fusemig status`\n")
    assert source.disk()["state"] == "released"
    assert destination.disk()["gate"] == "open"
    refused = {
        ("--disk", "vda"): "say who owns the disk (--owner), or where to ask that (--ask URI): one of the two",
        ("--disk", "vda", "--ask", "unix:/x", "--owner", "source"): "one of the two",
        ("--disk", "vda", "--ask", "unix:/x", FENCED): "--ask takes nobody's word",
        ("--ask", "unix:/x"): "name the disks",
        ("--disk", "vda", "--ask", "nonsense"): "is not a migration URI",
    }
    for arguments, text in refused.items():
        done = source.command("resolve", *arguments)
        assert (done.exit_code, text in done.stderr) == (2, True), done.stderr
    done = resolve(source.images["vda"], "--ask", "unix:/x")
    assert (done.exit_code, "only a running daemon can ask" in done.stderr) == (2, True), done.stderr


def test_a_running_destination_is_resolved(hosts: Hosts, place: Path) -> None:
    """A prepared destination whose source is gone for good is written at once, without a restart."""
    uri = f"unix:{place}/incoming"
    image, copy = write_random(place / "a.img", 4 * MIB), place / "b.img"
    source = hosts.start("source", {"vda": image}, failpoint="after-handed-off:kill")
    destination = hosts.start("destination", {"vda": copy}, incoming=uri)
    source.start_migrate(uri)
    source.wait_killed()
    wait_until(lambda: destination.disk()["state"] == "prepared", "the proof")
    wait_until(lambda: destination.phase() == "failed", "the destination's notice")
    done = destination.command("resolve", "--disk", "vda", "--owner", "destination", FENCED)
    assert done.exit_code == 0, done.stderr
    pwrite(destination.file(), b"taken over")
    # The source comes back after all, and does what it must.
    source = hosts.start("again", {"vda": image})
    wait_until(lambda: source.disk()["state"] == "released", "the answer")


def test_a_released_disk_is_taken_back(hosts: Hosts) -> None:
    """The documented way, with a daemon and without; nothing has to be removed by hand."""
    source, destination = hosts.pair(4 * MIB)
    assert source.migrate(destination.uri).exit_code == 0
    image = source.images["vda"]
    assert destination.stop() == 0
    done = source.command("resolve", "--disk", "vda", "--owner", "source", FENCED)
    assert done.exit_code == 0, done.stderr
    pwrite(source.file(), b"mine again")
    assert source.stop() == 0
    # Its twin, offline: the other side's copy of that moment.
    copy = destination.images["vda"]
    done = resolve(copy, "--owner", "source", FENCED)
    assert done.exit_code == 1
    assert f"{copy}.fusemig: there is nothing to resolve: the state is 'owner'" in done.stderr
    file = EpochFile(image.with_name(f"{image.name}.fusemig"))
    assert file.record is not None
    assert (file.record.state.value, file.record.epoch) == ("owner", 2)


def test_a_disk_that_went_over_qemus_wire_is_taken_back(hosts: Hosts, place: Path) -> None:
    """Nobody can be asked there, and nobody is; until a person says so it is in doubt."""
    image, copy = write_random(place / "a.img", 4 * MIB), place / "b.img"
    copy.touch()
    os.truncate(copy, 4 * MIB)
    source = hosts.start("source", {"vda": image})
    destination = hosts.start("destination", {"vda": copy}, incoming="tcp:127.0.0.1:0")
    assert source.migrate(destination.uri, "--wire", "qemu").exit_code == 0
    wait_until(lambda: destination.disk()["state"] == "owner", "the take-over")
    wait_until(lambda: "nobody can be asked" in source.disk()["in-doubt"], "what is known")
    assert destination.status()["incoming"]["rejected-connections"] == 0
    assert destination.stop() == 0
    done = source.command("resolve", "--disk", "vda", "--owner", "source", FENCED)
    assert done.exit_code == 0, done.stderr
    pwrite(source.file(), b"mine again")


# Refusals: nothing has changed after any of them


def test_without_the_fence_nothing_is_resolved(doubtful: tuple[Host, Path, str]) -> None:
    """Exit code 2 and what has to be done first; by QMP too."""
    source, copy, _ = doubtful
    for done in (
        source.command("resolve", "--disk", "vda", "--owner", "source"),
        resolve(copy, "--owner", "destination"),
    ):
        assert done.exit_code == 2
        assert done.stderr.startswith(UNFENCED)
    with pytest.raises(QmpRefusedError, match="then add --i-have-fenced-the-other"):
        source.qmp.execute("x-fusemig-resolve", {"disks": ["vda"], "owner": "source"})
    assert source.disk()["state"] == "handed-off"
    assert EpochFile(copy.with_name(f"{copy.name}.fusemig")).record is not None


def test_what_is_not_in_doubt_is_not_resolved(hosts: Hosts) -> None:
    """The text has the state, for each of them."""
    source, destination = hosts.pair(4 * MIB)

    def refusal(host: Host, owner: str) -> str:
        done = host.command("resolve", "--disk", "vda", "--owner", owner, FENCED)
        assert done.exit_code == 1
        return done.stderr

    assert "the disk never moved" in refusal(source, "source")
    assert "the disk never moved" in refusal(destination, "destination")
    source.migrate_to_pause(destination.uri)
    assert "is busy: it is being migrated to" in refusal(source, "source")
    assert "is busy: it is being received from" in refusal(destination, "destination")
    source.command("cancel")
    wait_until(lambda: destination.phase() == "failed", "the destination's notice")
    wait_until(lambda: source.phase() == "cancelled", "the source's end")
    assert "the state is 'incoming': the image is incomplete" in refusal(destination, "destination")
    assert "the state is 'owner': this side owns the disk" in refusal(source, "destination")
    assert_migrates(source, destination)
    assert "the state is 'owner'" in refusal(destination, "source")
    assert "the state is 'released': the destination owns the disk already" in refusal(source, "destination")


def test_wrong_targets(hosts: Hosts, place: Path) -> None:
    """A disk that there is not, none, a file that there is not, an image that is served."""
    image = write_random(place / "a.img", MIB)
    host = hosts.start("host", {"vda": image})
    assert "Device 'vdx' not found" in host.command("resolve", "--disk", "vdx", "--owner", "source", FENCED).stderr
    assert "name the disks" in host.command("resolve", "--owner", "source", FENCED).stderr
    assert "leave it out" in resolve(image, "--disk", "vda", "--owner", "source", FENCED).stderr
    done = resolve(place / "nothing", "--owner", "source", FENCED)
    assert done.exit_code == 2
    assert "name the control socket of a running daemon, or the image of a stopped one" in done.stderr
    done = resolve(image, "--owner", "source", FENCED)
    assert done.exit_code == 2
    assert "is in use by another process" in done.stderr
