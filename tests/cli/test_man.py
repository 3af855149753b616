"""Man pages and completion: made from the commands, so complete; and good enough for the programs that read them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fusemig.cli.exits import EXIT_CODES, MEANINGS
from fusemig.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the man pages."""
    directory = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, ROOT / "tools" / "make_man", directory], check=True)
    return directory


def test_each_command_has_a_page_with_each_option(pages: Path) -> None:
    """Every command and every long option, and the exit codes."""
    for name, command in cli.commands.items():
        text = (pages / f"fusemig-{name}.1").read_text().replace("\\-", "-")
        for param in command.params:
            if isinstance(param, click.Option):
                assert max(param.opts, key=len) in text, (name, param.opts)
        for code in MEANINGS:
            assert f".B {code}\n" in text
    assert "fusemig-migrate" in (pages / "fusemig.1").read_text().replace("\\-", "-")


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
def test_the_pages_are_good_roff(pages: Path) -> None:
    """Groff has nothing to say of them, and has of one with a mistake; the table of `resolve` keeps its lines."""

    def complaints(path: Path) -> str:
        command = ["groff", "-man", "-Tutf8", "-ww", "-z", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    for path in pages.iterdir():
        assert complaints(path) == "", path
    bad = pages / "bad"
    bad.write_text((pages / "fusemig.1").read_text() + ".NOSUCH\n")
    assert complaints(bad) != ""
    bad.unlink()
    assert "\non the source" in (pages / "fusemig-resolve.1").read_text()


def test_exit_codes_mean_one_thing_everywhere() -> None:
    """The codes that commands return, those of the man pages and those of docs/cli.md are the same."""
    assert set(EXIT_CODES.values()) <= set(MEANINGS)
    table = (ROOT / "docs" / "cli.md").read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == set(MEANINGS)


def test_bash_completes_commands_options_and_values() -> None:
    """In a real bash, through the function that `completion bash` defines; nothing for what does not exist."""
    script = """
        source <("$0" -m fusemig completion bash)
        try() {
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
            _fusemig_completion "$FUSEMIG"; echo "${COMPREPLY[*]}"
        }
        try fusemig migr
        try fusemig migrate --downt
        try fusemig serve --cache w
        try fusemig frobn
    """
    program = Path(sys.executable).parent / "fusemig"
    done = subprocess.run(
        ["bash", "-c", script, sys.executable],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"FUSEMIG": str(program)},
    )
    assert done.stdout.split("\n") == ["migrate", "--downtime-limit", "writeback", "", ""]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_theirs(shell: str) -> None:
    """The scripts name the program and its variable."""
    done = subprocess.run(
        [sys.executable, "-m", "fusemig", "completion", shell], capture_output=True, text=True, check=True
    )
    assert "_FUSEMIG_COMPLETE" in done.stdout
    assert "fusemig" in done.stdout
