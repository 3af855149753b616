"""Without root: a user with nothing but fusermount3 serves disks, moves them and takes them over, in both lanes."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.hosts import DEADLINE_S, MIB, is_mounted, wait_until, write_random
from support.service_manager import Manager

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.hosts import Host, Hosts

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user; the other tests run as one then"),
]

NOBODY = 65534
DEVICE = Path("/dev/fuse")


class User:
    """Someone with no rights, and what is theirs."""

    def __init__(self, place: Path, hosts: Hosts, manager: Manager) -> None:
        """Make ``place`` theirs."""
        self.place = place
        self._hosts = hosts
        self._manager = manager
        os.chown(place, NOBODY, NOBODY)
        place.chmod(0o755)
        self.prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        if self._run(["-c", ""]).returncode:
            # The interpreter, or this tree, lies in somebody's home. Reading is all that this capability adds, and
            # fusermount3 does not inherit it.
            self.prefix += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
        assert self._run(["-c", "import fusemig"]).returncode == 0

    def _run(self, arguments: list[str]) -> subprocess.CompletedProcess[bytes]:
        command = [*self.prefix, sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, check=False, timeout=DEADLINE_S)

    def image(self, name: str, size: int) -> Path:
        """Give them an image."""
        image = write_random(self.place / name, size)
        os.chown(image, NOBODY, NOBODY)
        return image

    def make(self, name: str, image: Path, *options: object, **rest: Any) -> Host:
        """Prepare a daemon of theirs."""
        host = self._hosts.make(name, {"vda": image}, prefix=self.prefix, options=options, **rest)
        for directory in (host.directory, host.mount):
            os.chown(directory, NOBODY, NOBODY)
        return host

    def start(self, name: str, image: Path, *options: object, **rest: Any) -> Host:
        """Start one. Nobody else sees into its mount, root neither, so it says itself when it is ready."""
        self._manager.messages.clear()
        host = self.make(name, image, *options, **rest)
        host.launch()
        wait_until(lambda: self._manager.has("READY=1"), f"{name} ready: {host.log()}")
        return host

    def write(self, host: Host, data: bytes) -> int:
        """Write to a disk of theirs, durably; return the exit code."""
        code = f"import os; os.pwrite(os.open({str(host.file())!r}, os.O_WRONLY | os.O_DSYNC), {data!r}, 0)"
        return self._run(["-c", code]).returncode


@pytest.fixture
def user(place: Path, hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> Iterator[User]:
    """Give a user who may open /dev/fuse, as on any desktop; to one test at a time, for the device is everybody's."""
    with DEVICE.open("rb") as device:
        fcntl.flock(device, fcntl.LOCK_EX)
        mode = stat.S_IMODE(DEVICE.stat().st_mode)
        DEVICE.chmod(0o666)
        manager = Manager(place / "notify")
        monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
        monkeypatch.setenv("HOME", "/nonexistent")
        try:
            yield User(place, hosts, manager)
        finally:
            hosts.close()
            manager.close()
            DEVICE.chmod(mode)


@pytest.mark.parametrize("lane", ["data", pytest.param("pyfuse3", marks=pytest.mark.nightly)])
def test_a_user_moves_a_disk_between_two_daemons_of_theirs(user: User, lane: str) -> None:
    """Served, written, moved with every byte, written at the other side, and refused at this one; no mount is left."""
    source = user.start("source", user.image("source.img", 4 * MIB), "--lane", lane)
    destination = user.start("destination", user.place / "vda.img", "--lane", lane, incoming="tcp:127.0.0.1:0")
    assert user.write(source, b"before") == 0
    assert source.images["vda"].read_bytes()[:6] == b"before"
    with pytest.raises(PermissionError):
        source.file().stat()  # without allow_other a mount is its user's alone
    done = source.migrate(destination.uri)
    assert done.exit_code == 0, done.stderr
    assert source.images["vda"].read_bytes() == destination.images["vda"].read_bytes()
    assert destination.images["vda"].stat().st_uid == NOBODY
    assert user.write(destination, b"after") == 0
    assert destination.images["vda"].read_bytes()[:5] == b"after"
    assert user.write(source, b"after") != 0
    for host in (source, destination):
        assert host.stop() == 0
        assert not is_mounted(host.mount)


def test_what_only_root_may_is_refused_with_the_way_out(user: User) -> None:
    """--allow-other without user_allow_other: exit code 3 before anything is mounted."""
    if "\nuser_allow_other" in Path("/etc/fuse.conf").read_text():
        pytest.skip("here users may use allow_other")
    host = user.make("source", user.image("source.img", MIB), "--allow-other")
    host.launch()
    assert host.wait() == 3
    assert "user_allow_other" in host.log()
    assert not is_mounted(host.mount)


def test_a_user_without_the_helper_is_told_to_install_it(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: nothing mounts without fusermount3, and nothing is left behind."""
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    user.prefix[0] = setpriv
    image = user.image("source.img", MIB)
    monkeypatch.setenv("PATH", "/nonexistent")
    host = user.make("source", image)
    host.launch()
    assert host.wait() == 3
    assert "install the package fuse3" in host.log()
