"""What the docs tell people to type works as it stands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 80


def script(page: str, mark: str) -> str:
    """Return the commands of all blocks of a page that are marked so, in their order."""
    return "\n".join(re.findall(rf"^```sh {mark}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL))


def run_script(text: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run commands as somebody would who types them, up to the first that fails."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with subprocess.Popen(
        ["bash", "-c", f"set -euo pipefail\n{text}"],
        cwd=directory,
        env=os.environ | {"PATH": path, "XDG_CONFIG_HOME": "/nonexistent"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired as exc:
            pytest.fail(f"it hangs:\n{(exc.output or b'').decode()}")
        finally:
            if process.poll() is None or process.returncode:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)  # daemons in the background unmount
    return subprocess.CompletedProcess([], process.returncode, output, "")


@pytest.mark.fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and loop devices need root")
def test_the_tutorial_can_be_followed(place: Path) -> None:
    """From two hosts to the last command; the disk has every line, and nothing is left."""
    try:
        done = run_script(script("docs/tutorial.md", "tutorial"), place)
        assert done.returncode == 0, done.stdout
        assert "completed in" in done.stdout
        assert "ok    peer tcp:10.99.0.2:4444: answers within" in done.stdout
    finally:
        for mount in ("host1/fs", "host2/fs", "host1/disks", "host2/disks"):
            subprocess.run(["umount", "-l", place / mount], check=False, capture_output=True)
        for host in ("tutorial1", "tutorial2"):
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)


def load_tool(name: str) -> ModuleType:
    """Import a tool, which has no suffix."""
    loader = SourceFileLoader(name, str(ROOT / "tools" / name))
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_every_error_has_its_entry_in_troubleshooting() -> None:
    """As tools/messages finds them; it sees a page that lacks one, and one that tells of what is gone."""
    tool: Any = load_tool("messages")
    messages, kinds = tool.all_messages()
    assert len(messages) > 300
    phrases = tool.phrases(tool.PAGE.read_text())
    assert tool.check(messages, kinds, phrases) == []
    lacking = [one for one in phrases if one != "has an I/O error and cannot be trusted"]
    assert any("has an I/O error" in problem for problem in tool.check(messages, kinds, lacking))
    assert any("nothing says" in problem for problem in tool.check(messages, kinds, [*phrases, "nobody says this"]))


def test_links_between_pages_lead_somewhere() -> None:
    """Every relative link of README and docs names a file that is there."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
