"""A mount outlives its daemons: whatever kills them, guests wait and lose nothing."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fusemig.disk.raw import RawDisk
from fusemig.errors import ConfigError
from fusemig.succession.dying import _WRITE as WRITE_NUMBERS
from support.hosts import DEADLINE_S, MIB, Qmp, pread, pwrite, wait_until, write_random
from support.loops import check_ext4, loop_device, mounted, run
from support.resilient import (
    WRITE,
    WRITE_DIRECT,
    WRITE_WHEN_TOLD,
    Background,
    daemon_of,
    has_fuse_open,
    kill_and_wait,
    kill_daemon,
    killing,
    n_served,
    start,
)

if TYPE_CHECKING:
    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse

SIZE = 64 * MIB
_DEAD_SERVER = (f"errno {errno.ENOTCONN}", f"errno {errno.ECONNABORTED}")


def fio(host: Host, seed: int) -> subprocess.Popen[str]:
    """Start writers of 4 KiB and 1 MiB, direct and through the page cache, syncing, which verify what they wrote."""
    common = ["--rw=randwrite", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", f"--randseed={seed}"]
    jobs = {
        "direct-small": ["--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=8", "--size=6m", "--rate_iops=700"],
        "cached-small": ["--bs=4k", "--fdatasync=16", "--ioengine=psync", "--size=4m", "--rate_iops=500"],
        "direct-large": ["--bs=1m", "--direct=1", "--ioengine=libaio", "--iodepth=4", "--size=16m", "--rate_iops=8"],
        "cached-large": ["--bs=1m", "--fdatasync=2", "--ioengine=psync", "--size=16m", "--rate_iops=8"],
    }
    command = ["fio", "--minimal", f"--filename={host.file()}", *common]
    for number, (name, options) in enumerate(jobs.items()):
        command += [f"--name={name}", f"--offset={16 * number}m", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=host.directory)


@pytest.mark.parametrize(
    "standby", [pytest.param([], marks=pytest.mark.nightly, id="cold"), pytest.param(["--standby"], id="warm")]
)
def test_fio_verifies_across_kills(hosts: Hosts, standby: list[str]) -> None:
    """Random writes of every kind, and their verification, with the daemon killed again and again."""
    host = start(hosts, *standby, size=SIZE)
    with killing(host, seed=5, longest_s=0.9) as kills:
        while not kills:
            process = fio(host, seed=1)
            out, _ = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, out


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("batch", range(5))
def test_fio_verifies_across_200_kills(hosts: Hosts, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """The same until 40 daemons have died, five times."""
    monkeypatch.setattr("support.hosts.WATCHDOG_S", 600.0)
    host = start(hosts, "--standby", size=SIZE)
    with killing(host, seed=6 + batch, longest_s=0.6) as kills:
        seed = 100 * batch
        while len(kills) < 40:
            process = fio(host, seed)
            out, _ = process.communicate(timeout=4 * DEADLINE_S)
            assert process.returncode == 0, out
            seed += 1
    print(f"{len(kills)} kills")


def test_a_file_system_and_a_database_survive_kills(hosts: Hosts, place: Path) -> None:
    """Ext4 on a loop device, sqlite and stress-ng in it: nothing fails, nothing is lost, fsck finds nothing."""
    image = place / "vda.img"
    image.touch()
    os.truncate(image, SIZE)
    run("mkfs.ext4", "-q", image)
    host = hosts.start("host", {"vda": image}, options=["--resilient"])
    with loop_device(host.file()) as device, mounted(device, place / "fs") as fs:
        with killing(host, seed=7, longest_s=0.8) as kills:
            stress = subprocess.Popen(
                ["stress-ng", "--hdd", "1", "--hdd-bytes", "8M", "--timeout", "4s", "--temp-path", fs, "--quiet"]
            )
            with closing(sqlite3.connect(fs / "db", isolation_level=None)) as connection:
                connection.execute("PRAGMA synchronous=FULL")
                connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY)")
                n = 0
                while stress.poll() is None or not kills:
                    n += 1
                    connection.execute("INSERT INTO t VALUES (?)", (n,))
            assert stress.wait(DEADLINE_S) == 0
        with closing(sqlite3.connect(fs / "db")) as connection:
            assert connection.execute("SELECT count(*), max(id) FROM t").fetchone() == (n, n)
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    host.stop()
    check_ext4(image)


@pytest.mark.parametrize("point", ["after-mount", "after-init-kept"])
def test_a_first_daemon_that_dies_while_it_mounts_has_a_successor(hosts: Hosts, point: str) -> None:
    """Before the kernel has its INIT answered: the successor is asked for it."""
    trigger = hosts.directory / "trigger"
    trigger.touch()
    host = start(hosts, failpoint=f"{point}:kill:{trigger}")
    assert not trigger.exists()
    pwrite(host.file(), b"served", 4096, os.O_DSYNC)
    assert pread(host.images["vda"], 6, 4096) == b"served"
    kill_and_wait(host)
    assert pread(host.file(), 6, 4096) == b"served"


@pytest.mark.parametrize("point", ["before-resend", "after-resend"])
def test_a_successor_that_dies_while_it_takes_over_has_one_too(hosts: Hosts, point: str) -> None:
    """Requests that came twice, and that two daemons have seen, are answered by the third."""
    trigger = hosts.directory / "trigger"
    host = start(hosts, failpoint=f"{point}:kill:{trigger}")
    trigger.touch()
    os.kill(daemon_of(host), signal.SIGSTOP)  # so that it has read nothing, and then something
    writers = [Background(WRITE, host.file(), f"writer{n}", 4096 * n) for n in range(4)]
    kill_daemon(host)
    assert [writer.finish() for writer in writers] == ["7"] * 4
    assert not trigger.exists()
    for n in range(4):
        assert pread(host.images["vda"], 7, 4096 * n) == f"writer{n}".encode()


def test_a_write_that_was_parked_is_made_by_the_successor(hosts: Hosts) -> None:
    """Held at a closed gate, it was not answered: it is sent again, and held again, for `stop` goes on."""
    host = start(hosts)
    host.qmp.execute("stop")
    writer = Background(WRITE, host.file(), "parked", 8192)
    wait_until(lambda: host.status()["parked-writes"], "the parked write")
    kill_and_wait(host)
    wait_until(lambda: host.status()["parked-writes"], "the parked write at the successor")
    assert writer.is_waiting
    host.qmp.execute("cont")
    assert writer.finish() == "6"
    assert pread(host.images["vda"], 6, 8192) == b"parked"


_FORGETFUL = """
import sys
from fusemig.fuse import abi
from fusemig.cli import main
abi.resend = lambda: abi.invalidate_inode(1)
del sys.argv[1:4]
main()
"""


def test_without_the_resend_a_request_waits_for_ever(hosts: Hosts, place: Path) -> None:
    """The failing twin: what makes the tests above pass is the notification, and nothing else.

    Past the page cache: a page that waits for ever would have everybody wait for it, us too.
    """
    script = place / "forgetful.py"
    script.write_text(_FORGETFUL)
    host = start(hosts, prefix=[sys.executable, script])
    host.qmp.execute("stop")
    writer = Background(WRITE_DIRECT, host.file(), 8192)
    wait_until(lambda: host.status()["parked-writes"], "the parked write")
    kill_and_wait(host)
    host.qmp.execute("cont")
    assert Background(WRITE_DIRECT, host.file(), 0).finish() == "4096"  # what comes now is served
    with pytest.raises(subprocess.TimeoutExpired):
        writer.process.wait(0.5)
    assert host.stop() == 0
    assert writer.finish() in _DEAD_SERVER


def test_after_too_many_failures_the_mount_is_parked_for_an_operator(hosts: Hosts) -> None:
    """Guests wait, nobody else gets the image, and a HUP after the repair has everything go on."""
    host = start(hosts)
    image = host.images["vda"]
    away = image.rename(image.with_name("away.img"))
    write_random(image, 8 * MIB, seed=2)  # another image at its place must not be served to guests of the first
    kill_daemon(host)
    wait_until(lambda: "is parked" in host.log(), "the holder's word")
    assert host.log().count("not at its place any more") == 5
    writer = Background(WRITE, host.file(), "waited", 0)
    with pytest.raises(ConfigError, match="in use"):
        RawDisk("vda", away)
    assert writer.is_waiting
    away.rename(image)
    os.kill(host.pid, signal.SIGHUP)
    assert writer.finish() == "6"
    assert pread(image, 6) == b"waited"
    assert host.stop() == 0


def test_a_parked_mount_can_be_given_up(hosts: Hosts) -> None:
    """TERM unmounts; what waited fails as with any dead FUSE server."""
    host = start(hosts)
    host.images["vda"].rename(host.images["vda"].with_name("away.img"))
    writer = Background(WRITE_WHEN_TOLD, host.file(), 0)
    assert writer.process.stdout is not None
    assert writer.process.stdout.readline() == "open\n"  # so that it cannot come too late for this mount
    kill_daemon(host)
    wait_until(lambda: "is parked" in host.log(), "the holder's word")
    writer.tell()
    with pytest.raises(subprocess.TimeoutExpired):
        writer.process.wait(0.2)
    assert host.stop() != 0
    assert writer.finish() in _DEAD_SERVER


def test_without_its_holder_a_daemon_is_an_ordinary_one(hosts: Hosts) -> None:
    """It serves on; its death is then that of any FUSE server, and a restart finds what was acknowledged."""
    host = start(hosts)
    daemon = daemon_of(host)
    fd = os.open(host.file(), os.O_RDWR)
    try:
        os.kill(host.pid, signal.SIGKILL)
        assert host.wait() == -signal.SIGKILL
        assert os.pwrite(fd, b"alone", 0) == 5
        os.kill(daemon, signal.SIGKILL)
        wait_until(lambda: not has_fuse_open(daemon), "its end")
        with pytest.raises(OSError, match=r"not connected|connection abort"):  # the latter if it is ending just now
            os.pwrite(fd, b"x", 0)
    finally:
        with suppress(OSError):  # ENOTCONN too
            os.close(fd)
    host.kill()
    assert pread(host.start().file(), 5) == b"alone"


def test_clients_of_the_control_socket_wait_for_the_successor(hosts: Hosts) -> None:
    """The socket is inherited, and its file is gone at the end."""
    host = start(hosts)
    before = kill_daemon(host)
    assert host.disk()["gate"] == "open"  # connects while nobody may be there
    wait_until(lambda: n_served(host) > before, "a successor")
    assert host.stop() == 0
    assert not host.control.exists()


_SLOW = """
import os, sys, time
from fusemig.disk.raw import RawDisk
from fusemig.cli import main
pwrite = RawDisk.pwrite
def slow(*arguments):
    while os.path.exists({trigger!r}):
        time.sleep(0.01)
    pwrite(*arguments)
