"""The command line as scripts see it: exit codes, and one clear line on stderr.

Every call is a process of its own, so what is tested is what is installed. Nothing here mounts anything.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fusemig import __version__

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = ("serve", "migrate", "status", "cancel", "continue", "postcopy", "demo")


def fusemig(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    command = [sys.executable, "-m", "fusemig", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)


def error_of(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Return the error's text, having checked that it is one line, on stderr, without a traceback."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("fusemig: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == errors[0]
    return errors[0].removeprefix("fusemig: ")


def serve(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `fusemig serve` with options that it refuses."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    done = fusemig("serve", mountpoint, "--control", tmp_path / "control", *options)
    assert not (tmp_path / "control").exists(), "a refused serve left its control socket behind"
    return done


def test_help_lists_every_command_with_a_sentence() -> None:
    """`--help` exits 0, goes to stdout and names all commands."""
    done = fusemig("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\S", done.stdout, re.MULTILINE), command


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str) -> None:
    """`fusemig COMMAND --help` exits 0 and shows its usage."""
    done = fusemig(command, "-h")
    assert done.returncode == 0
    assert re.match(rf"Usage: (python -m )?fusemig {command} ", done.stdout)


def test_version_is_that_of_the_package() -> None:
    """`--version` is for scripts: name and version on stdout."""
    done = fusemig("--version")
    assert (done.returncode, done.stdout) == (0, f"fusemig, version {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("frobnicate",), "No such command 'frobnicate'."),
        (("status",), "Missing argument 'SOCKET'."),
        (("migrate", "control"), "Missing argument 'URI'."),
        (("serve", "mnt", "--control", "c"), "Missing option '--disk'."),
        (("serve", "mnt", "--disk", "vda=a"), "Missing option '--control'."),
        (("status", "c", "--frobnicate"), "--frobnicate"),
        (("migrate", "c", "tcp:h:1", "--max-bandwidth", "fast"), "'fast' is not a size"),
        (("migrate", "c", "tcp:h:1", "--downtime-limit", "soon"), "'soon' is not a time"),
        (("migrate", "c", "tcp:h:1", "--progress", "loud"), "'loud' is not one of"),
    ],
)
def test_wrong_usage_exits_2_with_one_clear_line(arguments: tuple[str, ...], text: str) -> None:
    """What click finds wrong is told as our own errors are; the usage may stand above it."""
    assert text in error_of(fusemig(*arguments), 2)


@pytest.mark.parametrize(
    "command", [("status",), ("cancel",), ("continue",), ("postcopy",), ("migrate", "tcp:127.0.0.1:1")]
)
def test_a_socket_that_nobody_listens_at_is_named(command: tuple[str, ...], tmp_path: Path) -> None:
    """A client without a daemon exits 1 and says which socket, and what to start."""
    socket = tmp_path / "nobody"
    text = error_of(fusemig(command[0], socket, *command[1:]), 1)
    assert f"no daemon listens at '{socket}'" in text
    assert "fusemig serve" in text


def test_a_control_socket_name_that_is_too_long_is_a_usage_error(tmp_path: Path) -> None:
    """The kernel's limit on socket names is told before anything is tried."""
    assert "path too long" in error_of(fusemig("status", tmp_path / ("x" * 120)), 2)


@pytest.mark.parametrize("option", ["vda", "=a.img", "vda="])
def test_a_disk_without_name_or_path_is_refused(option: str, tmp_path: Path) -> None:
    """`--disk` wants NAME=PATH, and shows one."""
    assert error_of(serve(tmp_path, "--disk", option), 2).startswith(f"--disk {option}: write NAME=PATH")


def test_readonly_of_an_unknown_disk_is_refused_and_the_known_ones_are_named(tmp_path: Path) -> None:
    """`--readonly` is a promise, so a typing error in it must not serve the disk writable."""
    text = error_of(
        serve(tmp_path, "--disk", f"vda={tmp_path}/a", "--disk", f"vdb={tmp_path}/b", "--readonly", "vdc"), 2
    )
    assert text == "--readonly vdc: there is no --disk vdc=PATH; disks are vda, vdb"


def test_an_image_that_does_not_exist_is_named(tmp_path: Path) -> None:
    """A plain `serve` creates no image."""
    image = tmp_path / "missing.img"
    assert str(image) in error_of(serve(tmp_path, "--disk", f"vda={image}"), 2)
    assert not image.exists()


def test_an_image_of_odd_size_is_refused_with_its_size(tmp_path: Path) -> None:
    """Sizes are multiples of 512 bytes, and the text says what this one is."""
    image = tmp_path / "odd.img"
    image.write_bytes(b"x" * 1000)
    text = error_of(serve(tmp_path, "--disk", f"vda={image}"), 2)
    assert "1000" in text
    assert "512" in text


@pytest.mark.parametrize("name", ["../vda", "a/b", ".hidden", ""])
def test_a_disk_name_that_is_no_file_name_is_refused(name: str, tmp_path: Path) -> None:
    """Names become files of the mount and nothing else."""
    image = tmp_path / "a.img"
    image.write_bytes(bytes(4096))
    error_of(serve(tmp_path, "--disk", f"{name}={image}"), 2)


def test_an_incoming_uri_of_another_kind_is_refused(tmp_path: Path) -> None:
    """`exec:` and `fd:` are QEMU's; what we take instead is in the text."""
    image = tmp_path / "a.img"
    image.write_bytes(bytes(4096))
    text = error_of(serve(tmp_path, "--disk", f"vda={image}", "--incoming", "exec:cat"), 2)
    assert "tcp:HOST:PORT" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--size", "1M"), "give at least 32M"),
        (("--size", "much"), "'much' is not a size"),
        (("--seconds", "0"), "--seconds 0"),
        (("--directory", "/nowhere/at/all"), "--directory /nowhere/at/all: No such file or directory"),
        (("--size", "8000T"), "are free there"),
    ],
)
def test_the_demo_refuses_what_it_cannot_do_before_it_sets_anything_up(options: tuple[str, ...], text: str) -> None:
    """A demo that cannot be run says so at once."""
    assert text in error_of(fusemig("demo", *options), 2)
