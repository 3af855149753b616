"""A host loses power while it serves resiliently: what outlives a daemon there must not be taken for more than it is.

The host is real processes over a crash store: a file has reached its medium as it was when it was last flushed
(`RawDisk.flush`), and after a power loss holds that. Holder, daemon and the mount go at one moment; the next boot has
another id.
"""

from __future__ import annotations

import os
import shutil
import signal
from typing import TYPE_CHECKING

import pytest

from fusemig.disk.page import PAGE_SIZE
from fusemig.wire.native import FrameType
from support.heirs import ResilientHost
from support.hosts import MIB, pread, pwrite, wait_until, write_random
from support.proxy import Fault, FaultProxy
from support.resilient import has_fuse_open

if TYPE_CHECKING:
    from pathlib import Path

    from support.heirs import Installation
    from support.hosts import Hosts

pytestmark = pytest.mark.fuse

SIZE = 16 * MIB
CRASH_STORE = """
import shutil
from pathlib import Path
import fusemig.disk.allocation
from fusemig.disk.raw import RawDisk
from fusemig.disk.tracked import TrackedDisk
fusemig.disk.allocation._BOOT_ID = Path({boot!r})
def reach_the_medium(self):
    flush(self)
    if self.path == Path({image!r}):
        shutil.copyfile(self.path, f"{{self.path}}.medium")
flush, RawDisk.flush = RawDisk.flush, reach_the_medium
"""
SYNCS_NOTHING = "TrackedDisk.flush = lambda self: None\n"


class MortalHost(ResilientHost):
    """A resilient host that can lose power."""

    def __init__(self, place: Path, installation: Installation, extra: str = "") -> None:
        """Serve an image of random bytes, all on the medium; ``extra`` is code that breaks its daemons."""
        self._boot = place / "boot"
        self.boot(1)
        installation.install(CRASH_STORE.format(boot=str(self._boot), image=str(place / "vda.img")) + extra)
        self.image = write_random(place / "vda.img", SIZE)
        self.medium = place / "vda.img.medium"
        shutil.copyfile(self.image, self.medium)
        super().__init__("host", place / "host", {"vda": self.image})

    def boot(self, number: int) -> None:
        """Have the host's present boot be another one."""
        self._boot.write_text(f"boot {number}\n")

    def lose_power(self) -> None:
        """End every process at one moment, and keep of the image what is on the medium."""
        daemon = self.daemon
        os.kill(daemon, signal.SIGSTOP)  # it must not notice that its holder has gone
        os.kill(self.pid, signal.SIGKILL)
        os.kill(daemon, signal.SIGKILL)
        self.kill()
        wait_until(lambda: not has_fuse_open(daemon), "the daemon's end")
        shutil.copyfile(self.medium, self.image)


@pytest.mark.parametrize("is_next_boot", [True, False], ids=["", "twin"])
def test_after_a_power_loss_nothing_is_believed_but_what_is_durable(
    hosts: Hosts, place: Path, installation: Installation, *, is_next_boot: bool
) -> None:
    """What was fsynced is there, what was asked of the daemon is forgotten, and `--resume` compares contents.

    The map of written chunks is never synced: it knows nothing any more of the write that was fsynced, though its
    header is whole. The twin has the boot be the one before: the map is believed, the destination gets an old chunk.
    """
    host, destination = MortalHost(place, installation), hosts.destination()
    hosts.adopt(host)
    host.start()
    host.set_parameters(max_bandwidth=0, downtime_limit=1234)
    with FaultProxy(destination.uri) as proxy:
        proxy.arm(FrameType.DATA, Fault.STALL, nth=9)
        host.qmp.execute("migrate", {"uri": proxy.uri, "blk": True, "x-fusemig-reconnect": 600_000})
        assert proxy.struck.wait(40)
        proxy.is_barred = True
        pwrite(host.file(), b"synced", 3 * MIB, os.O_DSYNC)
        old = pread(host.image, 6, 4 * MIB)
        pwrite(host.file(), b"cached", 4 * MIB)
        assert pread(host.file(), 6, 4 * MIB) == b"cached"
        host.lose_power()
    destination.wait_free()
    dirty_map = place / "vda.img.fusemig-dirty"
    assert pread(dirty_map, 1, PAGE_SIZE) == b"\x18"  # chunks 3 and 4
    pwrite(dirty_map, bytes(PAGE_SIZE), PAGE_SIZE)
    host.boot(2 if is_next_boot else 1)
    host.start()
    assert pread(host.file(), 6, 3 * MIB) == b"synced"
    assert pread(host.file(), 6, 4 * MIB) == old
    assert "succession" not in host.status()
    assert "status" not in host.migration()
    assert host.qmp.execute("query-migrate-parameters")["downtime-limit"] == 300
    done = host.migrate(destination.uri, "--resume")
    assert done.exit_code == 0, done.stderr
    assert host.migration()["x-fusemig"]["kept-bytes"] > 0
    assert ("how=compare" in host.log()) is is_next_boot
    is_equal = host.image.read_bytes() == destination.images["vda"].read_bytes()
    assert is_equal is is_next_boot


def test_a_daemon_whose_fsync_does_nothing_is_noticed(hosts: Hosts, place: Path, installation: Installation) -> None:
    """The failing twin of what is durable."""
    host = MortalHost(place, installation, SYNCS_NOTHING)
    hosts.adopt(host)
    host.start()
    pwrite(host.file(), b"synced", 3 * MIB, os.O_DSYNC)
    host.lose_power()
    host.boot(2)
    host.start()
    assert pread(host.file(), 6, 3 * MIB) != b"synced"
