"""The write-back cache between two daemons: what was synced arrives, and what the kernel held at the switchover."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from support.hosts import MIB, Hosts, pread

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.fuse


@pytest.fixture(params=["pyfuse3", "data"])
def hosts(request: pytest.FixtureRequest, mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """Make hosts whose mounts have the write-back cache; at the end all are stopped."""
    monkeypatch.setenv("FUSEMIG_SERVE_CACHE", "writeback")
    monkeypatch.setenv("FUSEMIG_SERVE_LANE", request.param)
    hosts = Hosts(mountpoint.parent)
    try:
        yield hosts
    finally:
        problems = hosts.close()
    if problems:
        pytest.fail("\n".join(problems))


def test_cached_writes_arrive_and_later_ones_are_refused_at_the_sync(hosts: Hosts) -> None:
    """Pages held when the disk is frozen are pushed out before; the writer who goes on learns of it from fsync."""
    source, destination = hosts.pair(4 * MIB)
    image = source.images["vda"]
    fd = os.open(source.file(), os.O_RDWR)
    try:
        os.pwrite(fd, b"synced", 0)
        os.fsync(fd)
        assert pread(image, 6, 0) == b"synced"
        source.migrate_to_pause(destination.uri)
        os.pwrite(fd, b"held by the kernel", MIB)
        assert pread(image, 18, MIB) != b"held by the kernel"
        source.proceed()
        source.wait_phase("completed")
        destination.wait_phase("completed")
        assert pread(destination.file(), 6, 0) == b"synced"
        assert pread(destination.file(), 18, MIB) == b"held by the kernel"
        assert os.stat(destination.file()).st_size == 4 * MIB  # the kernel had seen it empty
        assert os.pwrite(fd, b"too late", 2 * MIB) == 8
        with pytest.raises(OSError, match=r".") as refused:
            os.fsync(fd)
        assert refused.value.errno == errno.EROFS
    finally:
        os.close(fd)
    with open(destination.file(), "r+b") as file:
        file.write(b"goes on there")
        os.fsync(file.fileno())
    assert pread(destination.images["vda"], 13, 0) == b"goes on there"
