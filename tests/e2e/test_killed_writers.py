"""A writer that is killed while its write is parked, and the daemon with it: nothing waits, nothing comes late."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from support.hosts import pread, wait_until
from support.resilient import WRITE, WRITE_DIRECT, Background, daemon_of, has_fuse_open, n_served, start

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Hosts

pytestmark = pytest.mark.fuse

_DEAF = """
import sys
from fusemig.fuse.lane_changes import Changes
from fusemig.cli import main
Changes.interrupt = lambda self, unique: None
del sys.argv[1:4]
main()
"""
BLOCK = 4096
WRITERS = {"direct": (WRITE_DIRECT, (2 * BLOCK,)), "cached": (WRITE, ("parked", 2 * BLOCK))}


@pytest.mark.parametrize(
    ("kind", "killed", "is_deaf"),
    [
        ("direct", "before", False),
        ("direct", "between", False),
        ("cached", "between", False),
        ("direct", "between", True),
    ],
)
def test_a_killed_writers_write_is_neither_waited_for_nor_made(
    hosts: Hosts, place: Path, kind: str, killed: str, *, is_deaf: bool
) -> None:
    """Killed before its daemon died, or while there was none: it ends at the closed gate, and `cont` makes nothing.

    What another writer was answered for the same block after that stays: no older write comes over it. The twin does
    not hear that a writer is killed: it waits until `cont`, and is then made.
    """
    script = place / "deaf.py"
    script.write_text(_DEAF)
    host = start(hosts, prefix=[sys.executable, script]) if is_deaf else start(hosts)
    code, arguments = WRITERS[kind]
    old = pread(host.images["vda"], BLOCK, 2 * BLOCK)
    host.qmp.execute("stop")
    writer = Background(code, host.file(), *arguments)
    wait_until(lambda: host.status()["parked-writes"], "the parked write")
    daemon, before = daemon_of(host), n_served(host)
    host.forget_qmp()
    if killed == "before":
        os.kill(daemon, signal.SIGSTOP)  # it does not come to answer
        writer.process.kill()
        os.kill(daemon, signal.SIGKILL)
    else:
        os.kill(host.pid, signal.SIGSTOP)  # no successor yet
        os.kill(daemon, signal.SIGKILL)
        wait_until(lambda: not has_fuse_open(daemon), "the daemon's end")
        writer.process.kill()
        os.kill(host.pid, signal.SIGCONT)
    wait_until(lambda: n_served(host) > before, "a successor")
    if is_deaf:
        with pytest.raises(subprocess.TimeoutExpired):
            writer.process.wait(0.5)
        host.qmp.execute("cont")
        assert writer.finish() == ""
        wait_until(lambda: pread(host.images["vda"], BLOCK, 2 * BLOCK) != old, "the late write")
        return
    assert writer.finish() == ""
    assert writer.process.returncode == -signal.SIGKILL
    wait_until(lambda: not host.status()["parked-writes"], "its place")
    host.qmp.execute("cont")
    fd = os.open(host.file(), os.O_RDWR | os.O_DIRECT)
    try:
        page = mmap.mmap(-1, BLOCK)
        os.preadv(fd, [page], 2 * BLOCK)
        assert page[:] == old  # never made
        page[:5] = b"after"
        assert os.pwrite(fd, page, 2 * BLOCK) == BLOCK
        os.fdatasync(fd)
    finally:
        os.close(fd)
    assert pread(host.file(), BLOCK, 2 * BLOCK)[:5] == b"after"
    assert host.stop() == 0
    assert pread(host.images["vda"], 5, 2 * BLOCK) == b"after"
