"""What the pages of the docs tell people to type.

The convention: a block of commands is fenced and called ``sh``. A word behind that names who runs it: two hosts
(``host1``, ``host2``, ``authority``), or a script of that name in one directory. Without a word nothing runs the
block, and `tests/e2e/test_docs.py` has a reason for it. Indented blocks are output, drawings, and commands in outline
(``...``, SOCKET).
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from fusemig.cli.main import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```sh ?(?P<mark>[a-z0-9-]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
DEADLINE_S = 80
ALONE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc") if os.geteuid() == 0 else ()


@dataclass(frozen=True)
class Block:
    """Commands of a page, which ``mark`` runs."""

    page: str
    mark: str
    text: str

    @property
    def first(self) -> str:
        """Its first line, which names it."""
        return self.text.splitlines()[0]


def pages() -> list[str]:
    """Return README and the docs, from the project's root."""
    return ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def blocks(page: str) -> list[Block]:
    """Return the blocks of commands of a page."""
    return [Block(page, found["mark"], found["text"]) for found in BLOCK.finditer((ROOT / page).read_text())]


def script(page: str, mark: str) -> str:
    """Return the commands of all blocks of a page that are marked so, in their order."""
    return "\n".join(block.text for block in blocks(page) if block.mark == mark)


def calls(text: str) -> Iterator[list[str]]:
    """Give the words of each ``fusemig`` that a text calls, up to where the shell does something else with it."""
    for line in text.replace("\\\n", " ").splitlines():
        for found in re.finditer(r"(?:^|[\s;(/])fusemig (?=[a-z-])([^|&;)>]*)", line):
            try:
                yield shlex.split(found[1], comments=True)
            except ValueError:
                yield found[1].split()  # half a quotation, in prose


def unknown_words(words: list[str]) -> list[str]:
    """Return what the program does not know of a call: its command, or options of that."""
    known: click.Command = cli
    rest = list(words)
    while isinstance(known, click.Group):
        if not rest or rest[0].startswith("-"):
            return []
        name = rest.pop(0)
        if name not in known.commands:
            return [name]
        known = known.commands[name]
    options = {option for parameter in known.params for option in (*parameter.opts, *parameter.secondary_opts)}
    options |= {"--help", "-h"}
    typed = (found for word in rest for found in re.findall(r"^\[?(--[a-z][a-z-]*)", word))
    return [option for option in typed if option not in options]


def outlines(page: str) -> Iterator[str]:
    """Give what a page calls outside of blocks of commands: indented lines and code in the text."""
    text = FENCED.sub("", (ROOT / page).read_text())
    indented = "\n".join(line.strip() for line in text.splitlines() if line.startswith("    "))
    yield indented
    for code in re.findall(r"`([^`]+)`", text):
        words = code.removeprefix("fusemig ").split()
        if words and words[0] in cli.commands:  # else it may be a message, or another program's
            yield " ".join(["fusemig", *words])


def run_script(
    text: str, directory: Path, *, network: bool = False, deadline_s: float = DEADLINE_S
) -> subprocess.CompletedProcess[str]:
    """Run commands as somebody would who types them, up to the first that fails.

    As root in namespaces of their own, so that their mounts and daemons end with the shell; one of them may be a
    ``network`` with nothing in it.
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with subprocess.Popen(
        [*ALONE, *(["--net"] if network else []), "bash", "-c", f"set -euo pipefail\n{text}"],
        cwd=directory,
        env=os.environ | {"PATH": path, "XDG_CONFIG_HOME": "/nonexistent"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired as exc:
            pytest.fail(f"it hangs:\n{(exc.output or b'').decode()}")
        finally:
            if process.poll() is None or process.returncode:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)  # daemons in the background unmount
    return subprocess.CompletedProcess([], process.returncode, output, "")
