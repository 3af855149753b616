"""fusemig from a program of one's own: the programs of docs/library.md, and how a block ends that is left otherwise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from fusemig.errors import ConfigError, ConnectError
from fusemig.library import DiskSpec, ServeOptions, serving
from support.hosts import MIB, is_mounted, write_random

if TYPE_CHECKING:
    from support.hosts import Hosts

pytestmark = pytest.mark.fuse

PAGE = Path(__file__).resolve().parents[2] / "docs" / "library.md"


def programs() -> list[str]:
    """Return the programs of the page."""
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def options(place: Path) -> ServeOptions:
    """Return those of a program with one disk."""
    image = write_random(place / "vda.img", 8 * MIB)
    (place / "disks").mkdir()
    return ServeOptions(place / "disks", (DiskSpec("vda", image),), place / "control", heeds_signals=False)


def test_the_programs_of_the_docs_do_what_they_say(hosts: Hosts, place: Path) -> None:
    """One moves a disk, with every byte; the other tracks without a mount. Where nobody waits, the first says so."""
    moving, tracking = programs()
    assert run(tracking).returncode == 0
    destination = hosts.destination()
    prepared = options(place)
    failed = run(moving, place, f"unix:{place}/nobody")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("not moved (failed): cannot connect to unix:")
    done = run(moving, place, destination.uri)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "chunks written so far: 0"
    assert done.stdout.splitlines()[-1] == "vda is released"
    assert destination.images["vda"].read_bytes() == prepared.disks[0].path.read_bytes()
    assert not is_mounted(place / "disks")


@pytest.mark.nightly
def test_the_programs_of_the_docs_are_typed(tmp_path: Path) -> None:
    """Mypy --strict has nothing to say of them."""
    for number, program in enumerate(programs()):
        file = tmp_path / f"program{number}.py"
        file.write_text(program)
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", file], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


async def test_a_block_that_is_left_early_leaves_nothing(place: Path, hosts: Hosts) -> None:
    """By its own error, which comes out as it is; and by cancellation in the middle of a migration."""
    prepared = options(place)
    destination = hosts.destination()
    with pytest.raises(LookupError, match="mine"):
        async with serving(prepared) as server:
            assert (await trio.Path(server.file("vda")).stat()).st_size == 8 * MIB
            with pytest.raises(ConfigError, match="there is no disk 'vdx'; disks are vda"):
                await server.migrate(destination.uri, ["vdx"])
            with pytest.raises(ConnectError):
                await server.migrate(f"unix:{place}/nobody")
            raise LookupError("mine")
    assert not is_mounted(place / "disks")
    with trio.move_on_after(0.2) as scope:
        async with serving(prepared) as server:
            await server.migrate(destination.uri, max_bandwidth=MIB)
    assert scope.cancelled_caught
    assert not is_mounted(place / "disks")
    assert not (place / "control").exists()


async def test_what_cannot_be_served_is_one_error(place: Path) -> None:
    """Not a group of them, and nothing is left."""
    missing = ServeOptions(place, (DiskSpec("vda", place / "none.img"),), place / "control")
    with pytest.raises(ConfigError, match="cannot open image"):
        async with serving(missing):
            raise AssertionError("it cannot have begun")
