"""The web page and the report in a real browser.

Nightly: Debian's Chromium is not on a machine that was only set up for the tests, and to install it takes 16 s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from support.browser import CHROMIUM, browsing
from support.hosts import MIB, pwrite, reserved_port, write_random

if TYPE_CHECKING:
    from pathlib import Path

    from support.browser import Page
    from support.hosts import Hosts

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.nightly,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
]

COLOURS = """(() => {
  const canvas = document.querySelector("#disks canvas"), found = {};
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  for (let at = 0; at < pixels.length; at += 4) {
    const colour = [pixels[at], pixels[at + 1], pixels[at + 2], pixels[at + 3]].join();
    found[colour] = (found[colour] || 0) + 1;
  }
  return found;
})()"""


def colour(page: Page, name: str) -> str:
    """Return a colour of the page as the canvas has it."""
    found: str = page.evaluate(
        f'(() => {{ const pen = document.createElement("canvas").getContext("2d"); pen.fillStyle = color("{name}"); '
        "pen.fillRect(0, 0, 1, 1); return pen.getImageData(0, 0, 1, 1).data.join(); })()"
    )
    return found


def test_the_page_draws_what_is_so_and_acts_for_who_has_the_token(hosts: Hosts, place: Path) -> None:
    """The map's colours and counts, light and dark and on a phone; the buttons; nothing is refused or thrown."""
    image = write_random(place / "source.img", 8 * MIB)
    source = hosts.start("source", {"vda": image}, options=("--web", "tcp:127.0.0.1:0"))
    destination = hosts.destination()
    status = source.status()
    with browsing(place / "profile") as page:
        page.show(status["web"], 1100, 800)
        page.wait_for('document.querySelector("#disks canvas")?.width > 300')
        assert "allocated 8" in page.wait_for('document.querySelector(".legend").textContent')
        painted: dict[str, Any] = page.evaluate(COLOURS)
        assert painted[colour(page, "allocated")] > 0
        assert colour(page, "dirty") not in painted
        assert page.evaluate('document.getElementById("cancel").disabled')

        assert source.migrate("unix:/<img src=x>").exit_code != 0
        page.wait_for('document.getElementById("error").textContent.includes("<img src=x>")')
        assert page.evaluate('document.querySelectorAll("img").length') == 0

        source.migrate_to_pause(destination.uri)
        page.wait_for('document.querySelector(".legend").textContent.includes("sent 8")')
        page.wait_for('document.getElementById("title").textContent.includes("pre-switchover")')
        light = colour(page, "sent")
        assert page.evaluate(COLOURS)[light] > 0
        page.look_like(1100, 800, scheme="dark")
        dark = page.wait_for(f'(() => {{ const now = color("sent"); return now !== "{light}" && now; }})()')
        assert dark
        page.wait_for(f"({COLOURS})['{colour(page, 'sent')}'] > 0")
        page.look_like(360, 740, scheme="light")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360

        token = place / "token"
        token.write_text((source.directory / "control.web-token").read_text())
        enter = 'document.getElementById("token").value = "{}"; document.getElementById("token").oninput()'
        page.evaluate(enter.format("wrong"))
        page.wait_for('!document.getElementById("continue").disabled')
        page.evaluate('document.getElementById("continue").click()')
        page.wait_for('document.getElementById("said").textContent.includes("needs the token")')
        assert source.phase() == "pre-switchover"
        assert len(page.problems) == 1  # the browser notes the 401
        page.evaluate(enter.format(token.read_text().strip()))
        page.evaluate('document.getElementById("continue").click()')
        page.wait_for('document.getElementById("title").textContent.includes("completed")')
        link = page.wait_for('document.querySelector("#history a")?.href')
        assert page.wait_for('document.querySelectorAll("#passes tr").length > 1')

        page.show(link, 900, 700)
        page.wait_for('document.querySelector("h1")?.textContent.includes("Migration of vda")')
        assert page.evaluate("document.scripts.length") == 0
        assert len(page.problems) == 1, page.problems


def test_the_page_waits_for_a_daemon_that_has_gone(hosts: Hosts, place: Path) -> None:
    """It says so, and goes on with the next one at the same address."""
    image = write_random(place / "source.img", 2 * MIB)
    with reserved_port() as port, browsing(place / "profile") as page:
        web = ("--web", f"tcp:127.0.0.1:{port}")
        source = hosts.start("source", {"vda": image}, options=web)
        page.show(f"http://127.0.0.1:{port}/", 900, 700)
        page.wait_for('document.getElementById("link")?.textContent === "live"')
        source.stop()
        page.wait_for('document.getElementById("link")?.textContent.includes("away")')
        again = hosts.start("again", {"vda": image}, options=web)
        pwrite(again.file(), b"x" * 4096, 0)
        page.wait_for('document.getElementById("link")?.textContent === "live"')
        page.wait_for(f'document.getElementById("where")?.textContent.includes("pid {again.pid}")')
