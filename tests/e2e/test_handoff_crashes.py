"""Real daemons that are killed at each named point of the hand-off, and started again: what follows needs nobody.

Two disks move together while a guest writes numbered records, each acknowledged as durable. After the restart exactly
one side can be written, of both disks, and every acknowledged record is there.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from fusemig.failpoint import NAMES
from support.groups import COORDINATOR_POINTS, PLEDGE_POINTS
from support.hosts import (
    MIB,
    QmpRefusedError,
    assert_migrates,
    assert_unharmed,
    pread,
    pwrite,
    wait_until,
    write_random,
)
from support.writers import RecordWriter

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse

SOURCE_POINTS = {
    "after-prepared-received": "source",
    "after-one-handed-off": "source",
    "after-handed-off": "destination",
    "after-commit-sent": "destination",
    "after-taken-received": "destination",
    "after-released": "destination",
}
DESTINATION_POINTS = {
    "before-prepared": "source",
    "after-one-prepared": "source",
    "after-prepared": "source",
    "after-prepared-sent": "destination",
    "after-commit-received": "destination",
    "after-one-owner": "destination",
    "after-owner": "destination",
    "after-taken-sent": "destination",
}


def is_settled(*hosts: Host) -> bool:
    """Whether nothing is in doubt, nor being asked."""
    return not any("in-doubt" in disk for host in hosts for disk in host.status()["disks"])


def writable(host: Host) -> set[str]:
    """Return the disks that can be written, by writing to them."""
    found = set()
    for name in host.images:
        with suppress(OSError):
            pwrite(host.file(name), b"after the crash", 6 * MIB, os.O_DSYNC)
            found.add(name)
    return found


def test_every_point_is_tried() -> None:
    """The table has those of this test, those of groups and of mounts that outlive their daemon (tests there)."""
    others = {"after-welcome", "before-welcome", "after-mount", "after-init-kept", "before-resend", "after-resend"}
    assert {*SOURCE_POINTS, *DESTINATION_POINTS, *COORDINATOR_POINTS, *PLEDGE_POINTS, *others} == NAMES


POSTCOPY_POINTS = (
    "after-prepared-received",
    "after-handed-off",
    "after-commit-sent",
    "after-released",
    "after-prepared",
    "after-one-owner",
)


@pytest.mark.parametrize(
    ("killed", "point", "owner", "mode"),
    [
        *(("source", point, owner, "precopy") for point, owner in SOURCE_POINTS.items()),
        *(("destination", point, owner, "precopy") for point, owner in DESTINATION_POINTS.items()),
        *(("source", point, SOURCE_POINTS[point], "postcopy") for point in POSTCOPY_POINTS[:4]),
        *(("destination", point, DESTINATION_POINTS[point], "postcopy") for point in POSTCOPY_POINTS[4:]),
    ],
)
def test_killed_and_started_again(hosts: Hosts, place: Path, killed: str, point: str, owner: str, mode: str) -> None:
    """Whoever was killed and where: one owner, nothing lost, and nobody had to say anything."""
    images = {name: write_random(place / f"{name}.img", 8 * MIB, seed) for seed, name in enumerate(("vda", "vdb"))}
    copies = {name: place / f"{name}.copy" for name in images}
    uri = f"unix:{place}/incoming"
    failpoint = f"{point}:kill"
    source = hosts.start("source", images, failpoint=failpoint if killed == "source" else "")
    destination = hosts.start(
        "destination", copies, incoming=uri, failpoint=failpoint if killed == "destination" else ""
    )
    guest = RecordWriter(source.file("vda"))
    migrate = source.start_migrate(uri, "--downtime-limit", "2s", "--mode", mode)
    if killed == "source":
        source.wait_killed()
        migrate.finish()
        source = hosts.start("source-again", images)
    else:
        destination.wait_killed()
        migrate.finish()
        destination = hosts.start("destination-again", copies, incoming=uri)
    wait_until(lambda: is_settled(source, destination), "the end of the doubt")
    sides = {"source": source, "destination": destination}
    other = sides["destination" if owner == "source" else "source"]
    assert writable(sides[owner]) == {"vda", "vdb"}, [host.status()["disks"] for host in sides.values()]
    assert writable(other) == set()
    if owner == "destination":
        wait_until(lambda: {disk["state"] for disk in source.status()["disks"]} == {"released"}, "the source's end")
        assert {disk["state"] for disk in destination.status()["disks"]} == {"owner"}
    guest.end()
    guest.check(sides[owner].file("vda"))
    if owner == "source":
        done = source.migrate(uri, "--downtime-limit", "2s")
        assert done.exit_code == 0, done.stderr
        assert writable(destination) == {"vda", "vdb"}
        guest.check(destination.file("vda"))


def test_without_the_variable_nothing_happens(hosts: Hosts) -> None:
    """The twin: the same hand-off, and nobody dies."""
    source, destination = hosts.pair(2 * MIB)
    assert_migrates(source, destination)
    assert "failpoint" not in source.log() + destination.log()


def test_an_unknown_failpoint_is_refused(hosts: Hosts, place: Path) -> None:
    """A test that means another name than the code does is told so."""
    host = hosts.make("host", {"vda": write_random(place / "a.img", MIB)}, failpoint="after-lunch:kill")
    done = host.serve()
    assert done.exit_code == 2
    assert done.stderr.startswith(
        "fusemig: FUSEMIG_FAILPOINT is for tests: unset it, or write NAME:kill with one of after-"
    )


def test_a_source_that_handed_off_serves_read_only_after_a_restart(hosts: Hosts, place: Path) -> None:
    """In doubt with nobody to ask: no write, no `cont`, no migration; and it goes on asking."""
    uri = f"unix:{place}/incoming"
    image, copy = write_random(place / "a.img", 4 * MIB), place / "b.img"
    source = hosts.start("source", {"vda": image}, failpoint="after-commit-sent:kill")
    destination = hosts.start("destination", {"vda": copy}, incoming=uri, failpoint="after-commit-received:kill")
    source.start_migrate(uri)
    source.wait_killed()
    destination.wait_killed()
    source = hosts.start("source-again", {"vda": image})
    assert source.disk()["state"] == "handed-off"
    assert source.disk()["gate"] == "read-only"
    wait_until(lambda: "cannot connect" in source.disk()["in-doubt"], "the first question")
    with pytest.raises(OSError, match="Read-only"):
        pwrite(source.file(), b"x")
    assert pread(source.file(), 4 * MIB) == pread(image, 4 * MIB)
    with pytest.raises(QmpRefusedError, match=r"it is not known whether unix:.* took disk 'vda'"):
        source.qmp.execute("cont")
    for arguments in ((), ("--disk", "vda")):
        refused = source.migrate("tcp:127.0.0.1:1", *arguments)
        assert refused.exit_code == 7
        assert refused.stderr.startswith(
            "fusemig: disk 'vda' is in doubt: it is not known whether its destination took it"
        )
    plain = hosts.make("plain", {"vda": copy}).serve()
    assert plain.exit_code == 2
    assert f"image {copy} of disk 'vda' is incomplete" in plain.stderr
    assert plain.stderr.endswith("; it is complete, and if the source is gone for good see `fusemig resolve --help`\n")
    destination = hosts.start("destination-again", {"vda": copy}, incoming=uri)
    wait_until(lambda: source.disk()["state"] == "released", "the answer")
    pwrite(destination.file(), b"taken over")
    assert destination.stop() == 0
    assert_unharmed(hosts.start("plain-again", {"vda": copy}))
