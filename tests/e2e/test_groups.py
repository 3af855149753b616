"""`fusemig migrate --group` with real daemons: two sources, two destinations, guests that write all the time."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from support.groups import COORDINATOR_POINTS, RealGroup
from support.hosts import MIB, QmpRefusedError, pwrite, wait_until, write_random
from support.writers import RecordWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.hosts import Hosts

pytestmark = pytest.mark.fuse


@pytest.fixture
def make(hosts: Hosts, place: Path) -> Iterator[Callable[..., RealGroup]]:
    """Make groups whose commands are ended with the test."""
    made: list[RealGroup] = []

    def start(*failpoints: str) -> RealGroup:
        made.append(RealGroup(hosts, place, (*failpoints, "", "")[:2]))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for group in made:
        group.close()


def check(group: RealGroup, writers: list[RecordWriter], owners: list[str]) -> None:
    """See that every acknowledged record is with the owner, and that he can be written and the other cannot."""
    for index, (writer, owner) in enumerate(zip(writers, owners, strict=True)):
        sides = {"source": group.sources[index], "destination": group.destinations[index]}
        writer.end()
        writer.check(sides[owner].file())
        pwrite(sides[owner].file(), b"after", MIB, os.O_DSYNC)
        with pytest.raises(OSError, match="Read-only"):
            pwrite(sides["destination" if owner == "source" else "source"].file(), b"after", MIB)


def test_all_move(make: Callable[..., RealGroup]) -> None:
    """Under writers: one switchover, nothing lost, and the directory is empty again."""
    group = make()
    writers = [RecordWriter(source.file()) for source in group.sources]
    done = group.migrate()
    assert done.exit_code == 0, done.stderr
    assert [line.split(": ")[2].split(" in ")[0] for line in done.stderr.splitlines()] == ["completed"] * 2
    assert group.owners() == ["destination"] * 2
    check(group, writers, ["destination"] * 2)
    assert list(group.directory.iterdir()) == []


def test_one_that_is_refused_keeps_all(make: Callable[..., RealGroup]) -> None:
    """A destination that is not there: none moves, guests write on; then all can."""
    group = make()
    writers = [RecordWriter(source.file()) for source in group.sources]
    uri, group.uris[1] = group.uris[1], f"unix:{group.directory.parent}/nobody"
    done = group.migrate()
    assert done.exit_code == 1, done.stderr
    assert "cannot connect" in done.stderr
    assert group.owners() == ["source"] * 2
    check(group, writers, ["source"] * 2)
    assert list(group.directory.iterdir()) == []
    group.uris[1] = uri
    group.destinations[0].wait_free()
    assert group.migrate().exit_code == 0
    assert group.owners() == ["destination"] * 2


@pytest.mark.nightly
def test_a_destination_killed_when_it_is_prepared_keeps_all(
    make: Callable[..., RealGroup], hosts: Hosts, place: Path
) -> None:
    """Its source learns of it while it is pledged or before; nobody moves."""
    group = make()
    group.destinations[1].stop()
    uri = f"unix:{place}/incoming-mortal"
    mortal = hosts.start("mortal", {"vda": place / "mortal.copy"}, incoming=uri, failpoint="after-prepared-sent:kill")
    group.uris[1], group.destinations[1] = uri, mortal
    group.copies[1] = place / "mortal.copy"
    writers = [RecordWriter(source.file()) for source in group.sources]
    command = group.start()
    mortal.wait_killed()
    done = command.finish()
    group.restart_destination(1)
    owners = group.owners()
    assert len(set(owners)) == 1, (owners, done.stderr)
    assert done.exit_code != 0
    check(group, writers, owners)


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(point, marks=() if point == "after-proposal" else pytest.mark.nightly)
        for point in COORDINATOR_POINTS
    ],
)
def test_a_coordinator_that_is_killed(make: Callable[..., RealGroup], point: str) -> None:
    """Wherever it dies, nobody waits for it, and all or none has moved."""
    group = make()
    writers = [RecordWriter(source.file()) for source in group.sources]
    command = group.start(failpoint=point)
    assert command.finish().exit_code == -signal.SIGKILL
    for source in group.sources:  # what waits at pre-switchover is an ordinary migration, which anybody may cancel
        if source.phase() in ("setup", "bulk", "dirty", "pre-switchover"):
            source.qmp.execute("migrate_cancel")
    owners = group.owners()
    assert owners == ["destination" if COORDINATOR_POINTS[point] else "source"] * 2
    check(group, writers, owners)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("point", "decision", "moves"),
    [
        ("after-pledged", "", False),
        ("after-pledged", "abort", False),
        ("after-commit-decided", "commit", True),
        ("after-one-pledged", "", False),
    ],
)
def test_a_source_that_is_killed_with_a_pledge(
    make: Callable[..., RealGroup], point: str, decision: str, moves: bool
) -> None:
    """Started again it does as was decided, or decides; the other does the same."""
    group = make("", point)
    writers = [RecordWriter(source.file()) for source in group.sources]
    command = group.start(failpoint="" if decision else "after-continued")
    group.sources[1].wait_killed()
    done = command.finish()
    assert done.exit_code == (7 if decision else -signal.SIGKILL), done.stderr
    if decision:
        found = [path.read_text() for path in group.directory.glob("*.decision")]
        assert found == [f"{decision}\n"]
    group.restart_source(1)
    owners = group.owners()
    assert owners == ["destination" if moves else "source"] * 2
    check(group, writers, owners)
    if decision == "abort":
        wait_until(lambda: not list(group.directory.glob("*.proposal")), "its proposal's end")


def test_a_directory_that_is_away_leaves_it_in_doubt(make: Callable[..., RealGroup]) -> None:
    """Also where an empty one stands in its place: neither side is written until the right one is back, or a person."""
    group = make("", "after-commit-decided")
    writers = [RecordWriter(source.file()) for source in group.sources]
    command = group.start()
    group.sources[1].wait_killed()
    assert command.finish().exit_code == 7
    away = group.directory.rename(group.directory.with_name("away"))
    group.directory.mkdir()
    source = group.restart_source(1)
    wait_until(lambda: "nothing can be decided there" in source.disk().get("in-doubt", ""), "its first look")
    assert source.disk()["state"] == "pledged"
    with pytest.raises(OSError, match="Read-only"):
        pwrite(source.file(), b"x")
    refused = source.migrate("tcp:127.0.0.1:1")
    assert refused.exit_code == 7
    assert refused.stderr.startswith("fusemig: disk 'vda' is in doubt")
    group.directory.rmdir()
    away.rename(group.directory)
    assert group.owners() == ["destination"] * 2
    check(group, writers, ["destination"] * 2)


@pytest.mark.nightly
def test_a_person_resolves_it(make: Callable[..., RealGroup]) -> None:
    """Where the directory is gone for good."""
    group = make("", "after-commit-decided")
    command = group.start()
    group.sources[1].wait_killed()
    command.finish()
    group.directory.rename(group.directory.with_name("gone"))
    source = group.restart_source(1)
    options = ("--disk", "vda", "--owner", "destination", "--i-have-fenced-the-other")
    assert source.command("resolve", *options).exit_code == 0
    assert source.disk()["state"] == "released"
    assert group.destinations[1].command("resolve", *options).exit_code == 0
    pwrite(group.destinations[1].file(), b"x")


def test_what_a_daemon_refuses(hosts: Hosts, place: Path) -> None:
    """One clear error each, and nothing begins."""
    host = hosts.start("host", {"vda": write_random(place / "a.img", MIB)})
    for more, text in (
        ({"x-fusemig-wire": "qemu"}, "does not go with QEMU's wire"),
        ({"x-fusemig-mode": "postcopy"}, "does not go with post-copy"),
        ({"x-fusemig-guest": "qmp:/nowhere", "x-fusemig-guest-destination": "qmp:/nowhere"}, "go with a guest"),
        ({"x-fusemig-group": "relative/name"}, "does not name a group"),
        ({"x-fusemig-group": f"{place}/na.me"}, "does not name a group"),
        ({"x-fusemig-group": f"{place}/missing/name"}, "No such file or directory; name one on this host"),
    ):
        arguments = {"uri": "tcp:127.0.0.1:1", "x-fusemig-group": f"{place}/name"} | more
        with pytest.raises(QmpRefusedError, match=text):
            host.qmp.execute("migrate", arguments)
    assert host.phase() == "none"
