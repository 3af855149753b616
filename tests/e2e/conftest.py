"""Fixtures for end-to-end tests: no test leaves a mount, a process or a loop device behind, also when it fails."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.heirs import Installation
from support.hosts import Hosts, wait_until
from support.loops import loops_of, run

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMORY = Path("/dev/shm")  # noqa: S108  # images there are quick and as sparse as anywhere
NEEDED_BYTES = 2 << 30
ENDING_S = 5.0
"""What ends by itself has this long for it; what was forgotten never does.

That is what ends with its parent (`nbdkit --exit-with-parent`), and a loop device that was detached while somebody else
looked for a free one.
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Give a directory for everything of one test, in memory where there is enough of it."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no access to /dev/fuse")
    is_roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > NEEDED_BYTES
    directory = Path(tempfile.mkdtemp(prefix="fusemig-e2e-", dir=MEMORY)) if is_roomy else tmp_path
    try:
        yield directory
    finally:
        left = _clear_away(directory)
        shutil.rmtree(directory)
    if left:
        pytest.fail("the test left behind: " + ", ".join(left))


@pytest.fixture
def hosts(place: Path) -> Iterator[Hosts]:
    """Make hosts; at the end all are stopped and none may have misbehaved."""
    hosts = Hosts(place)
    try:
        yield hosts
    finally:
        problems = hosts.close()
    if problems:
        pytest.fail("\n".join(problems))


@pytest.fixture
def installation(place: Path, monkeypatch: pytest.MonkeyPatch) -> Installation:
    """Give the hosts of the test an installation of their own."""
    made = Installation(place / "site")
    monkeypatch.setenv("PYTHONPATH", str(made.directory))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # two versions within a second would be one to the cache
    return made


def _clear_away(directory: Path) -> list[str]:
    """Remove what a test left in the kernel; name it."""
    left = []
    deadline = time.monotonic() + ENDING_S
    while (_processes_of(directory) or loops_of(directory)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in _processes_of(directory):
        left.append(f"process {pid}")
        os.kill(pid, signal.SIGKILL)
    for mount in reversed(_mounts_under(directory)):
        left.append(f"mount {mount}")
        run("umount", "-l", mount, check=False)
    for device in loops_of(directory):
        run("losetup", "--detach", device, check=False)
        left.append(f"loop device {device}")
    wait_until(lambda: not _processes_of(directory), "the end of what was killed")
    return left


def _processes_of(directory: Path) -> list[int]:
    """Return the processes that name this test's own directory on their command line."""
    needle = os.fsencode(directory)
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if needle in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it has ended
    return found


def _mounts_under(directory: Path) -> list[str]:
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [mount for mount in mounts if mount.startswith(f"{directory}/")]
