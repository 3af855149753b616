"""Fixtures for tests with real mounts: no test leaves one behind, also when it fails."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


def is_mounted(path: Path) -> bool:
    """Tell from the kernel's table, without asking the file system itself."""
    return any(line.split()[4] == str(path) for line in Path("/proc/self/mountinfo").read_text().splitlines())


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """Give an empty directory; afterwards nothing may be mounted there."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no access to /dev/fuse")
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    if is_mounted(path):
        subprocess.run(["fusermount3", "-u", "-z", path], check=False, timeout=10)
        pytest.fail("the test left its mount behind")
