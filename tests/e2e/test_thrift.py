"""What need not travel does not: disks that come back, older copies, shared bases, zeros, compressed frames."""

from __future__ import annotations

import os
import random
import subprocess
from typing import TYPE_CHECKING

import pytest

from support.hosts import MIB, pread, pwrite, wait_until, write_random

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from support.hosts import Finished, Host, Hosts

pytestmark = pytest.mark.fuse

SIZE = 24 * MIB
LISTEN = {"incoming": "tcp:127.0.0.1:0"}
QUICK = ("--downtime-limit", "2s")


def move(source: Host, destination: Host, *options: str) -> dict[str, Any]:
    """Migrate; return ``x-fusemig`` of the end."""
    done = source.migrate(destination.uri, *QUICK, *options)
    assert done.exit_code == 0, done.stderr
    assert source.images["vda"].read_bytes() == destination.images["vda"].read_bytes()
    wait_until(lambda: destination.disk()["gate"] == "open", "the take-over")
    own: dict[str, Any] = source.migration()["x-fusemig"]
    return own


@pytest.fixture
def ends(hosts: Hosts, place: Path) -> tuple[Host, Host]:
    """Two hosts that both listen; the disk of the first has moved to the second."""
    image = write_random(place / "here.img", SIZE)
    first, there = hosts.start("first", {"vda": image}), hosts.start("there", {"vda": place / "there.img"}, **LISTEN)
    assert move(first, there)["wire-bytes"] > SIZE
    assert first.stop() == 0
    return hosts.start("here", {"vda": image}, **LISTEN), there


def fio(host: Host, seed: int) -> None:
    """Write and verify random blocks through the mount."""
    subprocess.run(
        [
            *("fio", "--name=guest", f"--filename={host.file()}", "--rw=randwrite", "--bs=4k", "--number_ios=256"),
            *(
                f"--size={SIZE}",
                "--verify=xxhash",
                "--verify_state_save=0",
                "--do_verify=1",
                "--end_fsync=1",
                f"--randseed={seed}",
            ),
        ],
        check=True,
        capture_output=True,
        timeout=60,
        cwd=host.directory,
    )


def test_a_disk_comes_back_with_what_was_written(ends: tuple[Host, Host]) -> None:
    """There and back, idle and busy, restarted in order and killed: the proof holds, and what was written is sent."""
    here, there = ends
    own = move(there, here)
    assert own["wire-bytes"] < SIZE // 100
    assert own["kept-bytes"] == SIZE
    fio(here, 1)
    assert here.stop() == 0
    here.start()
    own = move(here, there)
    assert own["wire-bytes"] < 4 * MIB
    assert own["kept-bytes"] > SIZE - 4 * MIB
    fio(there, 2)
    there.kill()
    there.start()
    here.kill()
    here.start()
    assert move(there, here)["wire-bytes"] < 4 * MIB


def test_a_write_behind_our_back_costs_the_proof(ends: tuple[Host, Host]) -> None:
    """While the daemon runs or while it does not: everything is sent, or compared where that was asked for."""
    here, there = ends
    pwrite(here.images["vda"], b"?", 5 * MIB + 17)
    own = move(there, here)
    assert own["kept-bytes"] == 0
    assert own["wire-bytes"] > SIZE
    there.stop()
    pwrite(there.images["vda"], b"?", 5 * MIB + 18)
    there.start()
    own = move(here, there, "--incremental")
    assert own["kept-bytes"] == SIZE - 4096
    assert own["wire-bytes"] < SIZE // 100
    own = move(there, here, "--no-incremental")
    assert own["kept-bytes"] == 0


def over(hosts: Hosts, name: str, place: Path, base: str = "golden.img", **options: Any) -> Host:
    """Serve an overlay of a host over a base."""
    return hosts.start(name, {"vda": place / f"{name}.img"}, bases={"vda": place / base}, **options)


def test_an_overlay_moves_without_its_base(hosts: Hosts, place: Path) -> None:
    """Both have the base: what was written above it crosses, and is all that the destination's image holds."""
    write_random(place / "golden.img", SIZE)
    here = over(hosts, "here", place)
    (place / "copy.img").write_bytes((place / "golden.img").read_bytes())
    there = over(hosts, "there", place, "copy.img", **LISTEN)
    fio(here, 1)
    pwrite(here.file(), b"part", 5 * MIB + 100)
    content = here.file().read_bytes()
    done = here.migrate(there.uri, *QUICK)
    assert done.exit_code == 0, done.stderr
    assert here.migration()["x-fusemig"]["wire-bytes"] < 2 * MIB
    assert there.file().read_bytes() == content
    assert there.images["vda"].stat().st_blocks <= here.images["vda"].stat().st_blocks
    here.stop()
    here = over(hosts, "here", place, **LISTEN)
    done = there.migrate(here.uri, *QUICK)  # and back, with a proof
    assert done.exit_code == 0, done.stderr
    assert there.migration()["x-fusemig"]["wire-bytes"] < SIZE // 100
    assert here.file().read_bytes() == content


def refused(done: Finished, text: str) -> None:
    """See that a migration was refused, for this reason."""
    assert done.exit_code == 5
    assert text in done.stderr


