"""Real daemons in network namespaces, and a guest that writes and syncs: kills, links, stores, system calls that fail.

After each fault exactly one side is or can become writable, and it holds every record that was acknowledged.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from support.hosts import MIB, assert_migrates, assert_unharmed, is_mounted, pread, pwrite, wait_until, write_random
from support.loops import mounted, run
from support.network import link
from support.records import RecordWriter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.hosts import Host, Hosts
    from support.network import Link

pytestmark = pytest.mark.fuse

SIZE = 4 * MIB
N_SLOTS = 64
N_KILLS, N_KILLS_NIGHTLY = 5, 50
"""Of either side."""


@pytest.fixture
def cable() -> Iterator[Link]:
    """Give a link between two hosts."""
    with link() as cable:
        yield cable


def start_pair(hosts: Hosts, place: Path, cable: Link) -> tuple[Host, Host]:
    """Start a source and a destination at the ends of a link."""
    image = write_random(place / "source.img", SIZE)
    source = hosts.start("source", {"vda": image}, prefix=cable.prefixes[0], options=["--insecure"])
    destination = hosts.start(
        "destination",
        {"vda": place / "destination.img"},
        incoming=f"tcp:{cable.address}:0",
        prefix=cable.prefixes[1],
        options=["--insecure"],
    )
    return source, destination


def judge(source: Host, destination: Host, guest: RecordWriter) -> str:
    """See that one side is or can become writable and holds every record; return which."""
    here, there = source.disk(), destination.disk()
    assert (here["gate"], there["gate"]) != ("open", "open")
    if here["gate"] == "open":
        assert there["state"] != "owner"
        owner = source
    elif there["gate"] == "open":
        assert there["state"] == "owner"
        assert here["state"] in ("handed-off", "released")
        owner = destination
    else:
        assert here["state"] == "handed-off"
        # Nobody writes until it is known who owns the disk; both hold all of it.
        assert not guest.lost(source.images["vda"])
        assert not guest.lost(destination.images["vda"])
        return "in doubt"
    assert not guest.lost(owner.images["vda"])
    pwrite(owner.file(), b"written after the fault", SIZE - 4096, os.O_DSYNC)
    return owner.name


def wait_for_end(source: Host) -> None:
    """Wait until a migration that may have been cut off is over."""
    wait_until(lambda: source.phase() in ("none", "completed", "failed", "in-doubt"), "the end of the migration")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_killed_at_a_random_moment(hosts: Hosts, place: Path, cable: Link, side: str, nightly: bool) -> None:
    """SIGKILL: whatever the moment, never two writers and no acknowledged record lost; the other side goes on."""
    first = random.SystemRandom().getrandbits(30) if nightly else 1
    ends = []
    for seed in range(first, first + (N_KILLS_NIGHTLY if nightly else N_KILLS)):
        print(f"seed {seed}")
        directory = place / str(seed)
        directory.mkdir()
        source, destination = start_pair(hosts, directory, cable)
        guest = RecordWriter(source.file(), N_SLOTS)
        command = source.start_migrate(destination.uri, "--max-bandwidth", "8M", "--insecure")
        time.sleep(random.Random(seed).random())  # a moment, not a measure
        victim = source if side == "source" else destination
        victim.kill()
        with suppress(subprocess.TimeoutExpired):
            command.finish()
        guest.stop()
        victim.start()
        wait_for_end(source)
        ends.append(judge(source, destination, guest))
        assert source.stop() == 0
        assert destination.stop() == 0
    print(ends)


def test_link_cut_and_restored(hosts: Hosts, place: Path, cable: Link) -> None:
    """Shorter than the idle deadline: the migration waits and completes, the guest never noticed."""
    source, destination = start_pair(hosts, place, cable)
    guest = RecordWriter(source.file(), N_SLOTS)
    command = source.start_migrate(destination.uri, "--max-bandwidth", "4M", "--insecure")
    source.wait_phase("bulk")
    cable.cut()
    before = dict(guest.acknowledged)
    wait_until(lambda: guest.acknowledged != before, "a write during the cut")
    cable.restore()
    done = command.finish(60)
    guest.stop()
    assert done.exit_code == 0, done.stderr
    assert judge(source, destination, guest) == "destination"


@pytest.mark.nightly
def test_link_half_open(hosts: Hosts, place: Path, cable: Link) -> None:
    """What the destination says is lost: the source goes on by itself, and the next migration completes."""
    source, destination = start_pair(hosts, place, cable)
    guest = RecordWriter(source.file(), N_SLOTS)
    command = source.start_migrate(destination.uri, "--max-bandwidth", "1M", "--insecure")
    source.wait_phase("bulk")
    cable.deafen(0)
    done = command.finish(80)
    assert done.exit_code == 1
    assert re.search("nothing heard from|took nothing for|lost", done.stderr), done.stderr
    assert source.disk()["gate"] == "open"
    cable.undeafen(0)
    guest.stop()
    assert not guest.error
    assert judge(source, destination, guest) == "source"


def test_destination_on_a_full_tmpfs(hosts: Hosts, place: Path, cable: Link) -> None:
    """It says which disk, where, and how much is to come; with room there the next migration completes."""
    image = write_random(place / "source.img", SIZE)
    source = hosts.start("source", {"vda": image})
    with mounted("none", place / "small", "tmpfs", "size=2m") as small:
        destination = hosts.start("destination", {"vda": small / "b.img"}, incoming="tcp:127.0.0.1:0")
        guest = RecordWriter(source.file(), N_SLOTS)
        done = source.migrate(destination.uri)
        guest.stop()
        assert done.exit_code == 1
        assert re.search(r"disk 'vda' .*write at \d+\+\d+: No space left.* to come: make room", done.stderr), (
            done.stderr
        )
        assert judge(source, destination, guest) == "source"
        run("mount", "-o", "remount,size=16m", small)
        assert_migrates(source, destination)
        assert destination.stop() == 0


@contextmanager
def injected(pid: int, fault: str, trace: str) -> Iterator[None]:
    """Have system calls of a process fail as strace's ``inject`` says."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={trace}", "-e", f"inject={fault}", "-p", str(pid)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        wait_until(lambda: _is_traced(pid) or tracer.poll() is not None, "the tracer")
        if tracer.poll() is not None:
            assert tracer.stderr is not None
            pytest.skip(f"strace cannot attach here: {tracer.stderr.read().decode().strip()}")
        yield
    finally:
        if tracer.poll() is None:
            tracer.send_signal(signal.SIGINT)
        tracer.wait(20)
        assert tracer.stderr is not None
        tracer.stderr.close()


