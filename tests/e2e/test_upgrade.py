"""Upgrades under guests, with successors of other versions, that refuse, that crash; and what outlives a succession."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from support.heirs import BusyGuest, ResilientHost, verifying
from support.hosts import MIB, Qmp, QmpRefusedError, pread, pwrite, wait_until, write_random

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.heirs import Installation
    from support.hosts import Hosts

pytestmark = pytest.mark.fuse

SIZE = 16 * MIB
WRITES_2 = """
import fusemig.handover.state as state
state.READABLE = frozenset({1, 2})
encode = state.encode_state
state.encode_state = lambda one: encode(one).replace(b'"version":1', b'"version":2')
"""
READS_2 = """
import fusemig
fusemig.__version__ = "9.9"
import fusemig.handover.state as state
state.READABLE = frozenset({2})
"""
IS_BROKEN = """
import os
if "FUSEMIG_UPGRADE" in os.environ:
    os._exit(3)
"""
CRASHES_ONCE = """
import os, fusemig.daemon.daemon
def die(self):
    try:
        os.unlink({trigger!r})
    except FileNotFoundError:
        return serve(self)
    os._exit(3)
serve = fusemig.daemon.daemon.Daemon.run
fusemig.daemon.daemon.Daemon.run = die
"""


@pytest.fixture
def host(hosts: Hosts, place: Path, installation: Installation) -> ResilientHost:
    """Give a resilient host with a disk; its daemons are those of the installation."""
    made = ResilientHost("host", place / "host", {"vda": write_random(place / "vda.img", SIZE)})
    hosts.adopt(made)
    return made


@pytest.fixture
def guest(host: ResilientHost) -> Iterator[BusyGuest]:
    """Write to the disk of the host until the test is over, without an error and without a loss."""
    host.start()
    busy = BusyGuest(host.file(), SIZE, pause_s=0.001)
    yield busy
    busy.end()
    assert busy.error is None
    busy.check(host.file())


def upgrade(host: ResilientHost) -> dict[str, Any]:
    """Upgrade as a user does; return what is told."""
    done = host.command("upgrade", "--json")
    assert done.exit_code == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_a_guest_notices_nothing_and_clients_are_told(host: ResilientHost, guest: BusyGuest) -> None:
    """Another process serves; clients get an event, the end of their connection, and the successor at the same path."""
    before, client = host.daemon, Qmp(host.control)
    told = upgrade(host)
    assert told["pid"] == host.daemon != before
    assert told["pause-ms"] > 0
    client.hear_out()
    assert client.event_names() == ["X_FUSEMIG_UPGRADE"]
    client.close()
    assert host.n_daemons() == 2
    assert host.status()["succession"]["predecessor"] == told["from"]
    first = guest.n_written
    wait_until(lambda: guest.n_written > first + 50, "further writes")


@pytest.mark.parametrize(
    "n_upgrades", [2, *(pytest.param(10, marks=pytest.mark.nightly, id=f"batch {n}") for n in range(5))]
)
def test_fio_verifies_across_upgrades(host: ResilientHost, n_upgrades: int) -> None:
    """Random writes, direct and buffered, with fdatasync, each read back and compared."""
    host.start()
    with verifying(host.file()):
        pauses = [upgrade(host)["pause-ms"] for _ in range(n_upgrades)]
    print(f"pauses of {n_upgrades} upgrades, ms: {sorted(pauses)}")
    assert host.n_daemons() == n_upgrades + 1


@pytest.mark.parametrize(
    ("running", "installed", "reason"),
    [
        ("", READS_2, r"fusemig 9\.9 cannot take over: .* is of version 1, and fusemig 9\.9 reads version 2"),
        (WRITES_2, "", r"cannot take over: .* is of version 2, and fusemig .* reads version 1: install"),
        pytest.param("", IS_BROKEN, r"the installed fusemig ended before it answered", marks=pytest.mark.nightly),
    ],
    ids=["a later one", "an earlier one", "a broken one"],
)
def test_who_cannot_take_over_is_refused(
    host: ResilientHost, installation: Installation, running: str, installed: str, reason: str
) -> None:
    """The running daemon goes on as if nothing had happened, and says why; a fitting version succeeds it later."""
    installation.install(running)
    host.start()
    client, pid = host.qmp, host.daemon
    installation.install(installed)
    with pytest.raises(QmpRefusedError, match=reason):
        client.execute("x-fusemig-upgrade")
    assert host.daemon == pid
    assert host.qmp is client, "clients were sent away"
    pwrite(host.file(), b"and goes on")
    installation.install(running)
    assert upgrade(host)["pid"] != pid
    assert pread(host.file(), 11) == b"and goes on"


def test_a_successor_that_crashes_at_its_start_is_followed_by_another(
    host: ResilientHost, guest: BusyGuest, installation: Installation, place: Path
) -> None:
    """After the agreement too: the next one serves, and the guest has only waited longer."""
    trigger = place / "trigger"
    trigger.touch()
    installation.install(CRASHES_ONCE.format(trigger=str(trigger)))
    upgrade(host)
    assert not trigger.exists()
    first = guest.n_written
    wait_until(lambda: guest.n_written > first + 50, "further writes")


def test_without_a_holder_there_is_no_upgrade(hosts: Hosts, place: Path) -> None:
    """The reason and the next step; exit code 1, and the daemon goes on."""
    plain = hosts.start("plain", {"vda": write_random(place / "vda.img", MIB)})
    done = plain.command("upgrade")
    assert done.exit_code == 1
    assert done.stderr.startswith("fusemig: nobody would start a successor of this daemon: serve with --resilient")
    pwrite(plain.file(), b"it goes on")


@pytest.mark.parametrize("side", ["source", pytest.param("destination", marks=pytest.mark.nightly)])
def test_a_migration_goes_on_after_the_upgrade_of_either_side(hosts: Hosts, place: Path, side: str) -> None:
    """Interrupted and resumed, with nothing lost."""
    source = ResilientHost("source", place / "s", {"vda": write_random(place / "vda.img", SIZE)})
    destination = ResilientHost("destination", place / "d", {"vda": place / "copy.img"}, incoming="tcp:127.0.0.1:0")
    for one in (source, destination):
        hosts.adopt(one)
        one.start()
    guest = BusyGuest(source.file(), SIZE, pause_s=0.001)
    source.set_parameters(max_bandwidth=MIB // 2, downtime_limit=2000)
    source.qmp.execute("migrate", {"uri": destination.uri, "blk": True, "x-fusemig-reconnect": 30_000})
    source.wait_phase("bulk")
    upgraded = {"source": source, "destination": destination}[side]
    assert upgrade(upgraded)["pause-ms"] > 0
    source.set_parameters(max_bandwidth=0)
    wait_until(lambda: source.migration()["status"] == "completed", "the end of the migration")
    guest.end()
    guest.check(destination.file())
    assert source.migration()["x-fusemig"]["reconnects"] >= 1
    assert source.images["vda"].read_bytes() == destination.images["vda"].read_bytes()


class Parked:
    """A write that waits."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._thread = threading.Thread(target=pwrite, args=(path, data, 0, os.O_DSYNC), daemon=True)
        self._thread.start()

    @property
    def is_answered(self) -> bool:
        """Whether it waits no more."""
        return not self._thread.is_alive()


