"""A disk that is being written moves, and the destination holds every byte that was acknowledged."""

from __future__ import annotations

import errno
import filecmp
import itertools
import mmap
import os
import random
import struct
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from support.hosts import MIB, pread, pwrite, wait_until, write_random
from support.loops import check_ext4, loop_device, mounted, run

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse

BLOCK = 4096


def fio(path: Path, *options: str) -> list[str]:
    """Return a fio command that writes (or verifies) 4 KiB blocks at random places of a file."""
    return [
        "fio",
        "--name=v",
        f"--filename={path}",
        "--size=16m",
        "--rw=randwrite",
        "--bs=4k",
        "--ioengine=libaio",
        "--direct=1",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--randseed=7",
        "--allow_file_create=0",
        *options,
    ]


def finish(source: Host, destination: Host, *disks: str) -> None:
    """End both daemons and see that the images are equal."""
    assert source.stop() == 0
    assert destination.stop() == 0
    for disk in disks or ("vda",):
        assert filecmp.cmp(source.images[disk], destination.images[disk], shallow=False)


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("lane", "streams"),
    [("auto", 1), *(pytest.param(lane, 4, marks=pytest.mark.nightly) for lane in ("data", "pyfuse3"))],
)
def test_what_fio_wrote_during_a_migration_verifies_at_the_destination(hosts: Hosts, lane: str, streams: int) -> None:
    """Fio's random writes run while the bulk phase does; afterwards fio finds all of them on the other mount."""
    image = write_random(hosts.directory / "source.img", 24 * MIB)
    source = hosts.start("source", {"vda": image}, options=["--lane", lane])
    destination = hosts.destination(options=["--lane", lane])
    source.pause_before_switchover()
    source.set_parameters(max_bandwidth=MIB)  # the bulk phase outlasts the writes
    migrate = source.start_migrate(destination.uri, "--streams", streams)
    source.wait_phase("bulk")
    run(*fio(source.file(), "--do_verify=0"))
    source.set_parameters(max_bandwidth=0)
    info = source.wait_phase("pre-switchover")
    assert info["x-fusemig"]["bytes-dirtied"] > 0
    assert info["disk"]["dirty-sync-count"] > 1
    assert source.command("continue").exit_code == 0
    assert migrate.finish().exit_code == 0
    run(*fio(destination.file(), "--verify_only"))
    assert source.stop() == 0
    assert destination.stop() == 0
    same = run("qemu-img", "compare", "-f", "raw", "-F", "raw", source.images["vda"], destination.images["vda"])
    assert same == "Images are identical.\n"


@pytest.mark.qemu
def test_fio_that_never_stops_meets_the_switchover_as_a_read_only_file_system(hosts: Hosts) -> None:
    """A writer that goes on gets EROFS at hand-off, and the images are identical from then on."""
    source, destination = hosts.pair(24 * MIB)
    command = fio(source.file(), "--verify=0", "--time_based", "--runtime=80", "--rate=16m")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as writer:
        try:
            wait_until(lambda: source.disk()["dirty-bytes"] > 0, "fio's first write")
            assert source.migrate(destination.uri, "--downtime-limit", "2s").exit_code == 0
            said, _ = writer.communicate(timeout=40)
        finally:
            writer.kill()
    assert writer.returncode == 1
    assert "error=Read-only file system" in said
    assert source.migration()["x-fusemig"]["bytes-dirtied"] > 0
    assert source.stop() == 0
    assert destination.stop() == 0
    same = run("qemu-img", "compare", "-f", "raw", "-F", "raw", source.images["vda"], destination.images["vda"])
    assert same == "Images are identical.\n"


