"""``fusemig.toml``: what is taken from it, what goes before it, what is refused; and that docs/cli.md lists it all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusemig.cli.config import check, effective
from fusemig.cli.config_file import configured, find, in_file, read, search_path
from fusemig.cli.main import cli
from fusemig.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FILE = """
[serve]
mountpoint = "mnt"
control = "from-file"
lane = "pyfuse3"
lane-threads = 2
allow-other = true
tls-authz = ["a", "b c"]

[[disk]]
name = "vda"
path = "/images/a=b.img"
readonly = true

[[disk]]
name = "vdb"
path = "/images/b"
base = "/images/base"

[migrate]
max-bandwidth = "100M"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Give a file with a bit of everything."""
    path = tmp_path / "fusemig.toml"
    path.write_text(FILE)
    return path


def fusemig(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with no configuration of this machine's own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FUSEMIG_")}
    return subprocess.run(
        [sys.executable, "-m", "fusemig", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
        env=environment | {"XDG_CONFIG_HOME": "/nonexistent"} | variables,
    )


def shown(named: Path | None) -> dict[str, Any]:
    """Return value and origin of `serve`'s parameters."""
    return effective(named, cli)["serve"]


def test_each_value_has_the_origin_that_goes_first(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment before the file, that before the default, value by value."""
    monkeypatch.setenv("FUSEMIG_SERVE_LANE", "data")
    monkeypatch.setenv("FUSEMIG_SERVE_DISK", "vdc=c vdd=d")
    serve = shown(file)
    assert serve["lane"] == ("data", "environment")
    assert serve["disk"] == (["vdc=c", "vdd=d"], "environment")
    assert serve["control"] == ("from-file", "file")
    assert serve["tls-authz"] == (["a", "b c"], "file")
    assert serve["log-level"] == ("info", "default")
    assert serve["incoming"] == (None, "unset")


def test_the_command_line_goes_before_everything(file: Path, tmp_path: Path) -> None:
    """A flag beats the variable, which beats the file: told by which control socket is complained of."""
    (tmp_path / "mnt").mkdir()
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    for name in ("flag", "variable", "from-file"):
        (tmp_path / name).write_text("no socket")
    file.write_text(f'[serve]\nmountpoint = "{tmp_path}/mnt"\ncontrol = "{tmp_path}/from-file"\n')
    disk = ("--config", file, "--disk", f"vda={image}")
    variable = {"FUSEMIG_SERVE_CONTROL": str(tmp_path / "variable")}
    for done, name in (
        (fusemig("serve", *disk, "--control", tmp_path / "flag", **variable), "flag"),
        (fusemig("serve", *disk, **variable), "variable"),
        (fusemig("serve", *disk), "from-file"),
    ):
        assert done.returncode == 2
        assert f"{name}' exists and is no socket" in done.stderr, done.stderr


def test_disks_from_elsewhere_replace_the_files(file: Path, tmp_path: Path) -> None:
    """--disk on the command line: a readonly of the file's does not refer to a disk that is not there."""
    file.write_text(FILE.replace("tls-authz", "# "))
    done = fusemig("serve", "--config", file, "--disk", f"vdz={tmp_path}/none")
    assert "disk 'vdz'" in done.stderr
    assert "--readonly" not in done.stderr
    done = fusemig("serve", "--config", file, "--readonly", "vdb")
    assert "disk 'vda'" in done.stderr


def test_what_is_shown_is_a_file_that_says_the_same(file: Path, tmp_path: Path) -> None:
    """`config show` can be kept as a file: it passes the check, and means what was shown."""
    again = tmp_path / "again.toml"
    done = fusemig("config", "show", FUSEMIG_CONFIG=str(file))
    again.write_text(done.stdout)
    assert fusemig("config", "check", again).returncode == 0
    values = {key: value for key, (value, _) in shown(file).items()}
    assert {key: value for key, (value, _) in shown(again).items()} == values
    commands = json.loads(fusemig("config", "show", "--config", file, "--json").stdout)["commands"]
    assert commands["serve"]["lane"] == {"value": "pyfuse3", "origin": "file"}


def test_files_are_looked_for_in_two_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG's directory first, then /etc; a file that is named goes before both."""
    assert search_path({"HOME": "/h"}) == [Path("/h/.config/fusemig/fusemig.toml"), Path("/etc/fusemig/fusemig.toml")]
    (tmp_path / "fusemig").mkdir()
    usual = tmp_path / "fusemig" / "fusemig.toml"
    usual.touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert find(None) == usual
    assert find(Path("named")) == Path("named")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[serve]\ncontrl = 'x'\n", "[serve]: unknown key 'contrl'; did you mean 'control'?"),
        ("[serv]\n", "the top level: unknown key 'serv'; did you mean 'serve'?"),
        ("[resolve]\nowner = 'source'\n", "unknown key 'resolve'; there are disk, migrate, serve"),
        ("[[disk]]\nname = 'a'\npath = 'b'\nread-only = true\n", "unknown key 'read-only'; did you mean 'readonly'?"),
        ("[[disk]]\nname = 'a'\n", "[disk[0]]: object missing required field `path`"),
        ("[serve]\ndisk = ['vda=x']\n", "write [[disk]]"),
        ("[serve]\nallow-other = 'yes'\n", "[serve.allow-other]: expected `bool | null`, got `str`"),
        ("[serve]\nlane-threads = 99\n", "[serve.lane-threads]: expected `int` <= 64"),
        ("[serve]\nlane = 'fast'\n", "[serve] lane: 'fast' is not one of"),
        ("[serve]\nmetrics = 'localhost'\n", "[serve] metrics: 'localhost' is not a migration URI"),
        ("[migrate]\nmax-bandwidth = 'much'\n", "[migrate] max-bandwidth: 'much' is not a size"),
        ("[[disk]]\nname = 'a=b'\npath = 'b'\n", "[disk[0].name]: expected `str` matching regex"),
        ("[[disk]]\nname = 'a'\npath = 'b,base=c'\n", "[disk[0].path]: expected `str` matching regex"),
        ("[serve\n", "is no TOML"),
    ],
)
def test_what_a_command_would_refuse_is_told_by_check(tmp_path: Path, text: str, complaint: str) -> None:
    """One line with the place, what is wrong and what may have been meant."""
    path = tmp_path / "fusemig.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        check(path, cli)
    assert str(caught.value).startswith(str(path))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_file_stops_the_command_before_it_begins(tmp_path: Path) -> None:
    """The same line as of the check; nothing is started."""
    path = tmp_path / "fusemig.toml"
    path.write_text("[serve]\ncontrl = 'x'\n")
    for command in (("serve", "mnt"), ("migrate", "socket", "tcp:h:1")):
        done = fusemig(*command, "--config", path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "did you mean 'control'?" in done.stderr
    assert fusemig("config", "check", path).returncode == 2
    assert fusemig("serve", "mnt", "--config", tmp_path / "none").returncode == 2


def test_decisions_are_not_taken_from_the_environment() -> None:
    """`resolve` wants them said each time."""
    done = fusemig("resolve", "x", FUSEMIG_RESOLVE_OWNER="source", FUSEMIG_RESOLVE_I_HAVE_FENCED_THE_OTHER="1")
    assert "say who owns the disk (--owner)" in done.stderr


@given(st.data())
def test_every_option_can_be_written_in_the_file(data: st.DataObject) -> None:
    """For each parameter there is a value that the file takes, and it comes out under the parameter's name."""
    command = data.draw(st.sampled_from(list(configured(cli).values())))
    key, param = data.draw(st.sampled_from(list(in_file(command).items())))
    is_flag = isinstance(param, click.Option) and param.is_flag
    value: Any = 7 if isinstance(param.type, click.IntRange) else True if is_flag else "text"
    if isinstance(param, click.Option) and param.multiple:
        value = [value]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "fusemig.toml")
        path.write_text(f"[{command.name}]\n{key} = {json.dumps(value)}\n")
        assert read(path, cli)[command.name or ""] == {param.name: value}
        path.write_text(f"[{command.name}]\n{key} = {{}}\n")
        with pytest.raises(ConfigError, match=key):
            read(path, cli)


def test_the_reference_in_the_docs_is_that_of_the_commands() -> None:
    """docs/cli.md is what tools/make_reference writes."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "make_reference", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_example_in_the_docs_is_a_good_file(tmp_path: Path) -> None:
    """The file in docs/cli.md passes the check."""
    page = (ROOT / "docs" / "cli.md").read_text()
    example = tmp_path / "example.toml"
    example.write_text(page.partition("```toml\n")[2].partition("```")[0])
    check(example, cli)
    assert shown(example)["disk"] == (["vda=/var/lib/vm/vda.img"], "file")
