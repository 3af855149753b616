"""The daemon as a service: what it tells its manager, and whether the shipped unit gives it what it needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.hosts import MIB, is_mounted, wait_until, write_random
from support.service_manager import Manager

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.hosts import Hosts

UNIT = Path(__file__).resolve().parents[2] / "tools" / "systemd" / "fusemig@.service"


@pytest.fixture
def manager(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """Have daemons of this test find a manager with a short watchdog."""
    manager = Manager(place / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    yield manager
    manager.close()


@pytest.mark.fuse
@pytest.mark.parametrize("lane", ["data", "pyfuse3"])
def test_a_daemon_tells_its_manager_how_it_stands(hosts: Hosts, place: Path, manager: Manager, lane: str) -> None:
    """READY once the mount answers, signs of life, the migration in the status, STOPPING before the end."""
    source = hosts.make("source", {"vda": write_random(place / "source.img", 2 * MIB)}, options=("--lane", lane))
    source.launch()
    wait_until(lambda: manager.has("READY=1"), "READY=1")
    assert is_mounted(source.mount)
    assert source.file().exists()
    wait_until(lambda: manager.has("WATCHDOG=1"), "a sign of life")
    wait_until(lambda: manager.has("STATUS=1 disk, running"), "the status")
    source.migrate("tcp:127.0.0.1:1")
    wait_until(lambda: manager.has("STATUS=1 disk, running; migration (source): failed"), "the failure in the status")
    assert not manager.has("STOPPING=1")
    assert source.stop() == 0
    assert manager.has("STOPPING=1")
    assert manager.messages.index("READY=1") < manager.messages.index("STOPPING=1")


@pytest.mark.fuse
def test_a_daemon_that_cannot_start_is_never_ready(hosts: Hosts, place: Path, manager: Manager) -> None:
    """The twin: its manager hears nothing but the exit code."""
    host = hosts.make("source", {"vda": place / "none.img"})
    host.launch()
    assert host.wait() == 2
    assert not manager.has("READY=1")


@pytest.mark.fuse
def test_the_units_capabilities_are_enough(hosts: Hosts, place: Path) -> None:
    """With nothing but what the unit leaves, disks are served and moved, both ways."""
    kept = next(line.partition("=")[2] for line in UNIT.read_text().splitlines() if line.startswith("CapabilityB"))
    names = ",".join("+" + one.removeprefix("CAP_").lower() for one in kept.split())
    # Inheritable ones too would survive; root gets the bounding set and no more.
    prefix = ("setpriv", "--no-new-privs", "--bounding-set", f"-all,{names}", "--inh-caps", "-all")
    image = write_random(place / "source.img", 2 * MIB)
    source = hosts.start("source", {"vda": image}, prefix=prefix)
    destination = hosts.destination(prefix=prefix)
    assert source.migrate(destination.uri).exit_code == 0
    for line in Path(f"/proc/{source.pid}/status").read_text().splitlines():
        if line.startswith("CapBnd"):
            assert int(line.split()[1], 16).bit_count() == len(kept.split())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` is silent, and is not for a unit with a mistake."""

    def verify(text: str) -> str:
        unit = tmp_path / "fusemig@.service"
        # What it names must be there: the program, and the man page.
        text = text.replace("/opt/fusemig/bin/fusemig", sys.executable).replace("Documentation=man:", "# ")
        unit.write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    assert verify(UNIT.read_text()) == ""
    assert "WatchdogSecs" in verify(UNIT.read_text().replace("WatchdogSec=", "WatchdogSecs="))


def test_the_unit_keeps_the_mount_in_everybodys_sight() -> None:
    """No line of it makes a mount namespace: guests would not see the disks (systemd.exec(5))."""
    namespaced = [
        "PrivateTmp",
        "ProtectSystem",
        "ProtectHome",
        "ReadWritePaths",
        "ReadOnlyPaths",
        "InaccessiblePaths",
        "BindPaths",
        "TemporaryFileSystem",
        "PrivateDevices",
        "ProtectKernelTunables",
        "ProtectKernelModules",
        "ProtectKernelLogs",
        "ProtectControlGroups",
        "PrivateMounts",
        "ProtectProc",
        "RootDirectory",
        "DynamicUser",
        "StateDirectory",
    ]
    keys = {line.partition("=")[0] for line in UNIT.read_text().splitlines() if not line.startswith("#")}
    assert keys.isdisjoint(namespaced)
    assert {"Type", "WatchdogSec", "FileDescriptorStoreMax"} <= keys