RawDisk.pwrite = slow
del sys.argv[1:4]
main()
"""


def test_a_daemon_that_dies_in_an_invalidation_is_set_free_by_its_successor(hosts: Hosts, place: Path) -> None:
    """The killed thread waits for a page to be pushed out to us, and cannot end until somebody answers."""
    script, trigger = place / "slow.py", place / "trigger"
    script.write_text(_SLOW.format(trigger=str(trigger)))
    host = start(hosts, prefix=[sys.executable, script])
    fd = os.open(host.file(), os.O_RDWR)
    with closing(mmap.mmap(fd, 4096)) as page:
        os.close(fd)
        page[:6] = b"stored"
        trigger.touch()
        stopper = threading.Thread(target=_stop_guests, args=(host,))
        stopper.start()
        daemon = daemon_of(host)
        wait_until(lambda: _is_invalidating(daemon), "the notification, which waits for the page")
        before = kill_daemon(host)
        trigger.unlink()
        stopper.join()
        wait_until(lambda: n_served(host) > before, "a successor")
        assert "dead but for threads" in host.log()
        wait_until(lambda: not Path(f"/proc/{daemon}").exists(), "the predecessor's end")
        assert pread(host.images["vda"], 6) == b"stored"


def _stop_guests(host: Host) -> None:
    """Have the daemon push out what the kernel holds; it dies meanwhile."""
    client = Qmp(host.control)
    with closing(client), suppress(ConnectionError):
        client.execute("stop")


def _is_invalidating(pid: int) -> bool:
    """Tell whether a thread of a process waits in a write to /dev/fuse."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError, ValueError):
            number, first = (task / "syscall").read_text().split()[:2]
            if (
                int(number) == WRITE_NUMBERS.get(os.uname().machine)
                and os.readlink(task / "fd" / str(int(first, 16))) == "/dev/fuse"
            ):
                return True
    return False


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--resilient", "--lane", "pyfuse3"], 2, "the mount ends with the daemon"),
        (["--standby"], 2, "add --resilient"),
    ],
)
def test_what_cannot_be_is_refused(hosts: Hosts, options: list[str], code: int, text: str) -> None:
    """With the reason, and what to do."""
    image = write_random(hosts.directory / "vda.img", MIB)
    done = hosts.make("host", {"vda": image}, options=options).serve()
    assert done.exit_code == code
    assert text in done.stderr


def test_an_error_before_there_is_a_mount_ends_the_holder_with_its_exit_code(hosts: Hosts) -> None:
    """Nothing is started again that cannot work."""
    done = hosts.make("host", {"vda": hosts.directory / "missing.img"}, options=["--resilient"]).serve()
    assert done.exit_code == 2
    assert "starting a successor" not in done.stderr
