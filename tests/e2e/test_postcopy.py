"""Post-copy with real daemons: the destination's guest runs at once, and what is missing comes when it is needed."""

from __future__ import annotations

import errno
import filecmp
import mmap
import os
import random
import socket
import subprocess
import sys
import threading
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from fusemig.records.epoch import EpochFile, Ownership
from fusemig.wire import native
from fusemig.wire.native import FrameType
from support.hosts import MIB, QmpRefusedError, pread, pwrite, reserved_port, wait_until, write_random
from support.loops import check_ext4, loop_device, mounted, run
from support.proxy import Fault, FaultProxy

if TYPE_CHECKING:
    from pathlib import Path

    from fusemig.records.epoch import EpochRecord
    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse

SIZE = 24 * MIB + 4096 + 512


def loan_map(host: Host) -> Path:
    image = host.images["vda"]
    return image.with_name(f"{image.name}.fusemig-loan")


FENCED = "--i-have-fenced-the-other"
HOT = b"hot".ljust(MIB, b"!")
SECTOR = b"cut".ljust(512, b"!")


def write_sector(path: Path, offset: int) -> None:
    """Write a part of a block past the page cache."""
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        with closing(mmap.mmap(-1, 4096)) as buffer, memoryview(buffer) as view:
            view[:512] = SECTOR
            assert os.pwrite(fd, view[:512], offset) == 512
    finally:
        os.close(fd)


class Reader:
    """A read of a sector past the page cache, in a thread, because it may have to wait.

    Through the cache its page would be locked for so long, and whoever opens the file meanwhile might wait for that.
    """

    def __init__(self, path: Path, length: int, offset: int) -> None:
        self.result: bytes | OSError | None = None
        self._thread = threading.Thread(target=self._read, args=(path, length, offset), daemon=True)
        self._thread.start()

    def _read(self, path: Path, length: int, offset: int) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                with closing(mmap.mmap(-1, 4096)) as buffer, memoryview(buffer) as view:
                    os.preadv(fd, [view[:length]], offset)
                    self.result = bytes(view[:length])
            finally:
                os.close(fd)
        except OSError as error:
            self.result = error

    def join(self) -> bytes | OSError | None:
        self._thread.join(30)
        return self.result


@pytest.mark.parametrize("lane", ["data", "pyfuse3"])
def test_everything_comes(hosts: Hosts, place: Path, lane: str) -> None:
    """The whole image, of which nothing was sent before the hand-off; holes stay holes."""
    image = write_random(place / "a.img", SIZE)
    with image.open("r+b") as file:
        os.truncate(file.fileno(), SIZE + 64 * MIB)
    source = hosts.start("source", {"vda": image}, options=["--lane", lane])
    destination = hosts.destination(options=["--lane", lane])
    events = destination.qmp
    done = source.migrate(destination.uri, "--mode", "postcopy")
    assert done.exit_code == 0, done.stderr
    assert source.disk()["state"] == "released"
    assert destination.disk()["state"] == "owner"
    info = source.migration()
    assert info["x-fusemig"]["mode"] == "postcopy"
    assert info["disk"]["remaining"] == 0
    assert info["disk"]["transferred"] > SIZE
    pwrite(destination.file(), b"mine", SIZE)
    with pytest.raises(OSError, match="Read-only"):
        pwrite(source.file(), b"not mine")
    assert not loan_map(destination).exists()
    destination.status()
    names = events.event_names()
    assert names.count("RESUME") == 1
    assert destination.stop() == 0
    assert source.stop() == 0
    assert image.stat().st_blocks * 512 < SIZE + MIB
    assert destination.images["vda"].stat().st_blocks * 512 < SIZE + MIB
    with destination.images["vda"].open("r+b") as file:
        file.seek(SIZE)
        file.write(bytes(4))
    assert filecmp.cmp(image, destination.images["vda"], shallow=False)