class Counter:
    """A guest that writes ever higher numbers, with O_DSYNC, until it cannot; knows what was acknowledged."""

    def __init__(self, path: Path, n_blocks: int) -> None:
        self.acknowledged: dict[int, int] = {}
        self.error = 0
        self._path = path
        self._n_blocks = n_blocks
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        places = random.Random(3)
        fd = os.open(self._path, os.O_WRONLY | os.O_DSYNC)
        try:
            for number in itertools.count(1):
                block = places.randrange(self._n_blocks)
                os.pwrite(fd, struct.pack("<Q", number) * (BLOCK // 8), block * BLOCK)
                self.acknowledged[block] = number
        except OSError as exc:
            self.error = exc.errno or 0
        finally:
            os.close(fd)

    def wait(self) -> int:
        """Wait until it was stopped; return the errno that did it."""
        self._thread.join(40)
        assert not self._thread.is_alive()
        return self.error


def test_acknowledged_synchronous_writes_are_at_the_destination(hosts: Hosts) -> None:
    """Every O_DSYNC write that returned before the switchover is there; the first that did not got EROFS."""
    source, destination = hosts.pair(16 * MIB)
    writer = Counter(source.file(), 16 * MIB // BLOCK)
    wait_until(lambda: len(writer.acknowledged) > 100, "the writer's first blocks")
    assert source.migrate(destination.uri, "--downtime-limit", "2s").exit_code == 0
    assert writer.wait() == errno.EROFS
    with destination.file().open("rb") as file:
        for block, number in writer.acknowledged.items():
            file.seek(block * BLOCK)
            assert file.read(BLOCK) == struct.pack("<Q", number) * (BLOCK // 8)
    finish(source, destination)


def test_an_ext4_that_was_written_during_the_migration_is_clean(hosts: Hosts, place: Path) -> None:
    """ext4 on a loop device on the mount, busy until the pause, unmounted before the switch: clean without a repair."""
    source, destination = hosts.pair(48 * MIB)
    with loop_device(source.file()) as device:
        run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", device)
        with mounted(device, place / "fs") as root:
            source.pause_before_switchover()
            source.set_parameters(max_bandwidth=2 * MIB)
            source.start_migrate(destination.uri)
            source.wait_phase("bulk")
            content = random.Random(1).randbytes(200_000)
            for number in range(40):
                write_synced(root / f"file{number}", content[number:])
            source.set_parameters(max_bandwidth=0)
    source.wait_phase("pre-switchover")
    source.proceed()
    source.wait_phase("completed")
    check_ext4(destination.file())
    with (
        loop_device(destination.file()) as device,
        mounted(device, place / "fs", options="ro") as root,
    ):
        for number in range(40):
            assert (root / f"file{number}").read_bytes() == content[number:]
    finish(source, destination)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and its name durably."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def test_an_ext4_that_is_busy_at_the_switchover_loses_nothing_acknowledged(hosts: Hosts, place: Path) -> None:
    """The writer is stopped by the switchover; its journal replays there and every fsynced file is whole."""
    source, destination = hosts.pair(48 * MIB)
    acknowledged: list[int] = []
    content = random.Random(2).randbytes(9_000)

    def write_files(root: Path) -> None:
        try:
            for number in itertools.count():
                write_synced(root / f"file{number}", content[number % 1000 :])
                acknowledged.append(number)
        except OSError:
            return  # the disk lives elsewhere now

    with loop_device(source.file()) as device:
        run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", device)
        with mounted(device, place / "fs") as root:
            writer = threading.Thread(target=write_files, args=[root], daemon=True)
            writer.start()
            wait_until(lambda: len(acknowledged) > 20, "the writer's first files")
            assert source.migrate(destination.uri, "--downtime-limit", "2s").exit_code == 0
            writer.join(40)
            assert not writer.is_alive()
    with loop_device(destination.file()) as device:
        with mounted(device, place / "fs") as root:
            for number in acknowledged:
                assert (root / f"file{number}").read_bytes() == content[number % 1000 :]
        check_ext4(device)
    assert source.stop() == 0
    assert destination.stop() == 0


def test_small_writes_cost_what_they_wrote(hosts: Hosts, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1,000 random 4 KiB writes into a clean 1 GiB disk cost about 4 MiB of the wire: not 1 GiB, not 1,000 chunks."""
    image = place / "source.img"
    with image.open("wb") as file:
        for at in range(0, 1024, 16):  # data here and there: writes meet chunks that were sent, and holes
            file.seek(at * MIB)
            file.write(random.Random(at).randbytes(MIB))
        file.truncate(1024 * MIB)
    source, destination = hosts.start("source", {"vda": image}), hosts.destination()
    source.migrate_to_pause(destination.uri)
    before = source.migration()
    places = random.Random(5)
    with source.file().open("r+b", buffering=0) as file:
        for block in places.sample(range(1024 * MIB // BLOCK), 1000):
            file.seek(block * BLOCK)
            file.write(places.randbytes(BLOCK))
    source.proceed()
    after = source.wait_phase("completed")
    wire = after["x-fusemig"]["wire-bytes"] - before["x-fusemig"]["wire-bytes"]
    dirtied = 1000 * BLOCK
    with capsys.disabled():
        print(f"\n1,000 random 4 KiB writes: {wire} bytes sent for {dirtied} bytes dirtied ({wire / dirtied:.3f})")
    assert dirtied <= wire <= 1.25 * dirtied
    # A block that was taken while its write was under way is marked, and sent, once more.
    assert dirtied <= after["x-fusemig"]["bytes-dirtied"] <= wire
    finish(source, destination)


def test_stores_through_mmap_are_pushed_out_before_the_switch(hosts: Hosts) -> None:
    """What a guest stored in a mapping, and never synced, is at the destination."""
    source, destination = hosts.pair(8 * MIB)
    source.migrate_to_pause(destination.uri)
    fd = os.open(source.file(), os.O_RDWR)
    try:
        with mmap.mmap(fd, 8 * MIB) as pages:
            for at in range(0, 8 * MIB, MIB):
                pages[at + 100 : at + 105] = b"store"
            source.proceed()
            source.wait_phase("completed")
            for at in range(0, 8 * MIB, MIB):
                assert pread(destination.file(), 5, at + 100) == b"store"
    finally:
        os.close(fd)
    finish(source, destination)


def test_an_early_reader_sees_the_final_bytes_after_take_over(hosts: Hosts, place: Path) -> None:
    """The destination's file can be opened and read early, a write gets EROFS; afterwards no page of it is stale."""
    image = write_random(place / "source.img", 8 * MIB, seed=1)
    stale = write_random(place / "destination.img", 8 * MIB, seed=2)
    source = hosts.start("source", {"vda": image})
    destination = hosts.start("destination", {"vda": stale}, incoming="tcp:127.0.0.1:0")
    fd = os.open(destination.file(), os.O_RDWR)
    try:
        with mmap.mmap(fd, 8 * MIB, prot=mmap.PROT_READ) as pages:
            assert os.pread(fd, 8 * MIB, 0) == stale.read_bytes()
            assert bytes(pages[:100]) == stale.read_bytes()[:100]
            with pytest.raises(OSError, match="Read-only file system") as refused:
                os.pwrite(fd, b"too early", 0)
            assert refused.value.errno == errno.EROFS
            source.migrate_to_pause(destination.uri)
            os.pread(fd, 8 * MIB, 0)  # cached once more, with the bulk phase's bytes
            pwrite(source.file(), b"the last word", 3 * MIB)
            source.proceed()
            source.wait_phase("completed")
            final = image.read_bytes()
            assert final[3 * MIB :].startswith(b"the last word")
            assert os.pread(fd, 8 * MIB, 0) == final
            assert bytes(pages) == final
            assert os.pwrite(fd, b"now it is ours", 0) == 14
            assert os.pread(fd, 14, 0) == b"now it is ours"
    finally:
        os.close(fd)


def test_a_reader_of_a_disk_still_to_come_sees_it_grow_to_its_size(hosts: Hosts) -> None:
    """A destination's file without an image is empty; once its source has come it has the source's size."""
    source, destination = hosts.pair(5 * MIB)
    assert destination.file().stat().st_size == 0
    fd = os.open(destination.file(), os.O_RDWR)
    try:
        assert os.pread(fd, 100, 0) == b""
        assert source.migrate(destination.uri).exit_code == 0
        assert os.fstat(fd).st_size == 5 * MIB
        assert os.pread(fd, 5 * MIB, 0) == source.images["vda"].read_bytes()
        os.pwrite(fd, b"mine", 5 * MIB - 4)
    finally:
        os.close(fd)
