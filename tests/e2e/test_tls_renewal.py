"""A certificate that expires under a migration, and one that is renewed under a daemon that runs."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from support.certificates import SOURCE_IDENTITY, Authority
from support.doorkeeper import Doorkeeper
from support.hosts import MIB, assert_unharmed, pwrite, wait_until, write_random

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Command, Host, Hosts

pytestmark = pytest.mark.fuse


class Move:
    """A source and a destination over TLS, and a connection between them that can be cut."""

    def __init__(self, hosts: Hosts, place: Path) -> None:
        """Start both, with good certificates."""
        self.authority = Authority(place / "pki")
        self.client, self.server = self.authority.client(), self.authority.server()
        self.here = hosts.start("source", {"vda": write_random(place / "source.img", 24 * MIB)})
        self.there = hosts.destination(options=["--tls-creds", self.server, "--tls-authz", SOURCE_IDENTITY])

    def write(self, side: str, *, is_expired: bool = False, ends: datetime | None = None) -> None:
        """Write other files for one side, which is not told."""
        (self.authority.client if side == "source" else self.authority.server)(is_expired=is_expired, ends=ends)

    def start(self, door: Doorkeeper, reconnect: str) -> Command:
        """Start a migration that stays in its bulk phase; return when it is there, or has ended."""
        command = self.here.start_command(
            *("migrate", door.uri, "--progress", "none", "--tls-creds", self.client),
            *("--max-bandwidth", "512K", "--reconnect", reconnect),
        )
        wait_until(lambda: self.here.phase() == "bulk" or command.process.poll() is not None, "the bulk phase")
        return command


def transferred(host: Host) -> int:
    """Return how much a source has sent."""
    n: int = host.migration()["disk"]["transferred"]
    return n


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_certificate_that_expires_during_a_migration(hosts: Hosts, place: Path, side: str) -> None:
    """What is connected goes on; a new connection is refused in words; once it is renewed, `--resume` goes on.

    No daemon is restarted, guests write all the time, and of what had arrived nothing is sent again.
    """
    move = Move(hosts, place)
    here, there = move.here, move.there
    with Doorkeeper(there.uri, 100) as door:
        for lifetime_s in (3, 10, 30):  # the machine may be too busy for the shorter ones
            ends = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=lifetime_s)
            move.write(side, ends=ends)
            command = move.start(door, "1s")
            if command.process.poll() is None:
                break
            said = command.stderr()  # as we see it, or as the other side does
            assert "has expired" in said or "certificate expired" in said, said
        wait_until(lambda: datetime.now(UTC) > ends + timedelta(seconds=1), "the end of the certificate")
        before = transferred(here)
        wait_until(lambda: transferred(here) > before, "more of the disk")
        pwrite(here.file(), b"written meanwhile", 5 * MIB, os.O_DSYNC)
        door.cut(len(door.ends) - 1)
        done = command.finish()
    if side == "source":
        expected = (
            f"the certificate {move.client}/client-cert.pem has expired on {ends:%Y-%m-%d %H:%M:%S UTC}; renew it"
        )
    else:  # as OpenSSL writes it, with a blank for the first digit of a day
        when = f"{ends:%b} {ends.day:2} {ends:%H:%M:%S %Y} GMT"
        expected = f"its certificate has expired on {when}; renew server-cert.pem there, which needs no restart"
    assert (done.exit_code, expected in done.stderr) == (4, True), done.stderr
    assert done.stderr.count("\n") == 1
    assert_unharmed(here, there)
    refused = here.migrate(there.uri, "--resume", "--tls-creds", move.client)
    assert (refused.exit_code, "has expired" in refused.stderr) == (4, True), refused.stderr
    pids = here.pid, there.pid
    move.write(side)
    there.wait_free()
    done = here.migrate(there.uri, "--resume", "--tls-creds", move.client, "--max-bandwidth", "0")
    assert done.exit_code == 0, done.stderr
    assert here.migration()["x-fusemig"]["kept-bytes"] > 0
    assert here.images["vda"].read_bytes() == there.images["vda"].read_bytes()
    assert (here.status()["pid"], there.status()["pid"]) == pids


@pytest.mark.parametrize("side", [pytest.param("source", marks=pytest.mark.nightly), "destination"])
def test_a_certificate_that_is_renewed_in_time(hosts: Hosts, place: Path, side: str) -> None:
    """A source that wants its connection back says what it waits for, and goes on by itself when it is there."""
    move = Move(hosts, place)
    with Doorkeeper(move.there.uri, 1000) as door:
        command = move.start(door, "60s")
        move.write(side, is_expired=True)
        door.cut(len(door.ends) - 1)
        wait_until(lambda: "has expired" in move.here.migration()["x-fusemig"].get("waiting", ""), "what it waits for")
        pwrite(move.here.file(), b"written meanwhile", 5 * MIB, os.O_DSYNC)
        move.write(side)
        move.here.set_parameters(max_bandwidth=0)
        done = command.finish()
    assert done.exit_code == 0, done.stderr
    assert "credentials read anew" in (move.here if side == "source" else move.there).log()
    assert move.here.images["vda"].read_bytes() == move.there.images["vda"].read_bytes()