def interrupted(
    hosts: Hosts, place: Path, proxy: FaultProxy, destination: Host, n_frames: int = 6, hot_at: int | None = None
) -> Host:
    """Hand over, and lose the connection for good when a few pieces have been fetched; return the source."""
    image = write_random(place / "a.img", SIZE)
    source = hosts.start("source", {"vda": image})
    options = ["--mode", "postcopy"]
    if hot_at is not None:
        pwrite(source.file(), HOT, hot_at)
        options += ["--order", "heat"]
    proxy.arm(FrameType.DATA, Fault.CUT, n_frames, bars=True)
    source.start_migrate(proxy.uri, *options)
    assert proxy.struck.wait(40)
    wait_until(lambda: destination.disk()["state"] == "borrowing", "the hand-off")
    return source


def test_a_lost_link_parks_reads_and_whole_blocks_need_none(hosts: Hosts, place: Path) -> None:
    """What is here is read, whole blocks are written, what is missing waits; and all of it when the link is back."""
    destination = hosts.destination()
    with FaultProxy(destination.uri) as proxy:
        source = interrupted(hosts, place, proxy, destination)
        original = source.images["vda"].read_bytes()
        assert pread(destination.file(), 4096) == original[:4096]
        new = random.Random(3).randbytes(8192)
        pwrite(destination.file(), new, SIZE - SIZE % 4096 - 16384, os.O_DSYNC)
        assert pread(destination.file(), 8192, SIZE - SIZE % 4096 - 16384) == new
        reader = Reader(destination.file(), 512, SIZE - 512)
        cut = threading.Thread(target=write_sector, args=(destination.file(), 20 * MIB + 512), daemon=True)
        cut.start()
        wait_until(lambda: destination.disk()["waiting-requests"] >= 2, "two requests that wait")
        assert reader.result is None
        assert source.phase() == "postcopy"
        assert source.migration()["status"] == "postcopy-active"
        with pytest.raises(QmpRefusedError, match="post-copy cannot be paused: a lost connection is waited for"):
            source.qmp.execute("migrate-pause")
        with pytest.raises(QmpRefusedError, match="not all here yet"):
            destination.qmp.execute("migrate", {"uri": "tcp:127.0.0.1:1", "blk": True})
        proxy.is_barred = False
        assert reader.join() == original[-512:]
        cut.join(30)
        assert source.wait_phase("completed")
        expected = bytearray(original)
        at = SIZE - SIZE % 4096 - 16384
        expected[at : at + 8192] = new
        expected[20 * MIB + 512 : 20 * MIB + 1024] = SECTOR
        assert destination.stop() == 0
        assert destination.images["vda"].read_bytes() == expected
        assert source.images["vda"].read_bytes() == original


@pytest.mark.parametrize("side", ["source", "destination", "both"])
def test_a_daemon_that_is_killed_goes_on(hosts: Hosts, place: Path, side: str) -> None:
    """What guests wrote to missing blocks before the kill is there after it, and the rest still comes."""
    with reserved_port() as port:
        uri = f"tcp:127.0.0.1:{port}"
        kill_and_go_on(hosts, place, side, uri, hosts.destination(incoming=uri))


def kill_and_go_on(hosts: Hosts, place: Path, side: str, uri: str, destination: Host) -> None:
    """Do so, with a destination that listens at ``uri``."""
    with FaultProxy(uri) as proxy:
        source = interrupted(hosts, place, proxy, destination)
        original = source.images["vda"].read_bytes()
        new = random.Random(4).randbytes(MIB)
        pwrite(destination.file(), new, 12 * MIB)
        if side != "source":
            destination.kill()
            refused = hosts.make("plain", destination.images).serve()
            assert refused.exit_code != 0
            assert "is not all here" in refused.stderr
            destination = hosts.start("destination", destination.images, incoming=uri)
        if side != "destination":
            source.kill()
            source = hosts.start("source", source.images)
            assert source.disk()["state"] == "lending"
            with pytest.raises(OSError, match="Read-only"):
                pwrite(source.file(), b"not mine")
        assert pread(destination.file(), MIB, 12 * MIB) == new
        proxy.is_barred = False
        wait_until(lambda: destination.disk()["state"] == "owner", "the end of the loan")
        wait_until(lambda: source.disk()["state"] == "released", "the source's word on it")
        assert destination.stop() == 0
        expected = original[: 12 * MIB] + new + original[13 * MIB :]
        assert destination.images["vda"].read_bytes() == expected


