"""Daemons that are killed in every phase of a migration, and started again by their holders: it completes by itself.

Two disks move together while a guest writes one of them. Whoever is killed and when: nobody says anything to a daemon
after that, the migration completes, every acknowledged write is at the destination, both images are equal, and from the
moment when the destination's gate is open the source's never is again.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from support.heirs import BusyGuest, ResilientHost
from support.hosts import MIB, pwrite, wait_until, write_random

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.hosts import Hosts

pytestmark = pytest.mark.fuse

SIZE = 12 * MIB
GUESTS = ("--allow-guest-commands",)
IN_CI = {
    ("source", "after-welcome"),
    ("source", "after-prepared-received"),
    ("source", "after-commit-sent"),
    ("destination", "before-welcome"),
    ("destination", "after-prepared"),
}
"""The others are for the nightly run: each costs four starts of a daemon."""
POINTS = {
    "source": (
        "after-welcome",
        "after-prepared-received",
        "after-one-handed-off",
        "after-handed-off",
        "after-commit-sent",
        "after-taken-received",
        "after-released",
    ),
    "destination": (
        "before-welcome",
        "before-prepared",
        "after-one-prepared",
        "after-prepared",
        "after-prepared-sent",
        "after-commit-received",
        "after-one-owner",
        "after-owner",
        "after-taken-sent",
    ),
}


class Move:
    """Two resilient hosts and the guest between them."""

    def __init__(self, hosts: Hosts, failpoints: dict[str, str] | None = None) -> None:
        points = failpoints or {}
        place = hosts.directory
        images = {name: write_random(place / f"{name}.img", SIZE, seed) for seed, name in enumerate(("vda", "vdb"))}
        copies = {name: place / f"{name}.copy" for name in images}
        self.source = ResilientHost("source", place / "s", images, failpoint=points.get("source", ""))
        self.destination = ResilientHost(
            "destination", place / "d", copies, incoming="tcp:127.0.0.1:0", failpoint=points.get("destination", "")
        )
        for host in (self.source, self.destination):
            hosts.adopt(host)
            host.start()
        self.guest = BusyGuest(self.source.file(), SIZE, pause_s=0.001)

    def begin(self, **parameters: int) -> None:
        """Start it, as a client does that wants a lost connection back."""
        self.source.set_parameters(downtime_limit=2000, **parameters)
        self.source.qmp.execute("migrate", {"uri": self.destination.uri, "blk": True, "x-fusemig-reconnect": 30_000})

    def finish(self) -> None:
        """See it complete, and what came of it."""
        has_been_open = False

        def is_completed() -> bool:
            nonlocal has_been_open
            has_been_open |= any(disk["gate"] == "open" for disk in self.destination.status()["disks"])
            if has_been_open:
                gates = {disk["gate"] for disk in self.source.status()["disks"]}
                assert "open" not in gates, "two writable sides"
            info = self.source.migration()
            assert info.get("status") != "failed" or info["x-fusemig"]["phase"] == "in-doubt", info
            return info.get("status") == "completed"

        wait_until(is_completed, "the end of the migration")
        self.guest.end()
        assert self.guest.error is None or self.guest.error.errno == errno.EROFS
        self.guest.check(self.destination.file("vda"))
        for name in ("vda", "vdb"):
            assert self.source.disk(name)["state"] == "released"
            assert self.destination.disk(name)["state"] == "owner"
            assert self.source.images[name].read_bytes() == self.destination.images[name].read_bytes()
            pwrite(self.destination.file(name), b"taken over", flags=os.O_DSYNC)
            with pytest.raises(OSError, match="Read-only"):
                pwrite(self.source.file(name), b"no more")


@pytest.fixture
def migrating(hosts: Hosts) -> Iterator[Callable[..., Move]]:
    """Make a `Move` whose guest ends with the test."""
    moves: list[Move] = []

    def make(failpoints: dict[str, str] | None = None) -> Move:
        moves.append(Move(hosts, failpoints))
        return moves[-1]

    yield make
    for move in moves:
        move.guest.stop()


@pytest.mark.parametrize(
    ("killed", "point"),
    [
        pytest.param(side, point, marks=() if (side, point) in IN_CI else pytest.mark.nightly)
        for side, points in POINTS.items()
        for point in points
    ],
)
def test_killed_at_a_point_of_the_hand_off(migrating: Callable[..., Move], killed: str, point: str) -> None:
    """At each of them: it completes, and one side owns the disks."""
    move = migrating({killed: point})
    move.begin()
    move.finish()
    assert {"source": move.source, "destination": move.destination}[killed].n_daemons() == 2


@pytest.mark.parametrize(
    ("killed", "phase"),
    [
        ("source", "bulk"),
        ("destination", "bulk"),
        pytest.param("source", "pre-switchover", marks=pytest.mark.nightly),
        pytest.param("destination", "pre-switchover", marks=pytest.mark.nightly),
        pytest.param("both", "bulk", marks=pytest.mark.nightly),
    ],
)
def test_killed_in_a_phase(migrating: Callable[..., Move], killed: str, phase: str) -> None:
    """Parameters, capabilities and what it was about go with it; so does a pause at pre-switchover."""
    move = migrating()
    if phase == "bulk":
        move.begin(max_bandwidth=MIB)
    else:
        move.source.pause_before_switchover()
        move.begin()
    before = move.source.wait_phase(phase)
    victims = [host for host in (move.source, move.destination) if killed in (host.name, "both")]
    for host in victims:
        host.kill_daemon()
    for host in victims:
        host.wait_for_successor()
    if phase == "bulk":
        assert move.source.qmp.execute("query-migrate-parameters")["max-bandwidth"] == MIB
        move.source.set_parameters(max_bandwidth=0)
    else:
        move.source.wait_phase("pre-switchover")
        move.source.proceed()
    move.finish()
    after = move.source.migration()
    assert after["total-time"] > before["total-time"]
    assert after["x-fusemig"]["reconnects"] >= 1
    assert after["x-fusemig"]["session"] == before["x-fusemig"]["session"]


def test_the_command_follows_from_daemon_to_daemon(migrating: Callable[..., Move]) -> None:
    """`fusemig migrate` shows the successor's migration, and its exit code is that one's."""
    move = migrating()
    move.source.set_parameters(max_bandwidth=MIB)
    command = move.source.start_command("migrate", move.destination.uri, "--progress", "none", "--downtime-limit", "2s")
    move.source.wait_phase("bulk")
    move.source.kill_daemon()
    move.source.wait_for_successor()
    move.source.set_parameters(max_bandwidth=0)
    move.finish()
    done = command.finish()
    assert done.exit_code == 0, done.stderr
    assert done.stderr.startswith("fusemig: completed in ")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            {"x-fusemig-pause-command": "true", "x-fusemig-resume-command": "true"},
            "the daemon was restarted while a guest was to move with the disks, which stay here: see that the guest",
        ),
        (
            {"x-fusemig-wire": "qemu"},
            "the daemon was restarted, and a migration on QEMU's wire cannot go on; the disks",
        ),
    ],
    ids=["guest", "QEMU's wire"],
)
def test_what_cannot_go_on_is_told(hosts: Hosts, arguments: dict[str, str], reason: str) -> None:
    """As failed, with the next step; and the disks are the source's to write."""
    image, copy = (hosts.directory / name for name in ("vda.img", "vda.copy"))
    source = ResilientHost("source", hosts.directory / "s", {"vda": write_random(image, SIZE)}, options=GUESTS)
    hosts.adopt(source)
    source.start()
    copy.touch()
    os.truncate(copy, SIZE)  # which QEMU's wire does not say
    destination = hosts.start("destination", {"vda": copy}, incoming="tcp:127.0.0.1:0", wire="auto")
    source.set_parameters(max_bandwidth=MIB)
    source.qmp.execute("migrate", {"uri": destination.uri, "blk": True, **arguments})
    source.wait_phase("bulk")
    source.kill_daemon()
    source.wait_for_successor()
    info = wait_until(lambda: (told := source.migration()).get("status") == "failed" and told, "what is told")
    assert info["error-desc"].startswith(reason)
    assert "; migrate again" in info["error-desc"] or ", then migrate again" in info["error-desc"]
    pwrite(source.file(), b"stays here")
    source.kill_daemon()
    source.wait_for_successor()
    assert "status" not in source.migration(), "it is told once"


@pytest.mark.nightly
@pytest.mark.parametrize("killed", ["source", "destination"])
def test_killed_during_post_copy(migrating: Callable[..., Move], killed: str) -> None:
    """Both sides go on fetching and lending, and the source tells the end of it."""
    move = migrating()
    move.begin()
    move.source.qmp.execute("migrate-start-postcopy")
    host = {"source": move.source, "destination": move.destination}[killed]
    wait_until(lambda: move.source.phase() in ("postcopy", "completed"), "the hand-over")
    host.kill_daemon()
    host.wait_for_successor()
    move.finish()
