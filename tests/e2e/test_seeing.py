"""What people see of real daemons: `top` in a real terminal, the web page, the report."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from support.hosts import MIB, pwrite, wait_until, write_random
from support.resilient import kill_and_wait, n_served
from support.terminal import terminal

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse

TOP = (sys.executable, "-m", "fusemig", "top")
STATES = ("in-flight", "dirty", "missing", "sent", "allocated", "hole")


def view(host: Host, cells: int = 512) -> dict[str, Any]:
    """Return the view of a host, checked to count every chunk of every disk once."""
    seen: dict[str, Any] = host.qmp.execute("x-fusemig-query-view", {"cells": cells})
    for disk in seen["disks"]:
        if "map" in disk:
            assert sum(sum(disk["map"][state]) for state in STATES) == disk["map"]["chunks"]
    return seen


def counts(host: Host) -> dict[str, int]:
    """Return how many chunks of the first disk are in which state, zeros left out."""
    chunks = view(host)["disks"][0]["map"]
    return {state: sum(chunks[state]) for state in STATES if chunks[state]}


def patchy(path: Path) -> Path:
    """Make an image of 24 MiB, of which 8 hold data."""
    write_random(path, 8 * MIB)
    os.truncate(path, 24 * MIB)
    return path


class Browser:
    """What asks a web page as a browser would."""

    def __init__(self, host: Host) -> None:
        """Find it where the status says."""
        status = host.status()
        with open(status["web-token"], encoding="ascii") as file:
            self.token = file.read().strip()
        self._place = status["web"].removeprefix("http://").removesuffix("/")

    def ask(self, path: str, method: str = "GET", token: str = "") -> tuple[int, str]:
        """Return status and body."""
        connection = http.client.HTTPConnection(self._place, timeout=40)
        connection.request(method, path, headers={"Authorization": f"Bearer {token}"} if token else {})
        response = connection.getresponse()
        body = response.read().decode()
        connection.close()
        return response.status, body

    def next_view(self) -> dict[str, Any]:
        """Return the first event of the stream."""
        connection = http.client.HTTPConnection(self._place, timeout=40)
        connection.request("GET", "/events")
        line = connection.getresponse().readline()
        connection.close()
        seen: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
        return seen


def test_a_migration_is_seen_from_all_sides(hosts: Hosts, place: Path) -> None:
    """The map at each stage; `top --once`; the page, which lets it go on; the report, of a failed one too."""
    source = hosts.start("source", {"vda": patchy(place / "source.img")}, options=("--web", "tcp:127.0.0.1:0"))
    destination = hosts.destination()
    assert counts(source) == {"allocated": 8, "hole": 16}
    assert "map" not in view(destination)["disks"][0]
    assert source.command("report").exit_code == 1
    assert source.migrate("unix:/nowhere/at/all").exit_code != 0

    source.migrate_to_pause(destination.uri)
    assert counts(source) == {"sent": 8, "hole": 16}
    assert counts(destination)["allocated"] == 8
    once = source.command("top", "--once")
    assert (once.exit_code, "\x1b" in once.stdout) == (0, False)
    assert "sending: pre-switchover" in once.stdout
    assert "sent 8" in once.stdout
    as_json = json.loads(source.command("top", "--json", destination.control, source.control).stdout.splitlines()[0])
    assert as_json["status"]["migration"]["x-fusemig"]["phase"] == "pre-switchover"

    browser = Browser(source)
    assert browser.next_view()["status"]["pid"] == source.pid
    assert browser.ask("/continue", "POST")[0] == 401
    assert source.phase() == "pre-switchover"
    assert browser.ask("/continue", "POST", browser.token) == (200, "{}")
    source.wait_phase("completed")
    assert counts(source) == {"sent": 8, "hole": 16}
    wait_until(lambda: counts(destination) == {"allocated": 8, "hole": 16}, "the destination's map")

    page, written = place / "report.html", place / "report.json"
    assert source.command("report", "-o", page).exit_code == 0
    assert "proved it" in page.read_text()
    digest = source.migration()["x-fusemig"]["disks"][0]["digest"]
    assert digest in page.read_text()
    assert source.command("report", "--json", "-o", written).exit_code == 0
    failed, completed = (json.loads(line) for line in written.read_text().splitlines())
    assert (failed["phases"][-1]["phase"], completed["phases"][-1]["phase"]) == ("failed", "completed")
    assert "/nowhere/at/all" in failed["info"]["error-desc"]
    assert browser.ask(f"/report?began={failed['began']}")[1].count("nowhere") > 1
    assert browser.ask("/report?began=1")[0] == 404
    assert json.loads(browser.ask("/history")[1]) == [failed, completed]

    def is_told_there() -> bool:
        (there,) = destination.qmp.execute("x-fusemig-query-history")
        return (there["phases"][-1]["phase"], there["info"]["x-fusemig"]["role"]) == ("completed", "destination")

    wait_until(is_told_there, "the destination's record")

    # The file says the same when the daemon has gone.
    assert source.stop() == 0
    source.control = written
    assert source.command("report", "-o", place / "again.html").exit_code == 0
    assert (place / "again.html").read_text() == page.read_text()


def test_top_lives_in_a_terminal_and_gives_it_back(hosts: Hosts, place: Path) -> None:
    """It shows changes, waits for a daemon that has gone, follows the next, fits a smaller window, and q ends it."""
    image = patchy(place / "source.img")
    source = hosts.start("source", {"vda": image})
    with terminal([*TOP, source.control, "--interval", "50ms"], columns=110, lines=24) as screen:
        screen.wait_for("allocated 8")
        screen.wait_for("q quits")
        pwrite(source.file(), b"x" * 4096, 20 * MIB)
        screen.wait_for("allocated 9")
        source.kill()
        screen.wait_for("away since")
        screen.wait_for("allocated 9")
        source.start()
        # Each on its own: a screen that is read may be half drawn.
        screen.wait_for("away since", is_there=False)
        screen.wait_for(f"pid {source.pid}")
        screen.resize(60, 12)
        screen.wait_for("q quits")
        screen.wait_for("vda")
        screen.type(b"q")
        assert screen.finish() == 0
        assert screen.is_as_before
        assert re.search(rb"\x1b\[[0-9;]*38;", screen.output)  # colours were used


@pytest.mark.parametrize("how", ["SIGTERM", "ctrl-c"])
def test_top_gives_the_terminal_back_however_it_ends(hosts: Hosts, place: Path, how: str) -> None:
    """By a signal or by Ctrl-C; with NO_COLOR there are no colours, and signs tell the states apart."""
    with terminal([*TOP, place / "nobody"], NO_COLOR="1") as screen:
        screen.wait_for("no daemon listens")
        if how == "SIGTERM":
            screen.process.send_signal(signal.SIGTERM)
        else:
            screen.type(b"\x03")
        assert screen.finish() == 0
        assert screen.is_as_before
        assert not re.search(rb"\x1b\[[0-9;]*[34]8;|\x1b\[[0-9;]*[34][0-7]m", screen.output)


def test_what_cannot_be_shown_is_said(hosts: Hosts, place: Path) -> None:
    """A public page without leave, and a daemon that is not there."""
    image = write_random(place / "source.img", MIB)
    host = hosts.make("source", {"vda": image}, options=("--web", "tcp:0.0.0.0:0"))
    host.launch()
    assert host.wait() == 2
    assert "--web-insecure" in host.log()
    host.control = place / "nobody"
    once = host.command("top", "--once")
    assert (once.exit_code, "no daemon listens" in once.stderr) == (1, True)


def test_a_page_that_cannot_be_shown_keeps_no_successor_from_its_guests(hosts: Hosts, place: Path) -> None:
    """The next daemon of a mount has a page and a token of its own; where it can have none it serves without."""
    image = write_random(place / "source.img", MIB)
    host = hosts.start("source", {"vda": image}, options=("--web", "tcp:127.0.0.1:0", "--resilient"))
    wait_until(lambda: n_served(host), "the word that it serves")
    first = Browser(host)
    kill_and_wait(host)
    second = Browser(host)
    assert second.token != first.token
    assert second.ask("/history") == (200, "[]")
    token = host.directory / "control.web-token"
    token.unlink()
    token.mkdir()
    kill_and_wait(host)
    pwrite(host.file(), b"x" * 4096)
    assert "the page is not shown" in host.log()
    assert "web" not in host.status()
    token.rmdir()
