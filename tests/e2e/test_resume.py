"""Migrations that are interrupted for real and go on: a cut link, a killed destination, a killed source."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import msgspec
import pytest

from fusemig.records.epoch import EpochFile
from fusemig.wire.native import FrameType
from support.hosts import MIB, pread, pwrite, wait_until
from support.proxy import Fault, FaultProxy

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Finished, Host, Hosts

pytestmark = pytest.mark.fuse

SIZE = 48 * MIB
HALF = SIZE // 2


def interrupt(source: Host, destination: Host, *, transferred: int = HALF) -> None:
    """Cut a migration's link once so many bytes have crossed it, and wait until both sides know."""
    with FaultProxy(destination.uri) as proxy:
        proxy.arm(FrameType.DATA, Fault.CUT, nth=transferred // MIB)
        assert source.migrate(proxy.uri).exit_code == 1
        destination.wait_free()


def write(source: Host, seed: int, n: int = 4) -> int:
    """Have the guest write here and there; return how much of the disk has to be sent again for it at most."""
    rng = random.Random(seed)
    for _ in range(n):
        pwrite(source.file(), rng.randbytes(4096), 4096 * rng.randrange(SIZE // 4096))
    return n * MIB


def assert_moved(source: Host, destination: Host, done: Finished, at_most: int) -> None:
    """See that it completed with equal bytes, that the destination owns the disk, and what it cost."""
    assert done.exit_code == 0, done.stderr
    info = source.migration()
    assert info["disk"]["transferred"] < at_most + MIB // 2
    assert info["x-fusemig"]["kept-bytes"] > 0
    assert source.images["vda"].read_bytes() == destination.images["vda"].read_bytes()
    assert destination.disk()["state"] == "owner"
    pwrite(destination.file(), b"taken over")
    assert not destination.images["vda"].with_name("vda.destination.img.fusemig-journal").exists()


def start_slowly(source: Host, uri: str, *arguments: object) -> None:
    """Start a migration that stays in its bulk phase, and wait until the destination has journaled some of it."""
    source.start_migrate(uri, "--max-bandwidth", "2M", *arguments)
    source.wait_phase("bulk")
    wait_until(lambda: source.migration()["disk"]["transferred"] > 26 * MIB, "more than half of it")


def restarted(hosts: Hosts, host: Host, name: str) -> Host:
    """Kill a host and start another one with its image."""
    host.kill()
    incoming = "tcp:127.0.0.1:0" if name == "destination" else None
    return hosts.start(f"{name}-again", {"vda": host.images["vda"]}, incoming=incoming)


def test_a_cut_link_is_made_again(hosts: Hosts) -> None:
    """The daemon does it by itself: exit code 0, and what had arrived is not sent again."""
    source, destination = hosts.pair(SIZE)
    with FaultProxy(destination.uri) as proxy:
        proxy.arm(FrameType.DATA, Fault.CUT, nth=20)
        done = source.migrate(proxy.uri, "--reconnect", "30s")
        assert proxy.struck.wait(40)
        assert done.exit_code == 0, done.stderr
        info = source.migration()
    assert info["x-fusemig"]["reconnects"] == 1
    assert info["x-fusemig"]["kept-bytes"] >= 19 * MIB
    assert source.images["vda"].read_bytes() == destination.images["vda"].read_bytes()
    pwrite(destination.file(), b"taken over")


def test_resume_after_a_cut_link(hosts: Hosts) -> None:
    """Only what is missing and what was written meanwhile is sent."""
    source, destination = hosts.pair(SIZE)
    interrupt(source, destination)
    written = write(source, 1)
    assert_moved(source, destination, source.migrate(destination.uri, "--resume"), HALF + written + MIB)


def test_resume_to_a_killed_destination(hosts: Hosts) -> None:
    """What it had journaled is there; what it had not is sent again."""
    source, destination = hosts.pair(SIZE)
    start_slowly(source, destination.uri)
    again = restarted(hosts, destination, "destination")
    source.wait_phase("failed")
    written = write(source, 2)
    done = source.migrate(again.uri, "--resume", "--max-bandwidth", "0")
    assert_moved(source, again, done, SIZE - 12 * MIB + written)


def test_resume_from_a_killed_source(hosts: Hosts) -> None:
    """Its map knows what was written before the kill, and it is written on meanwhile."""
    source, destination = hosts.pair(SIZE)
    interrupt(source, destination)
    written = write(source, 3)
    again = restarted(hosts, source, "source")
    written += write(again, 4)
    assert_moved(again, destination, again.migrate(destination.uri, "--resume"), HALF + written + MIB)


def test_resume_from_a_source_killed_in_the_bulk_phase(hosts: Hosts) -> None:
    """The destination notices by itself, and keeps what came."""
    source, destination = hosts.pair(SIZE)
    start_slowly(source, destination.uri)
    written = write(source, 5)
    again = restarted(hosts, source, "source")
    done = again.migrate(destination.uri, "--resume", "--reconnect", "30s", "--max-bandwidth", "0")
    assert_moved(again, destination, done, SIZE - 24 * MIB + written)


def _without_map(directory: Path) -> None:
    (directory / "source.img.fusemig-dirty").unlink()


def _of_another_boot(directory: Path) -> None:
    path = directory / "source.img.fusemig-dirty"
    content = bytearray(path.read_bytes())
    record = msgspec.json.decode(msgspec.json.decode(content[:4096], type=dict[str, msgspec.Raw])["record"])
    record["boot"] = "00000000-0000-0000-0000-000000000000"
    from xxhash import xxh3_64_hexdigest

    raw = msgspec.json.encode(record)
    page = msgspec.json.encode({"check": xxh3_64_hexdigest(raw), "record": msgspec.Raw(raw)})
    content[:4096] = page.ljust(4095) + b"\n"
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [_without_map, _of_another_boot])
def test_without_a_map_that_counts_contents_are_compared(hosts: Hosts, spoil: object) -> None:
    """Nothing unproved is believed: what differs is found, also what was changed behind our back."""
    source, destination = hosts.pair(SIZE)
    interrupt(source, destination)
    written = write(source, 6)
    source.kill()
    assert callable(spoil)
    spoil(hosts.directory)
    image = source.images["vda"]
    pwrite(image, b"behind our back", 5 * MIB)
    again = hosts.start("source-again", {"vda": image})
    assert_moved(again, destination, again.migrate(destination.uri, "--resume"), HALF + written + 2 * MIB)
    assert pread(destination.images["vda"], 15, 5 * MIB) == b"behind our back"


def test_a_tampered_journal_is_not_believed(hosts: Hosts) -> None:
    """Its entries count for nothing; everything arrives all the same."""
    source, destination = hosts.pair(SIZE)
    interrupt(source, destination)
    again_image = destination.images["vda"]
    assert destination.stop() == 0
    journal = again_image.with_name(f"{again_image.name}.fusemig-journal")
    content = bytearray(journal.read_bytes())
    assert any(content[8192:])
    content[8200] ^= 1
    journal.write_bytes(content)
    again = hosts.start("destination-again", {"vda": again_image}, incoming="tcp:127.0.0.1:0")
    done = source.migrate(again.uri, "--resume")
    assert done.exit_code == 0, done.stderr
    assert source.migration()["x-fusemig"]["kept-bytes"] == 0
    assert source.images["vda"].read_bytes() == again_image.read_bytes()


def test_another_image_is_refused(hosts: Hosts) -> None:
    """Exit code 5, with the reason and the next step; nothing is changed on either side."""
    source, destination = hosts.pair(8 * MIB)
    done = source.migrate(destination.uri, "--resume")
    assert done.exit_code == 5
    assert "no migration of it has begun; migrate without --resume" in done.stderr
    interrupt(source, destination, transferred=4 * MIB)
    image = destination.images["vda"]
    assert destination.stop() == 0
    file = EpochFile(image.with_name(f"{image.name}.fusemig"))
    assert file.record is not None
    file.write(msgspec.structs.replace(file.record, image_id="another"))
    again = hosts.start("destination-again", {"vda": image}, incoming="tcp:127.0.0.1:0")
    done = source.migrate(again.uri, "--resume")
    assert done.exit_code == 5
    assert "its image is another disk's; migrate without --resume" in done.stderr
    assert source.migrate(again.uri).exit_code == 0
    assert source.images["vda"].read_bytes() == image.read_bytes()
