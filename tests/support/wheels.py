"""Wheels of this project, built from its tree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fusemig import __version__

PROJECT = Path(__file__).parents[2]


def run(*command: object, cwd: Path, timeout_s: float = 110) -> str:
    """Run a program; return what it printed, or fail with all that it said."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


def build(directory: Path, version: str = __version__) -> Path:
    """Build the wheel from what git knows of this tree, so that nothing that lies about gets in or helps.

    Of another ``version`` if asked to, which has no other code than this one.
    """
    tree = directory / "tree"
    files = run("git", "-C", PROJECT, "ls-files", "-z", cwd=directory).split("\0")
    for name in filter(None, files):
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (PROJECT / name).is_file():  # else: deleted, and not committed yet
            target.write_bytes((PROJECT / name).read_bytes())
    place = tree / "fusemig/__init__.py"
    old, new = (f'\n__version__ = "{one}"\n' for one in (__version__, version))
    text = place.read_text()
    assert text.count(old) == 1
    place.write_text(text.replace(old, new))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--wheel-dir", directory, tree, cwd=directory)
    (wheel,) = directory.glob("*.whl")
    return wheel
