"""One HTML page with its style and script inside, and the policy that lets a browser run those and nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
from importlib.resources import files
from typing import NamedTuple


class HtmlPage(NamedTuple):
    """A page."""

    text: str
    security_policy: str
    """For the header ``Content-Security-Policy``."""


def assemble(title: str, body: str, styles: tuple[str, ...], script: str = "") -> HtmlPage:
    """Return a page.

    Args:
        title: plain text.
        body: HTML.
        styles: names of files beside this one.
        script: another one, if the page is to do anything.
    """
    style = "".join(_asset(name) for name in styles)
    code = _asset(script) if script else ""
    policy = ["default-src 'none'", f"style-src {_hash(style)}", "img-src data:", "base-uri 'none'"]
    policy += ["form-action 'none'", "frame-ancestors 'none'"]
    if code:
        policy += [f"script-src {_hash(code)}", "connect-src 'self'"]
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<title>{html.escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{style}</style>\n</head>\n'
        f"<body>\n{body}\n" + (f"<script>{code}</script>\n" if code else "") + "</body>\n</html>\n"
    )
    return HtmlPage(text, "; ".join(policy))


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
