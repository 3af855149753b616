"""File systems that check themselves, on a disk that moves while it is written (nightly: each takes half a minute)."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from support.hosts import MIB, wait_until
from support.loops import loop_device, mounted, run

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = [pytest.mark.fuse, pytest.mark.nightly, pytest.mark.timeout(300)]

SIZE = 320 * MIB
"""The least that mkfs.xfs takes is 300 MiB."""


def sparse_pair(hosts: Hosts, place: Path) -> tuple[Host, Host]:
    """Start a source with an empty disk, and a destination."""
    image = place / "source.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    return hosts.start("source", {"vda": image}), hosts.destination()


def work(root: Path, seconds: int) -> subprocess.Popen[bytes]:
    """Start stress-ng, which reads back and verifies what it writes."""
    stressors = ["--hdd", "1", "--hdd-bytes", "8m", "--hdd-opts", "wr-rnd,dsync", "--iomix", "1", "--iomix-bytes", "4m"]
    return subprocess.Popen(
        ["stress-ng", *stressors, "--sync-file", "1", "--verify", "--temp-path", root, "-t", f"{seconds}s"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_busy_file_system_moves_whole(hosts: Hosts, place: Path, kind: str) -> None:
    """stress-ng verifies during the passes; after the switch the file system's own checker finds nothing."""
    source, destination = sparse_pair(hosts, place)
    make = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"], "btrfs": ["mkfs.btrfs", "-q", "-f"]}
    with loop_device(source.file()) as device:
        run(*make[kind], device)
        with mounted(device, place / "fs", kind) as root:
            stress = work(root, 8)
            try:
                source.migrate_to_pause(destination.uri)
                output, _ = stress.communicate(timeout=60)
            finally:
                if stress.poll() is None:
                    stress.terminate()
                    stress.wait(30)
            assert stress.returncode == 0, output.decode()
            kept = {path.name: path.read_bytes() for path in _write_files(root)}
    source.proceed()
    source.wait_phase("completed")
    with loop_device(destination.file()) as device:
        with mounted(device, place / "fs", kind) as root:
            if kind == "btrfs":
                assert "no errors found" in run("btrfs", "scrub", "start", "-B", root)
            for name, content in kept.items():
                assert (root / name).read_bytes() == content
        check = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check", "--readonly"]}
        run(*check[kind], device)
    assert source.stop() == 0
    assert destination.stop() == 0


def _write_files(root: Path) -> list[Path]:
    paths = [root / f"kept{number}" for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * (number * 10_000))
    return paths


def test_a_spoiled_btrfs_is_found(hosts: Hosts, place: Path) -> None:
    """The failing twin: the checker does see one byte that is not what was written."""
    source, _ = sparse_pair(hosts, place)
    with loop_device(source.file()) as device:
        run("mkfs.btrfs", "-q", "-f", device)
        with mounted(device, place / "fs", "btrfs") as root:
            (root / "file").write_bytes(b"needle" * 100_000)
        wait_until(lambda: b"needle" * 100 in source.images["vda"].read_bytes(), "the file's bytes in the image")
    content = source.images["vda"].read_bytes()
    with source.images["vda"].open("r+b") as file:
        file.seek(content.index(b"needle" * 100) + 4096)
        file.write(b"N")
    assert source.stop() == 0
    with loop_device(source.images["vda"]) as device, mounted(device, place / "fs", "btrfs") as root:
        assert "no errors found" not in run("btrfs", "scrub", "start", "-B", root, check=False)