def _is_traced(pid: int) -> bool:
    with open(f"/proc/{pid}/status") as file:
        return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in file)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_failed_fdatasync(hosts: Hosts, side: str) -> None:
    """EIO from the kernel: nothing is handed over, and that disk is not trusted again (I1)."""
    source, destination = hosts.pair(SIZE)
    pid = source.pid if side == "source" else destination.pid
    source.migrate_to_pause(destination.uri)  # both have synced once by now
    with injected(pid, "fdatasync:error=EIO", "fdatasync"):
        source.proceed()
        info = source.wait_phase("failed")
    assert re.search("Input/output error", info["error-desc"]), info
    assert source.disk()["gate"] == "open"
    assert destination.disk()["gate"] == "read-only"
    if side == "source":
        assert "serve it anew" in info["error-desc"]
        fd = os.open(source.file(), os.O_RDWR)
        try:
            with pytest.raises(OSError, match="Input/output"):
                os.fsync(fd)
        finally:
            os.close(fd)
        again = source.migrate(destination.uri)
        assert again.exit_code == 1
        assert "cannot be trusted" in again.stderr


def test_failed_pwrite_at_the_destination(hosts: Hosts) -> None:
    """EIO from the kernel: the source hears the disk and the range, and goes on; then it works."""
    source, destination = hosts.pair(SIZE)
    with injected(destination.pid, "pwrite64:error=EIO:when=4+", "pwrite64"):
        done = source.migrate(destination.uri)
    assert done.exit_code == 1
    assert re.search(r"disk 'vda' .*write at \d+\+\d+: Input/output error; the disk stays", done.stderr), done.stderr
    assert_unharmed(source, destination)
    assert_migrates(source, destination)


def test_a_cut_image_is_not_sent_as_zeros(hosts: Hosts) -> None:
    """Somebody truncates the source's image: reads get EIO, and no migration takes the rest for a hole."""
    source, destination = hosts.pair(SIZE)
    os.truncate(source.images["vda"], MIB)
    with pytest.raises(OSError, match="Input/output"):
        pread(source.file(), 4096, 2 * MIB)
    done = source.migrate(destination.uri)
    assert done.exit_code == 1
    assert f"the image was cut from {SIZE} to {MIB} bytes, restore it" in done.stderr
    assert destination.disk()["gate"] == "read-only"


@pytest.mark.parametrize("what", ["pread", "pwrite"])
def test_a_store_that_fails_and_is_mended(hosts: Hosts, place: Path, what: str) -> None:
    """An nbdkit `error` filter under nbdfuse: the guest gets EIO, the migration fails with the range; then it works."""
    store = place / "store"
    store.touch()
    flag = place / "flag"
    image = write_random(place / "image", SIZE)
    nbd = ["nbdkit", "-s", "--exit-with-parent", "--filter=error", "file", image, f"error-{what}=EIO"]
    nbd += [f"error-{what}-rate=100%", f"error-file={flag}"]
    process = subprocess.Popen(
        ["nbdfuse", str(store), "--command", *map(str, nbd)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: is_mounted(store), "nbdfuse")
        other = write_random(place / "other", SIZE, 2)
        disks = {"vda": store if what == "pread" else other}
        source = hosts.start("source", disks)
        destination = hosts.start(
            "destination", {"vda": place / "there.img" if what == "pread" else store}, incoming="tcp:127.0.0.1:0"
        )
        flag.touch()
        done = source.migrate(destination.uri)
        assert done.exit_code == 1
        assert re.search(r"disk 'vda' .* at \d+\+\d+: Input/output error; the disk stays", done.stderr), done.stderr
        flag.unlink()
        assert_unharmed(source, destination)
        assert_migrates(source, destination)
        assert source.stop() == 0
        assert destination.stop() == 0
    finally:
        run("umount", "-l", store, check=False)
        process.terminate()
        process.wait(20)
