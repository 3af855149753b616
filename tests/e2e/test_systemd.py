"""The daemon as a service: what it tells its manager, and whether the shipped unit gives it what it needs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fusemig.succession.mount import why_not
from support.fd_store import StoringManager
from support.hosts import DEADLINE_S, MIB, is_mounted, pread, wait_until, write_random
from support.service_manager import Manager

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.hosts import Hosts

UNIT = Path(__file__).resolve().parents[2] / "tools" / "systemd" / "fusemig@.service"


SYSTEMD = Path("/lib/systemd/systemd")
BOOT = Path(__file__).resolve().parents[1] / "support" / "real_systemd.sh"


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
    wait_until(lambda: manager.has("STOPPING=1"), "STOPPING=1")
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


_GUEST = """
set -ex
systemctl start fusemig@disks
file=/run/fusemig/disks/disks/vda
fio --name=guest --filename=$file --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=8 --size=16m \\
    --rate_iops=700 --verify=crc32c --do_verify=1 --verify_fatal=1 --minimal &
fio=$!
for n in 1 2; do
    sleep 1
    pid=$(systemctl show -P MainPID fusemig@disks)
    systemctl kill --kill-whom=main --signal=SIGKILL fusemig@disks
    until [ "$(systemctl is-active fusemig@disks)" = active ] &&
        [ "$(systemctl show -P MainPID fusemig@disks)" != $pid ]
    do sleep 0.1; done
    ls $file
done
[ "$(systemctl show -P NRestarts fusemig@disks)" = 2 ]
wait $fio
systemctl stop fusemig@disks
! grep " /run/fusemig/disks/disks " /proc/self/mountinfo
"""


@pytest.mark.nightly
@pytest.mark.fuse
@pytest.mark.skipif(
    not SYSTEMD.exists() or os.geteuid() != 0 or why_not() != "", reason="needs systemd, root and Linux 6.9"
)
@pytest.mark.parametrize("keeps", [True, False], ids=["", "twin"])
def test_a_real_systemd_has_a_killed_daemon_succeeded(place: Path, *, keeps: bool) -> None:
    """The shipped unit: fio verifies across two SIGKILLs, the file keeps its name; not so where nothing is stored."""
    write_random(place / "vda.img", 16 * MIB)
    (place / "disks.toml").write_text(f'[[disk]]\nname = "vda"\npath = "{place}/vda.img"\n')
    (place / "guest.sh").write_text(_GUEST)
    text = UNIT.read_text().replace("/opt/fusemig/bin/fusemig", f"{sys.executable} -m fusemig")
    text = text.replace("/etc/fusemig/%i.toml", f"{place}/disks.toml")
    # No targets of the machine: this systemd starts what it is told to, and nothing else.
    text = text.replace("Wants=network-online.target", "DefaultDependencies=no").replace("After=", "#After=")
    if not keeps:
        text = text.replace("FileDescriptorStoreMax=256", "FileDescriptorStoreMax=0")
    (place / "units").mkdir()
    (place / "units" / UNIT.name).write_text(text)
    namespaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--ipc", "--uts"]
    done = subprocess.run(
        [*namespaces, "sh", BOOT, place], capture_output=True, text=True, check=False, timeout=100, cwd=UNIT.parents[2]
    )
    code, log = place / "code", place / "guest.log"
    assert code.exists(), done.stdout + done.stderr
    assert (code.read_text().strip() == "0") is keeps, log.read_text() + done.stdout


_WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
print(os.pwrite(fd, b"before", 4096), flush=True)
input()
try:
    print(os.pwrite(fd, b"during", 8192), flush=True)
except OSError as exc:
    print(exc.strerror, flush=True)
os._exit(0)
"""


@pytest.mark.fuse
@pytest.mark.skipif(why_not() != "", reason="needs Linux 6.9")
@pytest.mark.parametrize("gives_back", [True, False], ids=["", "twin"])
def test_a_manager_that_stores_descriptors_has_a_killed_daemon_succeeded(place: Path, *, gives_back: bool) -> None:
    """By systemd's protocol alone, without our holder; a manager that has dropped them leaves a dead mount."""
    image, mount, log = write_random(place / "vda.img", MIB), place / "mnt", place / "log"
    mount.mkdir()
    command = ["-m", "fusemig", "serve", mount, "--disk", f"vda={image}", "--control", place / "control"]
    # The guest is a process: of a file that is open here, every child process would close a copy, and wait for us.
    with closing(StoringManager(place / "notify", [sys.executable, *command], log)) as manager:
        manager.start()
        assert {"fuse", "fuse-init", "state"} <= {name for name, _ in manager.stored}, log.read_text()
        guest = subprocess.Popen(
            [sys.executable, "-c", _WRITER, mount / "vda"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert guest.stdout is not None
        assert guest.stdout.readline() == "6\n"
        assert manager.end(signal.SIGKILL) == -signal.SIGKILL
        if gives_back:
            assert guest.stdin is not None
            guest.stdin.write("\n")
            guest.stdin.flush()
            manager.start()
            assert guest.communicate(timeout=DEADLINE_S)[0] == "6\n", log.read_text()
            assert manager.end(signal.SIGTERM) == 0
            assert not {"fuse", "fuse-init", "state"} & {name for name, _ in manager.stored}
            assert not is_mounted(mount)
            assert [pread(image, 6, at) for at in (4096, 8192)] == [b"before", b"during"]
        else:
            manager.forget()
            out, _ = guest.communicate("\n", timeout=DEADLINE_S)
            assert "not connected" in out or "connection abort" in out
            subprocess.run(["umount", "--lazy", mount], check=True)