@pytest.mark.parametrize("how", ["crash", pytest.param("upgrade", marks=pytest.mark.nightly)])
def test_what_was_stopped_stays_stopped(host: ResilientHost, how: str) -> None:
    """The operator's `stop` holds from the successor's first request on: a parked write is not made until `cont`."""
    host.start()
    before = pread(host.file(), 512)
    host.qmp.execute("stop")
    parked = Parked(host.file(), b"parked".ljust(512))
    wait_until(lambda: host.status()["parked-writes"] == 1, "the parked write")
    if how == "crash":
        host.kill_daemon()
        host.wait_for_successor()
    else:
        upgrade(host)
    wait_until(lambda: host.status()["parked-writes"] == 1, "the parked write, sent again")
    assert host.qmp.execute("query-status")["status"] == "paused"
    assert pread(host.images["vda"], 512) == before
    assert not parked.is_answered
    host.qmp.execute("cont")
    wait_until(lambda: parked.is_answered, "the answer")
    assert pread(host.images["vda"], 6) == b"parked"


def ask(path: Path) -> os.stat_result:
    """Return what the daemon says, and not what the kernel has kept: a read makes it ask."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.pread(fd, 1, 0)
        return os.fstat(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("how", ["crash", pytest.param("upgrade", marks=pytest.mark.nightly)])
def test_times_that_a_guest_set_outlive_the_daemon(hosts: Hosts, place: Path, how: str) -> None:
    """As `cp --preserve` and rsync leave them; a write after that has changed mtime, for a successor too."""
    disks = {name: write_random(place / name, SIZE) for name in ("set", "written", "left")}
    host = ResilientHost("host", place / "host", disks)
    hosts.adopt(host)
    host.start()
    atime_ns, mtime_ns = 1_600_000_000_000_000_001, 1_500_000_000_123_456_789
    for name in ("set", "written"):
        pwrite(host.file(name), b"before" * 512, 0)
        os.utime(host.file(name), ns=(atime_ns, mtime_ns))
    was_set_ns = time.time_ns()

    def is_later() -> bool:  # by the clock of file systems, which is coarse
        os.utime(disks["written"])
        return disks["written"].stat().st_mtime_ns > was_set_ns

    wait_until(is_later, "the next tick")
    pwrite(host.file("written"), b"behind" * 512, 0)
    if how == "crash":
        host.kill_daemon()
        host.wait_for_successor()
    else:
        upgrade(host)
    found = {name: ask(host.file(name)) for name in disks}
    assert [(one.st_atime_ns == atime_ns, one.st_mtime_ns == mtime_ns) for one in found.values()] == [
        (True, True),
        (True, False),
        (False, False),
    ]
    assert found["written"].st_mtime_ns > was_set_ns
    assert all(one.st_ctime_ns > mtime_ns for one in found.values())


def test_what_was_set_over_qmp_outlives_a_crash(hosts: Hosts, place: Path) -> None:
    """Parameters, capabilities, objects, and where it was told to listen."""
    host = ResilientHost("host", place / "h", {"vda": place / "vda.img"}, incoming="defer")
    hosts.adopt(host)
    host.start()
    host.set_parameters(max_bandwidth=1234, downtime_limit=77)
    host.pause_before_switchover()
    host.qmp.execute("object-add", {"qom-type": "authz-simple", "id": "one", "identity": "CN=somebody"})
    host.qmp.execute("migrate-set-parameters", {"tls-authz": "one"})
    host.qmp.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    uri = host.uri
    host.kill_daemon()
    host.wait_for_successor()
    parameters = host.qmp.execute("query-migrate-parameters")
    assert (parameters["max-bandwidth"], parameters["downtime-limit"], parameters["tls-authz"]) == (1234, 77, "one")
    capabilities = {one["capability"]: one["state"] for one in host.qmp.execute("query-migrate-capabilities")}
    assert capabilities["pause-before-switchover"]
    assert host.uri == uri
    with pytest.raises(QmpRefusedError, match="duplicate property 'one'"):
        host.qmp.execute("object-add", {"qom-type": "authz-simple", "id": "one", "identity": "CN=somebody"})
    with pytest.raises(QmpRefusedError, match="already been started"):
        host.qmp.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})


def test_what_was_cancelled_is_not_taken_up(hosts: Hosts, place: Path) -> None:
    """Nor what has ended: a successor does not start it again."""
    host = ResilientHost("host", place / "h", {"vda": write_random(place / "vda.img", SIZE)})
    hosts.adopt(host)
    host.start()
    destination = hosts.destination()
    host.set_parameters(max_bandwidth=MIB)
    host.qmp.execute("migrate", {"uri": destination.uri, "blk": True})
    host.wait_phase("bulk")
    host.qmp.execute("migrate_cancel")
    host.kill_daemon()
    host.wait_for_successor()
    assert "status" not in host.migration()
    pwrite(host.file(), b"stays here")
