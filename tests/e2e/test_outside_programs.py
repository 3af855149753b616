"""Programs that know nothing of fusemig use a disk before, during and after its migration."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from support.hosts import MIB, wait_until, write_random
from support.loops import check_ext4, loop_device, mounted, run

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Hosts

pytestmark = pytest.mark.fuse


def test_nbdkit_and_nbdcopy_read_the_mount_on_both_sides(hosts: Hosts, place: Path) -> None:
    """An NBD server on the file of the mount gives the image, while it migrates and afterwards."""
    source, destination = hosts.pair(8 * MIB)
    expected = source.images["vda"].read_bytes()
    source.migrate_to_pause(destination.uri)
    for number, host in enumerate([source, destination]):
        copy = place / f"copy{number}"
        run("nbdcopy", "--", "[", "nbdkit", "--exit-with-parent", "file", host.file(), "]", copy)
        assert copy.read_bytes() == expected
        if host is source:
            source.proceed()
            source.wait_phase("completed")


def test_nbdcopy_writes_through_the_mount_during_a_migration(hosts: Hosts, place: Path) -> None:
    """Flushed through NBD before the switchover, there after it."""
    source, destination = hosts.pair(8 * MIB)
    other = write_random(place / "other.img", 8 * MIB, seed=9)
    source.migrate_to_pause(destination.uri)
    run("nbdcopy", "--flush", other, "--", "[", "nbdkit", "--exit-with-parent", "file", source.file(), "]")
    source.proceed()
    source.wait_phase("completed")
    assert destination.images["vda"].read_bytes() == other.read_bytes()


@pytest.mark.qemu
@pytest.mark.parametrize(
    "engine", [["-t", "none", "-i", "native"], ["-t", "none", "-i", "io_uring"], ["-i", "threads"]]
)
def test_qemu_ios_patterns_arrive(hosts: Hosts, engine: list[str]) -> None:
    """Patterns, zeroes and FUA writes that QEMU's block layer made during a migration."""
    source, destination = hosts.pair(8 * MIB)
    source.migrate_to_pause(destination.uri)
    writes = ["write -f -P 0x5a 1M 64k", "write -z 2M 64k", "write -P 0xa5 4095k 1536k", "flush"]
    run("qemu-io", "-f", "raw", *engine, *(f"-c{command}" for command in writes), source.file())
    source.proceed()
    source.wait_phase("completed")
    reads = ["read -P 0x5a 1M 64k", "read -P 0 2M 64k", "read -P 0xa5 4095k 1536k"]
    for options in (engine, ["-r", *engine]):
        said = run("qemu-io", "-f", "raw", *options, *(f"-c{command}" for command in reads), destination.file())
        assert "Pattern verification failed" not in said
        assert said.count("read ") == len(reads)


@pytest.mark.qemu
def test_a_qcow2_inside_the_disk_is_whole(hosts: Hosts, place: Path) -> None:
    """The disk holds an image of another format, written through the mount by qemu-img while it migrates."""
    payload = write_random(place / "payload.img", 4 * MIB, seed=4)
    source, destination = hosts.pair(16 * MIB)
    source.migrate_to_pause(destination.uri)
    qcow2 = place / "payload.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", payload, qcow2)
    run("dd", f"if={qcow2}", f"of={source.file()}", "bs=64k", "conv=notrunc,fsync")
    source.proceed()
    source.wait_phase("completed")
    run("qemu-img", "check", "-f", "qcow2", destination.file())
    assert "Images are identical." in run(
        "qemu-img", "compare", "-f", "qcow2", "-F", "raw", destination.file(), payload
    )


_COMMITTER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode=WAL")
connection.execute("PRAGMA synchronous=FULL")
connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, filler BLOB)")
number = 0
while True:
    number += 1
    connection.execute("INSERT INTO t VALUES (?, randomblob(500))", [number])
    print(number, flush=True)  # acknowledged: kept outside of the disk
"""


def test_every_commit_that_sqlite_acknowledged_is_at_the_destination(hosts: Hosts, place: Path) -> None:
    """A WAL database on ext4 on a loop device on the mount commits until the switchover stops it."""
    source, destination = hosts.pair(48 * MIB)
    acknowledged = place / "acknowledged"
    with loop_device(source.file()) as device:
        run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", device)
        with mounted(device, place / "fs") as root, acknowledged.open("wb") as counter:
            committer = subprocess.Popen(
                [sys.executable, "-c", _COMMITTER, root / "t.db"], stdout=counter, stderr=subprocess.PIPE, text=True
            )
            try:
                wait_until(lambda: acknowledged.stat().st_size > 100, "the first commits")
                assert source.migrate(destination.uri, "--downtime-limit", "2s").exit_code == 0
                _, said = committer.communicate(timeout=40)
            finally:
                committer.kill()
                committer.wait()
            assert "sqlite3.OperationalError" in said
    last = int(acknowledged.read_text().split("\n")[-2])
    with loop_device(destination.file()) as device:
        with mounted(device, place / "fs") as root:
            connection = sqlite3.connect(root / "t.db")
            try:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                ids = [row[0] for row in connection.execute("SELECT id FROM t ORDER BY id")]
                connection.execute("INSERT INTO t VALUES (?, 'at home here')", [ids[-1] + 1])
                connection.commit()
            finally:
                connection.close()
        check_ext4(device)
    # One commit more may have become durable without its acknowledgement.
    assert ids == list(range(1, len(ids) + 1))
    assert last <= len(ids) <= last + 1


def test_qmp_shell_drives_a_migration(hosts: Hosts) -> None:
    """QEMU's own shell: query-block, migrate, query-migrate until it is over."""
    pytest.importorskip("qemu.qmp")
    source, destination = hosts.pair(4 * MIB)

    def shell(*lines: str) -> list[dict[str, object]]:
        done = subprocess.run(
            [sys.executable, "-m", "qemu.qmp.qmp_shell", str(source.control)],
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            text=True,
            check=False,
            timeout=40,
        )
        assert done.returncode == 0, done.stderr
        assert "Connected to QEMU" in done.stdout
        answers = [line.split("(QEMU) ")[-1] for line in done.stdout.splitlines()]
        return [json.loads(line) for line in answers if line.startswith("{")]

    (block, started) = shell("query-block", f"migrate uri={destination.uri} blk=true")
    disk = block["return"][0]  # type: ignore[index]
    assert disk["device"] == "vda"
    assert disk["inserted"]["image"]["virtual-size"] == 4 * MIB
    assert started == {"return": {}}
    source.wait_phase("completed")
    (status, refused) = shell("query-migrate", f"migrate uri={destination.uri} blk=true")
    assert status["return"]["status"] == "completed"  # type: ignore[index]
    assert "nothing to migrate" in refused["error"]["desc"]  # type: ignore[index]
    assert destination.images["vda"].read_bytes() == source.images["vda"].read_bytes()
