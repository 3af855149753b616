"""Migrations over several connections between real daemons, and connections that are not theirs."""

from __future__ import annotations

import random
import socket
from typing import TYPE_CHECKING

import pytest

from fusemig.wire import native
from support.certificates import SOURCE_IDENTITY, Authority
from support.doorkeeper import Doorkeeper
from support.hosts import MIB, assert_unharmed, pread, pwrite, wait_until, write_random

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse

SIZE = 24 * MIB


def streams(host: Host) -> int:
    """Return how many connections a source's migration says that it uses."""
    n: int = host.migration()["x-fusemig"]["streams"]
    return n


def established(there: Host) -> int:
    """Return how many sockets of TCP connections the destination has."""
    port = f":{int(there.uri.rsplit(':', 1)[1]):04X}"
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    return sum(row[1].endswith(port) and row[3] == "01" for row in rows)


def test_bulk_dirty_and_mirrored_over_four(hosts: Hosts, place: Path) -> None:
    """What guests wrote in the bulk phase, afterwards and while mirrored is there; so many connections were used."""
    image = write_random(place / "here.img", SIZE)
    here, there = hosts.start("here", {"vda": image}), hosts.destination()
    here.pause_before_switchover()
    here.set_parameters(max_bandwidth=MIB)
    command = here.start_migrate(there.uri, "--streams", "4", "--compress", "zstd")
    here.wait_phase("bulk")
    wait_until(lambda: 0 < here.migration()["disk"]["remaining"] < SIZE - MIB, "a part of the bulk phase")
    assert (streams(here), established(there)) == (4, 4)
    rng = random.Random(2)
    for _ in range(40):
        pwrite(here.file(), rng.randbytes(8192), rng.randrange(SIZE // 4096 - 2) * 4096)
    here.set_parameters(max_bandwidth=0)
    here.wait_phase("pre-switchover")
    here.qmp.execute("migrate-set-parameters", {"x-fusemig-mode": "mirror"})
    wait_until(lambda: here.migration()["x-fusemig"]["pacing"]["mirror"] == "all", "the mirror")
    for _ in range(40):
        pwrite(here.file(), rng.randbytes(8192), rng.randrange(SIZE // 4096 - 2) * 4096)
    here.proceed()
    assert command.finish().exit_code == 0
    wait_until(lambda: there.disk()["gate"] == "open", "the take-over")
    assert pread(there.file(), SIZE) == image.read_bytes()
    wait_until(lambda: established(there) == 0, "the end of the connections")


@pytest.mark.parametrize("kind", ["unix", "tls"])
def test_other_ways(hosts: Hosts, place: Path, kind: str) -> None:
    """Over a UNIX socket, and each connection over TLS."""
    image = write_random(place / "here.img", SIZE)
    here, options = hosts.start("here", {"vda": image}), []
    if kind == "unix":
        there = hosts.destination(incoming=f"unix:{place / 'listen'}")
    else:
        authority = Authority(place / "pki")
        there = hosts.destination(
            incoming="tcp:127.0.0.1:0", options=["--tls-creds", authority.server(), "--tls-authz", SOURCE_IDENTITY]
        )
        options = ["--tls-creds", authority.client()]
    assert here.migrate(there.uri, "--streams", "3", *options).exit_code == 0
    assert streams(here) == 3
    assert there.images["vda"].read_bytes() == image.read_bytes()


def test_strangers_who_want_to_join(hosts: Hosts, place: Path) -> None:
    """Without the token nobody does, whatever session he names; the migration notices nothing."""
    here, there = hosts.start("here", {"vda": write_random(place / "here.img", SIZE)}), hosts.destination()
    here.pause_before_switchover()
    command = here.start_migrate(there.uri, "--streams", "2")
    here.wait_phase("pre-switchover")
    session = here.migration()["x-fusemig"]["session"]
    before = there.status()["incoming"]["rejected-connections"]
    for join, reason in (
        (native.Join(session, "0" * 32, 1), "no migration waits for this connection"),
        (native.Join(session, "", 1), "no migration waits for this connection"),
        (native.Join("0" * 32, "0" * 32, 1), "no migration waits for this connection"),
    ):
        with socket.create_connection(("127.0.0.1", int(there.uri.rsplit(":", 1)[1])), timeout=30) as stranger:
            stranger.sendall(native.PREFACE + native.encode_message(join))
            answer = b""
            while part := stranger.recv(4096):
                answer += part
            assert reason.encode() in answer
    wait_until(lambda: there.status()["incoming"]["rejected-connections"] == before + 3, "the refusals")
    assert (streams(here), established(there)) == (2, 2)
    here.proceed()
    assert command.finish().exit_code == 0


def test_fewer_than_asked_for(hosts: Hosts, place: Path) -> None:
    """A connection that cannot be made is done without, and status and log say so."""
    image = write_random(place / "here.img", SIZE)
    here, there = hosts.start("here", {"vda": image}), hosts.destination()
    with Doorkeeper(there.uri, 2) as door:
        assert here.migrate(door.uri, "--streams", "4").exit_code == 0
    assert streams(here) == 2
    assert "fewer streams than asked for" in here.log()
    assert there.images["vda"].read_bytes() == image.read_bytes()


def test_the_end_of_one_is_the_end_of_all(hosts: Hosts, place: Path) -> None:
    """A further connection that is cut ends the migration, or all are made again and it goes on."""
    image = write_random(place / "here.img", SIZE)
    here, there = hosts.start("here", {"vda": image}), hosts.destination()
    here.pause_before_switchover()
    with Doorkeeper(there.uri, 100) as door:
        command = here.start_migrate(door.uri, "--streams", "3", "--reconnect", "30s")
        here.wait_phase("pre-switchover")
        pwrite(here.file(), b"written before the cut", 5 * MIB)
        door.cut(1)
        own = wait_until(
            lambda: (own := here.migration()["x-fusemig"])["reconnects"] == 1 and own["streams"] == 3 and own,
            "the return",
        )
        assert own["kept-bytes"] > 0
        door.cut(len(door.ends) - 1)  # a try before may have come while the destination still had the disk
        wait_until(lambda: here.migration()["x-fusemig"]["reconnects"] == 2, "and again")
        here.proceed()
        assert command.finish().exit_code == 0
    assert pread(there.file(), SIZE) == image.read_bytes()


@pytest.mark.nightly
def test_a_cut_without_reconnect(hosts: Hosts, place: Path) -> None:
    """It fails, and the disk stays here."""
    here, there = hosts.start("here", {"vda": write_random(place / "here.img", SIZE)}), hosts.destination()
    here.pause_before_switchover()
    with Doorkeeper(there.uri, 100) as door:
        command = here.start_migrate(door.uri, "--streams", "3", "--reconnect", "0")
        here.wait_phase("pre-switchover")
        door.cut(2)
        assert command.finish().exit_code != 0
    assert_unharmed(here, there)


def test_cancelled(hosts: Hosts, place: Path) -> None:
    """All connections are closed, and the next migration is as any other."""
    image = write_random(place / "here.img", SIZE)
    here, there = hosts.start("here", {"vda": image}), hosts.destination()
    here.set_parameters(max_bandwidth=MIB)
    command = here.start_migrate(there.uri, "--streams", "16")
    here.wait_phase("bulk")
    wait_until(lambda: established(there) == 16, "the connections")
    here.qmp.execute("migrate_cancel")
    assert command.finish().exit_code != 0
    wait_until(lambda: established(there) == 0, "their end")
    there.wait_free()
    here.set_parameters(max_bandwidth=0)
    assert here.migrate(there.uri).exit_code == 0
    assert streams(here) == 1
    assert there.images["vda"].read_bytes() == image.read_bytes()
