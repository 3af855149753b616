"""An upgrade as an operator makes it: the next wheel in place of the one that serves, then `fusemig upgrade`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from fusemig import __version__
from support.heirs import verifying
from support.hosts import MIB
from support.resilient import kill_and_wait, start
from support.wheels import build, run

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Hosts

pytestmark = pytest.mark.fuse

NEXT = f"{__version__}.post1"


class Environment:
    """A virtual environment into which wheels are installed, as on an operator's host."""

    def __init__(self, directory: Path) -> None:
        """Make it, with nothing in it."""
        self._directory = directory
        run(sys.executable, "-m", "venv", directory / "venv", cwd=directory)
        self.program = directory / "venv" / "bin" / "fusemig"

    def install(self, wheel: Path, *options: str) -> None:
        """Install a wheel, in place of what is there."""
        pip = self.program.with_name("pip")
        run(pip, "install", "--quiet", *options, wheel, cwd=self._directory, timeout_s=400)

    def fusemig(self, *arguments: object) -> str:
        """Run the installed program; return what it printed."""
        return run(self.program, *arguments, cwd=self._directory)

    @property
    def prefix(self) -> list[str]:
        """What before ``python -m fusemig`` has the installed program run instead."""
        return ["sh", "-c", f'shift 3; exec {self.program} "$@"', "sh"]


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_next_wheel_takes_over_in_place(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `fio --verify`: up, a crash of the new one, and down again; until it is told to, the old one serves on."""
    monkeypatch.setattr("support.hosts.WATCHDOG_S", 600.0)
    wheels = {}
    for version in (__version__, NEXT):
        (tmp_path / version).mkdir()
        wheels[version] = build(tmp_path / version, version)
    environment = Environment(tmp_path)
    environment.install(wheels[__version__])
    assert environment.fusemig("--version").split()[-1] == __version__
    # Without a standby: one that begins while files are replaced ends with a traceback, and is not what is looked at.
    host = start(hosts, size=16 * MIB, prefix=environment.prefix)

    def upgrade() -> dict[str, Any]:
        told: dict[str, Any] = json.loads(environment.fusemig("upgrade", host.control, "--json"))
        host.forget_qmp()
        return told

    with verifying(host.file()):
        environment.install(wheels[NEXT], "--upgrade", "--no-deps")
        assert host.status()["version"] == __version__
        up = upgrade()
        kill_and_wait(host)
        assert host.status()["version"] == NEXT
        environment.install(wheels[__version__], "--force-reinstall", "--no-deps")
        assert host.status()["version"] == NEXT
        down = upgrade()
    assert (up["from"], up["to"]) == (__version__, NEXT)
    assert (down["from"], down["to"]) == (NEXT, __version__)
    assert host.status()["succession"]["predecessors"] == 3
    print(f"guests waited {up['pause-ms']} and {down['pause-ms']} ms")
    assert host.stop() == 0
