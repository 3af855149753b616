"""The daemon's log while disks move, as a program reads it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from support.hosts import MIB, write_random

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse


def lines(host: Host) -> list[dict[str, Any]]:
    """Return the lines of a log, each of which is JSON."""
    return [json.loads(line) for line in host.log().splitlines()]


def test_both_sides_name_a_migration_alike(hosts: Hosts, place: Path) -> None:
    """Every line of a migration has its name, the present phase and the disks, on the source and the destination."""
    image = write_random(place / "source.img", 2 * MIB)
    source = hosts.start("source", {"vda": image}, options=("--log-format", "json"))
    destination = hosts.destination(options=("--log-format", "json", "--log-level", "debug"))
    assert source.migrate(destination.uri).exit_code == 0
    session = source.migration()["x-fusemig"]["session"][:8]
    for host, first in ((source, "setup"), (destination, "setup")):
        of_it = [line for line in lines(host) if line.get("migration") == session]
        assert of_it[0]["phase"] == first, of_it
        assert of_it[-1]["phase"] == "completed"
        assert all(line["disks"] == ["vda"] for line in of_it)
        assert all(line["timestamp"].endswith("Z") and line["level"] == "info" for line in of_it)
        others = [line for line in lines(host) if line not in of_it]
        assert all("phase" not in line for line in others), others
    assert any(line["level"] == "debug" for line in lines(destination))


def test_a_quiet_log_keeps_what_somebody_should_look_at(hosts: Hosts, place: Path) -> None:
    """--log-level warning: silence, and then the failed migration."""
    image = write_random(place / "source.img", MIB)
    source = hosts.start("source", {"vda": image}, options=("--log-format", "json", "--log-level", "warning"))
    assert source.log() == ""
    assert source.migrate("tcp:127.0.0.1:1").exit_code == 1
    (line,) = lines(source)
    assert (line["event"], line["level"], line["phase"], line["disks"]) == (
        "migration over",
        "warning",
        "failed",
        ["vda"],
    )
