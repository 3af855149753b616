"""Prometheus' view of two real daemons and a migration between them."""

from __future__ import annotations

import http.client
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from support.hosts import MIB, pread, pwrite, wait_until, write_random
from support.promlint import problems, value

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def _connect(host: Host) -> http.client.HTTPConnection:
    kind, _, rest = host.status()["metrics"].partition(":")
    return _UnixConnection(rest) if kind == "unix" else http.client.HTTPConnection(rest)


def ask_under(name: str, host: Host) -> int:
    """Ask as a browser does that was lead to the daemon by this name; return the status of the answer."""
    connection = _connect(host)
    connection.request("GET", "/metrics", headers={"Host": name})
    status = connection.getresponse().status
    connection.close()
    return status


def scrape(host: Host) -> str:
    """Ask a daemon for its metrics where its status says, with the client of the standard library."""
    connection = _connect(host)
    connection.request("GET", "/metrics")
    response = connection.getresponse()
    page = response.read().decode()
    connection.close()
    assert response.status == 200
    assert response.getheader("Content-Type", "").startswith("text/plain; version=")
    assert problems(page) == []
    return page


def n_completed(host: Host, role: str) -> float:
    """Return how many migrations have completed."""
    return value(scrape(host), "fusemig_migrations_total", role=role, outcome="completed")


def test_metrics_follow_a_migration(hosts: Hosts, place: Path) -> None:
    """Counters count the guest, gauges show the migration, and both say what `status` says; over TCP and UNIX."""
    image = write_random(place / "source.img", 8 * MIB)
    source = hosts.start("source", {"vda": image}, options=("--metrics", "tcp:127.0.0.1:0"))
    destination = hosts.destination(options=("--metrics", f"unix:{place}/metrics", "--metrics-insecure"))
    assert (ask_under("evil.example", source), ask_under("evil.example", destination)) == (421, 200)
    before = scrape(source)
    pwrite(source.file(), b"x" * 4096, 0)
    pread(source.file(), 4096)
    page = scrape(source)
    written = "fusemig_disk_written_bytes_total"
    assert value(page, written, disk="vda") == value(before, written, disk="vda") + 4096
    assert value(page, "fusemig_disk_gate", disk="vda", gate="open") == 1
    assert "fusemig_migration_state" not in page
    assert value(scrape(destination), "fusemig_disk_state", disk="vda", state="waiting") == 1

    source.migrate_to_pause(destination.uri)
    pass_before = source.migration()["x-fusemig"]["pass"]
    page = scrape(source)
    assert value(page, "fusemig_migration_state", role="source", state="pre-switchover") == 1
    # Passes go on while it waits.
    assert pass_before <= value(page, "fusemig_migration_passes_total") <= source.migration()["x-fusemig"]["pass"]
    assert value(page, "fusemig_freeze_seconds_count") == 0
    source.proceed()
    source.wait_phase("completed")

    # What is counted when a migration has been cleared away may come a moment after what its end tells.
    wait_until(lambda: n_completed(source, "source") == 1, "the source's count")
    wait_until(lambda: n_completed(destination, "destination") == 1, "the destination's")
    page, there = scrape(source), scrape(destination)
    assert value(page, "fusemig_freeze_seconds_count") == 1
    assert value(page, "fusemig_freeze_seconds_sum") == pytest.approx(source.status()["totals"]["frozen-ms"] / 1000)
    assert value(page, "fusemig_migration_sent_bytes") == source.migration()["disk"]["transferred"]
    assert value(page, "fusemig_disk_gate", disk="vda", gate="read-only") == 1
    assert value(there, "fusemig_disk_state", disk="vda", state="owner") == 1


def test_rejected_connections_have_a_reason(hosts: Hosts) -> None:
    """Who speaks no wire is counted under the kind of its error; nothing was received."""
    destination = hosts.destination(options=("--metrics", "tcp:127.0.0.1:0"))
    host, _, port = destination.uri.removeprefix("tcp:").rpartition(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        stranger.settimeout(40)
        with suppress(ConnectionResetError):  # it reads no more than it needs to say no
            while stranger.recv(4096):
                pass
    wait_until(lambda: destination.status()["incoming"]["rejected-connections"] == 1, "the rejection")
    page = scrape(destination)
    assert value(page, "fusemig_rejected_connections_total", reason="failed") == 1
    assert value(page, "fusemig_migrations_total", role="destination", outcome="failed") == 0


def test_a_public_port_is_refused(hosts: Hosts, place: Path) -> None:
    """Without --metrics-insecure nobody beyond this host is answered: the daemon does not start."""
    image = write_random(place / "source.img", MIB)
    host = hosts.make("source", {"vda": image}, options=("--metrics", "tcp:0.0.0.0:0"))
    host.launch()
    assert host.wait() == 2
    assert "--metrics-insecure" in host.log()
