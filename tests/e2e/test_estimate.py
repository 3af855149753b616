"""`fusemig estimate`, the forecast of a running migration, and `--order heat`, with real daemons and mounts."""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from support.hosts import MIB, QmpRefusedError, pwrite, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse


def estimate(host: Host, *words: object) -> dict[str, Any]:
    done = host.command("estimate", *words, "--json")
    assert done.exit_code == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_an_estimate_of_an_idle_disk_is_what_the_migration_takes(hosts: Hosts) -> None:
    """Data and holes as they are, the way measured, nothing started; then the same bytes really cross."""
    source, destination = hosts.pair(24 * MIB)
    os.truncate(source.images["vda"], 24 * MIB)
    answer = estimate(source, destination.uri)
    assert answer["converges"]
    assert answer["bandwidth-source"] == "measured"
    assert answer["bandwidth"] > MIB
    assert answer["data-bytes"] + answer["zero-bytes"] == 24 * MIB
    assert answer["disks"][0]["working-set"][0].keys() == {"seconds", "bytes"}
    said = source.command("estimate", "--link", "100M", "--downtime-limit", "50ms").stdout
    assert "link: 100.0 MiB/s (given)" in said
    assert "(limit 50 ms)" in said
    assert source.phase() == destination.phase() == "none"
    assert destination.status()["incoming"]["rejected-connections"] == 0
    assert source.migrate(destination.uri, "--order", "heat").exit_code == 0
    assert source.images["vda"].read_bytes() == destination.images["vda"].read_bytes()
    assert source.migration()["disk"]["transferred"] == pytest.approx(answer["expected-bytes"], rel=0.02)


def write_on(path: Path, is_over: threading.Event) -> None:
    """Write a disk's first half again and again."""
    while not is_over.wait(0.01):
        for offset in range(0, 8 * MIB, MIB):
            pwrite(path, b"x" * MIB, offset)


def test_what_guests_write_is_in_it(hosts: Hosts) -> None:
    """A guest that outruns the link is seen, without a destination; with the bandwidth that is named, it fits."""
    source, _ = hosts.pair(16 * MIB)
    is_over = threading.Event()
    guest = threading.Thread(target=write_on, args=(source.file(), is_over), daemon=True)
    guest.start()
    wait_until(
        lambda: source.qmp.execute("x-fusemig-estimate", {"link": 100_000})["dirty-rate"] > MIB, "the guest's writes"
    )
    answer = estimate(source, "--link", "100K")
    said = source.command("estimate", "--link", "100K").stdout
    is_over.set()  # what is asked from here on is to be no more than that
    guest.join(40)
    assert not answer["converges"]
    assert "expected-total-time" not in answer
    remedies = {remedy["kind"]: remedy["value"] for remedy in answer["remedies"]}
    assert remedies["bandwidth"] > 100 << 10
    later = {remedy["kind"]: remedy["value"] for remedy in estimate(source, "--link", "100K").get("remedies", ())}
    assert estimate(source, "--link", 4 * later.get("bandwidth", 100 << 10))["converges"]
    assert remedies["postcopy"] == pytest.approx(1000 * answer["data-bytes"] / (100 << 10), rel=0.01)
    assert "mirror" not in remedies  # the least that may be missing takes 2.5 s there, beyond the downtime limit
    faster = {remedy["kind"]: remedy["value"] for remedy in estimate(source, "--link", "1M")["remedies"]}
    assert faster.get("mirror", 0.8 * MIB) == pytest.approx(0.8 * MIB, rel=0.01)
    assert "will not converge" in said
    assert "of bandwidth" in said
    assert "--mode postcopy: guests are moved at once" in said
    assert "mirroring" not in said


def test_estimates_that_cannot_be_made(hosts: Hosts) -> None:
    """No way named, nobody there, no such disk, and a destination's own disk: one line each."""
    source, destination = hosts.pair(2 * MIB)
    for host, words, text in (
        (source, (), "--link RATE"),
        (source, ("tcp:127.0.0.1:1",), "127.0.0.1:1"),
        (source, ("--link", "1M", "--disk", "nobody"), "nobody"),
        (destination, ("--link", "1M"), "waiting for an incoming migration"),
    ):
        done = host.command("estimate", *words)
        assert done.exit_code != 0
        assert done.stdout == ""
        assert text in done.stderr
        assert done.stderr.count("\n") <= 2


def test_a_running_migration_says_how_long_it_will_take(hosts: Hosts) -> None:
    """At a known rate the time left is what is left over the rate, and less and less."""
    source, destination = hosts.pair(24 * MIB)
    source.start_migrate(destination.uri, "--max-bandwidth", "1M")

    def forecast() -> int | None:  # the first may be of a machine that stood still
        eta: int = source.migration().get("x-fusemig", {}).get("eta", 0)
        return eta if 2_000 < eta < 40_000 else None

    first = wait_until(forecast, "a forecast that is near")
    assert source.migration()["x-fusemig"]["converges"] is True
    assert source.migration()["expected-downtime"] < 300
    assert "s left" in source.command("status").stdout
    wait_until(lambda: source.migration()["x-fusemig"].get("eta", first) < first, "a shorter one")
    source.set_parameters(max_bandwidth=0)
    source.wait_phase("completed")
    assert "eta" not in source.migration()["x-fusemig"]


def test_what_an_order_does_not_go_with(hosts: Hosts) -> None:
    """QEMU's wire: it is refused, and nothing is started."""
    source, destination = hosts.pair(2 * MIB)
    with pytest.raises(QmpRefusedError, match="sequential"):
        source.qmp.execute("migrate", {"uri": destination.uri, "x-fusemig-order": "heat", "x-fusemig-wire": "qemu"})
    assert source.phase() == "none"