def test_a_map_that_is_gone_is_noticed(hosts: Hosts, place: Path) -> None:
    """Without it nobody can tell what is missing: the image is not served."""
    destination = hosts.destination()
    with FaultProxy(destination.uri) as proxy:
        interrupted(hosts, place, proxy, destination)
        destination.kill()
        loan_map(destination).unlink()
        refused = hosts.make("again", destination.images, incoming="tcp:127.0.0.1:0").serve()
        assert refused.exit_code == 2
        assert "the map of what is missing" in refused.stderr


def test_a_daemon_that_ends_answers_what_waits(hosts: Hosts, place: Path) -> None:
    """EIO, not a hang; the migration of a source that ends says what to do."""
    destination = hosts.destination()
    with FaultProxy(destination.uri) as proxy:
        source = interrupted(hosts, place, proxy, destination)
        reader = Reader(destination.file(), 512, SIZE - 512)
        wait_until(lambda: destination.disk()["waiting-requests"] == 1, "a request that waits")
        assert destination.stop() == 0
        result = reader.join()
        assert isinstance(result, OSError)
        assert result.errno in (errno.EIO, errno.ENOTCONN)
        assert source.stop() == 0
        assert "serve the disks here again, and it goes on" in source.log()


def test_from_a_running_migration(hosts: Hosts, place: Path) -> None:
    """Half was sent before; a hot block is fetched as it is now and not as it was sent."""
    source, destination = hosts.pair(64 * MIB)
    source.set_parameters(max_bandwidth=2 * MIB)
    source.qmp.execute("migrate", {"uri": destination.uri, "blk": True})
    wait_until(lambda: source.migration().get("disk", {}).get("transferred", 0) > 2 * MIB, "the first chunks")
    pwrite(source.file(), b"newer than what was sent", 0, os.O_DSYNC)
    done = source.command("postcopy")
    assert done == (0, "", "fusemig: handing over; both hosts are needed until the destination has fetched the rest\n")
    source.set_parameters(max_bandwidth=0)
    source.wait_phase("completed")
    with pytest.raises(QmpRefusedError, match="migrate-pause is currently only supported during postcopy-active state"):
        source.qmp.execute("migrate-pause")
    assert source.migration()["disk"]["transferred"] < 70 * MIB
    assert source.images["vda"].read_bytes() == destination.images["vda"].read_bytes()
    refused = source.command("postcopy")
    assert refused.exit_code == 1
    assert "can only be started during" in refused.stderr


def test_what_is_hot_comes_first(hosts: Hosts, place: Path) -> None:
    """With ``--order heat`` what guests wrote at the source is here before the link is lost, and the start is not."""
    destination = hosts.destination()
    with FaultProxy(destination.uri) as proxy:
        source = interrupted(hosts, place, proxy, destination, 5, hot_at=20 * MIB)
        assert pread(destination.file(), MIB, 20 * MIB) == HOT
        reader = Reader(destination.file(), 512, 0)
        wait_until(lambda: destination.disk()["waiting-requests"] == 1, "a request that waits")
        assert reader.result is None
        proxy.is_barred = False
        assert source.wait_phase("completed")
        assert reader.join() == source.images["vda"].read_bytes()[:512]
        assert destination.stop() == 0
        assert destination.images["vda"].read_bytes() == source.images["vda"].read_bytes()


def answer_to_lend(host: Host, session: str, image_id: str, epoch: int) -> object:
    """Return what a host answers a source that says that it lends a disk to it."""
    address, port = host.uri.removeprefix("tcp:").rsplit(":", 1)
    decoder = native.Decoder(native.FROM_DESTINATION, preface=False)
    with socket.create_connection((address, int(port)), 20) as peer:
        lend = native.Lend(native.VERSION, session, [native.AskedDisk(image_id, epoch)])
        peer.sendall(native.PREFACE + native.encode_message(lend))
        while received := peer.recv(4096):
            if events := decoder.feed(received):
                return events[0]
    raise AssertionError("no answer")


