"""The live page, which `fusemig.web` serves."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from fusemig.pages.page import assemble

if TYPE_CHECKING:
    from fusemig.pages.page import HtmlPage


def live_page() -> HtmlPage:
    """Return it."""
    body = files(__package__).joinpath("live.html").read_text(encoding="utf-8")
    return assemble("fusemig", body, ("base.css", "live.css"), "live.js")