def test_another_base_is_refused(hosts: Hosts, place: Path) -> None:
    """One byte is enough; sent as a whole the disk may go there all the same."""
    write_random(place / "golden.img", SIZE)
    here = over(hosts, "here", place)
    content = bytearray((place / "golden.img").read_bytes())
    content[-1] ^= 1
    (place / "other.img").write_bytes(content)
    there = over(hosts, "there", place, "other.img", **LISTEN)
    pwrite(here.file(), b"written", MIB)
    refused(here.migrate(there.uri, *QUICK), "disk 'vda' lies over another base there")
    assert here.disk()["gate"] == "open"
    raw = hosts.destination()
    refused(here.migrate(raw.uri, *QUICK, "--incremental"), "disk 'vda' has no base at")
    done = here.migrate(there.uri, *QUICK, "--no-incremental")
    assert done.exit_code == 0, done.stderr
    assert there.file().read_bytes() == here.file().read_bytes()


@pytest.mark.parametrize("lane", ["data", pytest.param("pyfuse3", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("how", ["off", "on", "unmap"])
def test_zeros_that_guests_write(hosts: Hosts, place: Path, how: str, lane: str) -> None:
    """Whole blocks of zeros become holes with unmap, stay allocated otherwise, and read as zeros in any case."""
    image = write_random(place / "a.img", 4 * MIB)
    content = bytearray(image.read_bytes())
    host = hosts.start("one", {"vda": image}, options=["--detect-zeroes", how, "--lane", lane])
    before = image.stat().st_blocks
    pwrite(host.file(), bytes(MIB), MIB, os.O_DSYNC)
    pwrite(host.file(), bytes(8192), 8192, os.O_DSYNC)
    pwrite(host.file(), bytes(100), 5, os.O_DSYNC)
    content[MIB : 2 * MIB] = bytes(MIB)
    content[8192:16384] = bytes(8192)
    content[5:105] = bytes(100)
    assert image.read_bytes() == content
    assert host.file().read_bytes() == content
    freed = 512 * (before - image.stat().st_blocks)
    assert freed == (MIB + 8192 if how == "unmap" else 0)


def test_a_destination_is_as_sparse_as_its_source(hosts: Hosts, place: Path) -> None:
    """Holes of the image, of discards and of zeros, before and during the migration, over an image full of data."""
    image = place / "here.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    rng = random.Random(1)
    for at in range(0, SIZE, 3 * MIB):
        pwrite(image, rng.randbytes(MIB + 40_960), at)
    here = hosts.start("here", {"vda": image}, options=["--detect-zeroes", "unmap", "--lane", "data"])
    there = hosts.start("there", {"vda": write_random(place / "there.img", SIZE, 9)}, **LISTEN)
    here.pause_before_switchover()
    here.set_parameters(downtime_limit=2000)
    here.qmp.execute("migrate", {"uri": there.uri, "blk": True})
    here.wait_phase("pre-switchover")
    subprocess.run(["fallocate", "-p", "-o", "200704", "-l", str(2 * MIB), here.file()], check=True)
    pwrite(here.file(), bytes(MIB), 6 * MIB)
    pwrite(here.file(), rng.randbytes(MIB), 20 * MIB)
    subprocess.run(["fallocate", "-p", "-o", str(20 * MIB + 4096), "-l", "8192", here.file()], check=True)
    with here.file().open("rb") as file:
        os.fsync(file.fileno())
    here.proceed()
    here.wait_phase("completed")
    wait_until(lambda: there.disk()["gate"] == "open", "the take-over")
    assert pread(there.images["vda"], SIZE) == pread(image, SIZE)
    assert there.images["vda"].stat().st_blocks <= image.stat().st_blocks


def test_compressed_frames(hosts: Hosts, place: Path) -> None:
    """What compresses takes a part of the link, in the dirty phase too; what does not is sent as it is."""
    image = place / "here.img"
    lines = b"".join(b"%d bytes of a log that says the same thing again\n" % n for n in range(400_000))
    image.write_bytes(lines[: 12 * MIB] + random.Random(1).randbytes(4 * MIB))
    here, there = hosts.start("here", {"vda": image}), hosts.destination()
    here.pause_before_switchover()
    here.set_parameters(downtime_limit=2000, max_bandwidth=8 * MIB)
    here.qmp.execute("migrate", {"uri": there.uri, "blk": True, "x-fusemig-compress": "zstd:3"})
    here.wait_phase("pre-switchover")
    bulk = here.migration()["x-fusemig"]["compression"]["bytes-in"]
    assert bulk > 0
    begins = iter(range(0, len(lines) - MIB, 64))

    def dirty_pass_is_packed() -> bool:
        # A source that a busy machine kept from sending takes it for its own slowness, and tries for a while without.
        # Other bytes each time: what the destination has is not sent again.
        begin = next(begins)
        pwrite(here.file(), lines[begin : begin + MIB], 0)
        return bool(here.migration()["x-fusemig"]["compression"]["bytes-in"] > bulk)

    wait_until(dirty_pass_is_packed, "a dirty pass that is compressed")
    here.proceed()
    own = here.wait_phase("completed")["x-fusemig"]
    packed, became = own["compression"]["bytes-in"], own["compression"]["bytes-out"]
    assert became < packed // 3
    # A chunk that is taken while it is written is sent twice, and counts twice as dirtied.
    assert own["wire-bytes"] < 16 * MIB + own["bytes-dirtied"] - packed + became + MIB // 4
    assert there.images["vda"].read_bytes() == image.read_bytes()
    done = here.migrate("tcp:127.0.0.1:9", "--compress", "lz4")
    assert done.exit_code == 2
    assert "compression 'lz4' is not known: write zstd or zstd:LEVEL" in done.stderr