def record_of(host: Host) -> EpochRecord:
    image = host.images["vda"]
    record = EpochFile(image.with_name(f"{image.name}.fusemig")).record
    assert record is not None
    return record


def test_a_disk_that_has_moved_on_is_whole(hosts: Hosts, place: Path) -> None:
    """WHOLE was lost, and the disk is at a third host: the source hears of it all the same."""
    middle = hosts.destination()
    third = hosts.start("third", {"vda": place / "third.img"}, incoming="tcp:127.0.0.1:0")
    image = write_random(place / "a.img", MIB)
    source = hosts.start("source", {"vda": image})
    with FaultProxy(middle.uri) as proxy:
        proxy.arm(FrameType.WHOLE, Fault.LOSE, bars=True)
        source.start_migrate(proxy.uri, "--mode", "postcopy")
        assert proxy.struck.wait(40)
        wait_until(lambda: middle.disk()["state"] == "owner", "the end of the loan")
        wait_until(lambda: middle.migrate(third.uri).exit_code == 0, "a link that is known to be lost")
        lent = record_of(source)
        assert lent.state is Ownership.LENDING
        # Its twins: an epoch that this host never owned the disk in, and another disk.
        assert isinstance(answer_to_lend(middle, lent.session, lent.image_id, 1), native.Refuse)
        assert isinstance(answer_to_lend(middle, lent.session, "other", 0), native.Refuse)
        proxy.is_barred = False
        assert source.wait_phase("completed")
    assert source.disk()["state"] == "released"
    assert middle.migration()["x-fusemig"]["role"] == "source", "what was asked is no migration"
    assert record_of(source).is_loan is False


def test_a_loan_that_is_left_is_ended_by_a_persons_word(hosts: Hosts, place: Path) -> None:
    """Of a disk that is not all there nothing is proved by its epoch; `resolve` ends it on the source's image."""
    destination = hosts.destination()
    with FaultProxy(destination.uri) as proxy:
        source = interrupted(hosts, place, proxy, destination)
        lent = record_of(source)
        assert isinstance(answer_to_lend(destination, "other", lent.image_id, 0), native.Refuse)
        assert "is busy: " in source.command("resolve", "--disk", "vda", "--owner", "destination", FENCED).stderr
        source.kill()
        image = str(source.images["vda"])
        command = [sys.executable, "-m", "fusemig", "resolve", image, "--owner", "destination", FENCED]
        subprocess.run(command, check=True, timeout=40)
    assert (record_of(source).state, record_of(source).is_loan) == (Ownership.RELEASED, False)


def test_refusals(hosts: Hosts, place: Path) -> None:
    """QEMU's wire and a guest that moves cannot go with it."""
    source, destination = hosts.pair(MIB)
    for more in (
        {"x-fusemig-wire": "qemu"},
        {"x-fusemig-guest": "qmp:/nonexistent", "x-fusemig-guest-destination": "qmp:/x"},
    ):
        with pytest.raises(QmpRefusedError, match="post-copy"):
            source.qmp.execute("migrate", {"uri": destination.uri, "blk": True, "x-fusemig-mode": "postcopy"} | more)
    assert source.phase() == "none"


