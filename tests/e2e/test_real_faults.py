"""Real daemons in network namespaces, and a guest that writes and syncs: kills, links, stores, system calls that fail.

After each fault exactly one side is or can become writable, and it holds every record that was acknowledged.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from support.hosts import MIB, assert_migrates, assert_unharmed, is_mounted, pread, pwrite, wait_until, write_random
from support.loops import mounted, run
from support.network import link
from support.records import RecordWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from support.hosts import Host, Hosts
    from support.network import Link

pytestmark = pytest.mark.fuse

SIZE = 4 * MIB
N_SLOTS = 64
N_BATCHES = 5
N_KILLS, N_KILLS_NIGHTLY = 3, 10
"""Of either side, in each batch; only the first batch is for every run."""
BULK_S, REST_S = 0.5, 0.06
"""About how long the bulk phase of these migrations takes, and all that comes after it; half of the kills each."""
TOO_LATE = "too late"
PORT = 4444
"""In a network namespace of its own: the daemon that is started again is found where the other one was."""


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
        incoming=f"tcp:{cable.address}:{PORT}",
        prefix=cable.prefixes[1],
        options=["--insecure"],
    )
    return source, destination


def judge(source: Host, destination: Host, guests: Sequence[RecordWriter]) -> str:
    """See that one side may be written and holds every record; return which."""
    here, there = source.disk(), destination.disk()
    assert (here["gate"], there["gate"]) != ("open", "open")
    if here["gate"] == "open":
        assert there["state"] != "owner"
        owner = source
    else:
        assert there["gate"] == "open"
        assert there["state"] == "owner"
        assert here["state"] in ("handed-off", "released")
        owner = destination
    for guest in guests:
        assert not guest.lost(owner.images["vda"])
    pwrite(owner.file(), b"written after the fault", SIZE - 4096, os.O_DSYNC)
    return owner.name


@pytest.mark.timeout(900)
@pytest.mark.parametrize("batch", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, N_BATCHES))])
@pytest.mark.parametrize("side", ["source", "destination"])
def test_killed_at_a_random_moment(
    hosts: Hosts, place: Path, cable: Link, side: str, batch: int, nightly: bool
) -> None:
    """SIGKILL: never two writers and no record lost; connected again, asked and resumed, the disk arrives at last."""
    first = random.SystemRandom().getrandbits(30) if nightly else batch
    ends: Counter[str] = Counter()
    wanted = N_KILLS_NIGHTLY if nightly else N_KILLS
    for seed in itertools.count(first):
        if sum(ends.values()) - ends[TOO_LATE] == wanted:
            break
        print(f"seed {seed}")
        directory = place / str(seed)
        directory.mkdir()
        source, destination = start_pair(hosts, directory, cable)
        ends[kill_and_go_on(source, destination, source if side == "source" else destination, seed)] += 1
        assert source.stop() == 0
        assert destination.stop() == 0
        shutil.rmtree(directory)
    print(f"{side}: {dict(sorted(ends.items()))}")


def kill_and_go_on(source: Host, destination: Host, victim: Host, seed: int) -> str:
    """Kill one side of a migration, start it again, and have the disk arrive; tell when it died and what came of it."""
    guest = RecordWriter(source.file(), N_SLOTS)
    uri = destination.uri
    command = source.start_command("migrate", uri, "--progress", "none", "--max-bandwidth", "8M", "--insecure")
    wait_until(lambda: source.phase() != "none" or command.process.poll() is not None, "the migration's start")
    rng = random.Random(seed)
    longest_s = BULK_S
    if rng.random() < 0.5:
        wait_until(lambda: source.phase() not in ("setup", "bulk"), "the end of the bulk phase")
        longest_s = REST_S
    time.sleep(rng.random() * longest_s)  # a moment, not a measure
    moment = source.phase()
    victim.kill()
    victim.start()
    done = command.finish(60)  # of a source that was killed: its daemon is gone
    guest.stop()
    wait_until(lambda: source.phase() in ("none", "completed", "failed", "in-doubt"), "the end of the migration")
    is_doubted = source.disk()["state"] == "handed-off"
    wait_until(lambda: source.disk()["state"] != "handed-off", "the answer to who owns the disk", 60)
    owner = judge(source, destination, [guest])
    if owner == "destination":
        if moment == "completed":
            return TOO_LATE
        return f"{moment}: {'asked' if is_doubted else 'reconnected' if not done.exit_code else 'taken'}"
    destination.wait_free()
    second = RecordWriter(source.file(), N_SLOTS, N_SLOTS)
    is_refused = False
    again = source.migrate(uri, "--resume", "--insecure")
    if again.exit_code:
        assert again.exit_code == 5, again.stderr
        is_refused = True  # the destination had not heard of the disk yet
        again = source.migrate(uri, "--insecure")
    second.stop()
    assert again.exit_code == 0, again.stderr
    assert judge(source, destination, [guest, second]) == "destination"
    return f"{moment}: {'called off, ' if is_doubted else ''}{'sent anew' if is_refused else 'resumed'}"


def test_link_cut_and_restored(hosts: Hosts, place: Path, cable: Link) -> None:
    """Shorter than the idle deadline: the migration waits and completes, the guest never noticed."""
    source, destination = start_pair(hosts, place, cable)
    guest = RecordWriter(source.file(), N_SLOTS)
    command = source.start_migrate(destination.uri, "--max-bandwidth", "256K", "--insecure")
    source.wait_phase("bulk")
    cable.cut()
    before = dict(guest.acknowledged)
    wait_until(lambda: guest.acknowledged != before, "a write during the cut")
    cable.restore()
    source.set_parameters(max_bandwidth=0)
    done = command.finish(60)
    guest.stop()
    assert done.exit_code == 0, done.stderr
    assert judge(source, destination, [guest]) == "destination"


@pytest.mark.nightly
def test_link_half_open(hosts: Hosts, place: Path, cable: Link) -> None:
    """What the destination says is lost: the source goes on by itself, and the next migration completes."""
    source, destination = start_pair(hosts, place, cable)
    guest = RecordWriter(source.file(), N_SLOTS)
    command = source.start_migrate(destination.uri, "--max-bandwidth", "256K", "--insecure")
    source.wait_phase("bulk")
    cable.deafen(0)
    done = command.finish(80)
    assert done.exit_code == 1
    assert re.search("nothing heard from|took nothing for|lost", done.stderr), done.stderr
    assert source.disk()["gate"] == "open"
    cable.undeafen(0)
    guest.stop()
    assert not guest.error
    assert judge(source, destination, [guest]) == "source"


def test_a_destination_without_the_room_refuses(hosts: Hosts, place: Path) -> None:
    """Before a byte is sent; holes need no room, and with room there it completes."""
    image = write_random(place / "source.img", SIZE)
    os.truncate(image, 64 * MIB)
    source = hosts.start("source", {"vda": image})
    with mounted("none", place / "small", "tmpfs", "size=2m") as small:
        destination = hosts.start("destination", {"vda": small / "b.img"}, incoming="tcp:127.0.0.1:0")
        done = source.migrate(destination.uri)
        assert done.exit_code == 5
        assert re.search(
            r"refused: disk 'vda' needs 4\.0 MiB more there, and \S+ has \S+ MiB free: make room", done.stderr
        )
        assert not (small / "b.img").exists()
        assert_unharmed(source)
        run("mount", "-o", "remount,size=8m", small)
        assert_migrates(source, destination)
        assert destination.stop() == 0


def test_a_destination_that_runs_full(hosts: Hosts, place: Path) -> None:
    """It says which disk, where, and how much is to come; with room there the next migration completes."""
    image = write_random(place / "source.img", SIZE)
    source = hosts.start("source", {"vda": image})
    with mounted("none", place / "small", "tmpfs", "size=8m") as small:
        destination = hosts.start("destination", {"vda": small / "b.img"}, incoming="tcp:127.0.0.1:0")
        guest = RecordWriter(source.file(), N_SLOTS)
        command = source.start_migrate(destination.uri, "--max-bandwidth", "128K")
        wait_until((small / "b.img").exists, "the image")
        (small / "somebody else's").write_bytes(bytes(6 * MIB))
        source.set_parameters(max_bandwidth=0)
        done = command.finish()
        guest.stop()
        assert done.exit_code == 1
        assert re.search(r"disk 'vda' .*write at \d+\+\d+: No space left.* to come: make room", done.stderr), (
            done.stderr
        )
        assert judge(source, destination, [guest]) == "source"
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
    """Tell whether all threads of a process are."""
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/status") as file:
                if not any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in file):
                    return False
        except OSError:
            continue  # it has ended
    return True


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
    """Somebody truncates the source's image: reads get EIO, and no migration takes the rest for a hole.

    Nor does a guest's write at the disk's end make the file as large as before, with zeros where the rest was.
    """
    source, destination = hosts.pair(SIZE)
    assert source.status()["status"] == "running"
    os.truncate(source.images["vda"], MIB)
    with pytest.raises(OSError, match="Input/output"):
        pread(source.file(), 4096, 2 * MIB)
    with pytest.raises(OSError, match="Input/output"):
        pwrite(source.file(), b"x" * 4096, SIZE - 4096)
    assert (source.status()["status"], source.disk()["io-error"]) == ("io-error", True)
    done = source.migrate(destination.uri)
    assert done.exit_code == 1
    assert f"the image was cut from {SIZE} to {MIB} bytes, restore it" in done.stderr
    assert destination.disk()["gate"] == "read-only"


def test_an_image_that_vanishes_at_the_destination_is_not_taken_over(hosts: Hosts) -> None:
    """It would be gone with the daemon, and the source has given the disk away; guests of the source go on."""
    source, destination = hosts.pair(SIZE)
    source.migrate_to_pause(destination.uri)
    destination.images["vda"].unlink()
    source.proceed()
    info = source.wait_phase("failed")
    assert "the image was removed or replaced, serve it anew there" in info["error-desc"], info
    assert_unharmed(source)
    assert destination.disk()["gate"] == "read-only"
    assert destination.stop() == 0
    destination.start()
    source.migrate_to_pause(destination.uri)
    source.proceed()
    source.wait_phase("completed")
    assert destination.disk()["gate"] == "open"


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