def test_ext4_is_mounted_while_most_is_missing(hosts: Hosts, place: Path) -> None:
    """A file system is mounted and written at the destination before its blocks came, and is clean afterwards."""
    image = place / "a.img"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    run("mkfs.ext4", "-q", "-F", image)
    source = hosts.start("source", {"vda": image})
    destination = hosts.destination()
    with loop_device(source.file()) as device, mounted(device, place / "there") as tree:
        for number in range(24):
            (tree / f"file{number}").write_bytes(random.Random(number).randbytes(MIB))
    with FaultProxy(destination.uri) as proxy:
        proxy.arm(FrameType.DATA, Fault.CUT, 8)
        source.start_migrate(proxy.uri, "--mode", "postcopy")
        assert proxy.struck.wait(40)
        with loop_device(destination.file()) as device, mounted(device, place / "here") as tree:
            for number in range(0, 24, 2):
                assert (tree / f"file{number}").read_bytes() == random.Random(number).randbytes(MIB)
            (tree / "new").write_bytes(b"written here")
        source.wait_phase("completed")
    assert destination.stop() == 0
    check_ext4(destination.images["vda"])


@pytest.mark.parametrize("is_killed", [False, True], ids=["a lost link", "both killed"])
def test_an_overlay_of_a_shared_base(hosts: Hosts, place: Path, is_killed: bool) -> None:
    """Its file system is used at the destination before what lies above the base has come; nothing else does."""
    with reserved_port() as port:
        lose_an_overlay(hosts, place, f"tcp:127.0.0.1:{port}", is_killed=is_killed)


def lose_an_overlay(hosts: Hosts, place: Path, uri: str, *, is_killed: bool) -> None:
    """Lose the link, or both daemons, of a destination that listens at ``uri``."""
    base, there = place / "golden.img", place / "there.img"
    with base.open("wb") as file:
        file.truncate(64 * MIB)
    run("mkfs.ext4", "-q", "-F", base)
    with loop_device(base) as device, mounted(device, place / "golden") as tree:
        for number in range(12):
            (tree / f"old{number}").write_bytes(random.Random(number).randbytes(MIB))
    run("cp", "--sparse=always", base, there)
    source = hosts.start("source", {"vda": place / "a.img"}, bases={"vda": base})
    with loop_device(source.file()) as device, mounted(device, place / "here") as tree:
        for number in range(8):
            (tree / f"new{number}").write_bytes(random.Random(50 + number).randbytes(MIB))
        (tree / "old5").write_bytes(b"rewritten")
    images = {"vda": place / "b.img"}
    destination = hosts.start("destination", images, incoming=uri, bases={"vda": there})
    with FaultProxy(uri) as proxy:
        proxy.arm(FrameType.DATA, Fault.CUT, 5, bars=is_killed)
        source.start_migrate(proxy.uri, "--mode", "postcopy", "--incremental")
        assert proxy.struck.wait(40)
        if is_killed:
            wait_until(lambda: destination.disk()["state"] == "borrowing", "the hand-off")
            assert destination.disk()["missing-bytes"] > 4 * MIB
            destination.kill()
            source.kill()
            pwrite(there, b"another base")
            refused = hosts.make("other", images, incoming=uri, bases={"vda": there}).serve()
            assert refused.exit_code == 2
            assert "is not the one that" in refused.stderr
            pwrite(there, bytes(12))
            destination = hosts.start("destination", images, incoming=uri, bases={"vda": there})
            source = hosts.start("source", source.images, bases={"vda": base})
            proxy.is_barred = False
        with loop_device(destination.file()) as device, mounted(device, place / "moved") as tree:
            for number in range(0, 12, 5):
                content = (tree / f"old{number}").read_bytes()
                assert content == (b"rewritten" if number == 5 else random.Random(number).randbytes(MIB))
            for number in range(0, 8, 3):
                assert (tree / f"new{number}").read_bytes() == random.Random(50 + number).randbytes(MIB)
            (tree / "newer").write_bytes(b"written here")
        wait_until(lambda: source.disk()["state"] == "released", "the end of the loan")
    with loop_device(destination.file()) as device, mounted(device, place / "at last") as tree:
        assert (tree / "newer").read_bytes() == b"written here"
        for number in range(8):
            assert (tree / f"new{number}").read_bytes() == random.Random(50 + number).randbytes(MIB)
    check_ext4(destination.file())
    assert images["vda"].stat().st_blocks * 512 < 12 * MIB, "the base's data did not travel"
    assert destination.stop() == 0
    assert not loan_map(destination).exists()
