"""`fusemig demo` as a newcomer runs it: it shows what it promises, and nothing of it is left, however it ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fusemig.cli.demo_records import RECORD, last_durable, lost_records, read_console, record_number
from fusemig.cli.demo_writer import Commit, Log, check_plain, check_sqlite, read_log
from support.guest import PARTS, is_made, make_record
from support.qemu import is_available

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE_S = 100.0


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Have the demo put everything into a directory of its own; afterwards it must be empty and nothing mounted."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no access to /dev/fuse")
    path = tmp_path_factory.mktemp("d")
    monkeypatch.setenv("TMPDIR", str(path))
    yield path
    assert list(path.iterdir()) == []
    assert str(path) not in Path("/proc/self/mountinfo").read_text()
    # A loop device that was detached while somebody else looked at it goes when he has.
    deadline = time.monotonic() + 5
    while left := [one for one in (*loop_backings(), *processes_naming(path)) if str(path) in one]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def loop_backings() -> list[str]:
    """Return the files behind the machine's loop devices."""
    backings = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backings.append(file.read_text())
        except OSError:  # detached meanwhile, by somebody else
            continue
    return backings


def processes_naming(path: Path) -> list[str]:
    """Return the command lines of running processes that name ``path``."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:  # it has ended
            continue
        if str(path) in command:
            found.append(command)
    return found


def skeleton(screen: str) -> list[str]:
    """Return a screen of the demo without what differs from run to run: figures, digests, units."""
    lines = []
    for line in screen.splitlines():
        plain = re.sub(r"\b[0-9a-f]{32}\b|[0-9][0-9,.]*( [KMG]i?B(/s)?)?", "#", line)
        if plain.strip():
            lines.append(" ".join(plain.split()))
    return lines


@contextmanager
def demo(*arguments: str, path: str | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run the demo beside the test; whatever the test does, it is not left running."""
    environment = dict(os.environ) if path is None else {**os.environ, "PATH": path}
    command = [sys.executable, "-m", "fusemig", "demo", *arguments]
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(DEADLINE_S)


@pytest.mark.fuse
def test_the_demo_loses_nothing_and_says_so_on_one_screen(scratch: Path) -> None:
    """Exit code 0 stands for: fsck clean, every commit there, digests equal, one side writable."""
    with demo("--size", "64M", "--seconds", "1") as process:
        screen, remarks = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, screen + remarks
    assert len(screen.splitlines()) <= 24
    assert all(len(line) <= 120 for line in screen.splitlines())
    assert "FAILED" not in screen
    for key in ("writer", "disk", "moved in", "rate", "passes", "sent", "downtime", "commits", "longest pause"):
        assert re.search(rf"^  {key}  +\S", screen, re.MULTILINE), key
    for promise in (
        r"both images have the digest xxh3_128 [0-9a-f]{32}",
        r"all [\d,]+ acknowledged commits are at the destination",
        r"only the destination takes writes",
    ):
        assert re.search(rf"^  ok +{promise}", screen, re.MULTILINE), promise
    if "plain writer" not in remarks:
        assert re.search(r"^  ok +e2fsck -fn: clean$", screen, re.MULTILINE)
        assert re.search(r"^  ok +PRAGMA integrity_check: ok$", screen, re.MULTILINE)
        readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
        recorded = readme.partition("<!-- recorded by tools/record_demo -->")[2].partition("<!-- /recorded -->")[0]
        assert skeleton(recorded) == skeleton(screen), "run tools/record_demo: the demo shows something else now"
    assert screen.rstrip().endswith("everything held")


@pytest.mark.fuse
def test_without_loop_devices_a_plain_writer_goes_through_the_switchover(scratch: Path, tmp_path: Path) -> None:
    """A machine without the tools for ext4 still gets a demo, which says what took sqlite3's place."""
    helper = shutil.which("fusermount3")
    if helper is None:
        pytest.skip("no fusermount3")
    (tmp_path / "fusermount3").symlink_to(helper)
    with demo("--size", "64M", "--seconds", "1", path=str(tmp_path)) as process:
        screen, remarks = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, screen + remarks
    assert "a plain writer on the mount takes sqlite3's place" in remarks
    assert "4 KiB records, O_DSYNC, on the mount itself" in screen
    assert re.search(r"^  ok +the writer wrote over the switchover", screen, re.MULTILINE)
    assert re.search(r"^  ok +all [\d,]+ acknowledged commits are at the destination", screen, re.MULTILINE)
    assert re.search(r"^  last write +answered 'read-only'", screen, re.MULTILINE)


@pytest.mark.fuse
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_behind(scratch: Path, sign: signal.Signals) -> None:
    """Ctrl-C while the writer commits: no mount, loop device, process or file stays (see the fixture)."""
    with demo("--size", "64M", "--seconds", "60") as process:
        deadline = time.monotonic() + DEADLINE_S
        while not list(scratch.glob("*/commits")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(sign)
        _, remarks = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "fusemig demo: interrupted; cleaning up" in remarks.splitlines()


needs_guest = pytest.mark.skipif(not (is_available() and is_made()), reason="needs QEMU and a guest: tools/setup test")


@needs_guest
@pytest.mark.fuse
@pytest.mark.qemu
def test_a_vm_moves_and_it_is_told_on_one_screen(scratch: Path) -> None:
    """Exit code 0 stands for: the same boot, no gap, no record lost or torn, one side writable."""
    with demo("--guest", str(PARTS), "--size", "64M", "--seconds", "1") as process:
        screen, remarks = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, screen + remarks
    assert len(screen.splitlines()) <= 24
    assert all(len(line) <= 120 for line in screen.splitlines())
    for key in ("guest", "disk", "records", "moved in", "sent", "stood still", "timeline"):
        assert re.search(rf"^  {key}  +\S", screen, re.MULTILINE), key
    for promise in (
        r"it is the same boot, [0-9a-f-]{36}, and its numbering has no gap",
        r"it wrote on there: [1-9][\d,]* records so far",
        r"all [\d,]+ records that it reported durable are there, none is torn",
        r"only the destination takes writes",
    ):
        assert re.search(rf"^  ok +{promise}", screen, re.MULTILINE), promise
    assert screen.rstrip().endswith("everything held")


@needs_guest
@pytest.mark.fuse
@pytest.mark.qemu
def test_an_interrupted_move_of_a_vm_leaves_nothing_behind(scratch: Path) -> None:
    """Neither QEMU nor a mount nor a file (see the fixture)."""
    with demo("--guest", str(PARTS), "--size", "64M", "--seconds", "60") as process:
        deadline = time.monotonic() + DEADLINE_S
        while not any(last_durable(console.read_text()) for console in scratch.glob("*/source.console")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, remarks = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "fusemig demo: interrupted; cleaning up" in remarks.splitlines()


def test_without_a_guests_kernel_the_demo_says_how_to_get_one(tmp_path: Path) -> None:
    """Nothing is started."""
    with demo("--guest", str(tmp_path)) as process:
        _, remarks = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert f"there is no vmlinuz in it; `tools/make_guest {tmp_path}` makes it" in remarks


BOOT = "01234567-89ab-cdef-0123-456789abcdef"


def test_a_record_that_is_missing_or_torn_is_found(tmp_path: Path) -> None:
    """The proof of the VM's demo: what was reported must be there, whole, or overwritten by a later record."""
    said = "".join([f"boot {BOOT}\n", *(f"durable {number} {BOOT[:8]}\n" for number in range(1, 7))])
    account = read_console(said[:40], said[40:90], said[90:])
    assert account.is_one_guest
    assert account.numbers == [1, 2, 3, 4, 5, 6]
    image = tmp_path / "image"
    slots = [make_record(number, BOOT) for number in (5, 6, 3, 4)]
    image.write_bytes(b"".join(slots))
    assert lost_records(image, account) == []
    slots[1] = make_record(2, BOOT)  # 6 did not come
    slots[2] = slots[2][: RECORD // 2] + bytes(RECORD // 2)  # half of 3
    image.write_bytes(b"".join(slots))
    assert lost_records(image, account) == [3, 6]
    assert record_number(slots[1], BOOT) == 2
    assert record_number(slots[1], BOOT.replace("0", "1")) is None


def test_a_second_boot_or_a_gap_is_no_single_guest() -> None:
    """What would show that the guest was started anew, or lost a report."""
    said = f"boot {BOOT}\ndurable 1 {BOOT[:8]}\n"
    assert read_console(said).is_one_guest
    assert not read_console(said, said).is_one_guest
    assert not read_console(said, f"durable 3 {BOOT[:8]}\n").is_one_guest


def run_writer(kind: str, target: Path, log: Path, n_commits: int) -> None:
    """Let the demo's writer make at least ``n_commits``, then end it as the demo does."""
    command = [sys.executable, "-m", "fusemig.cli.demo_writer", kind, str(target), str(log)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not log.exists() or log.read_bytes().count(b"\n") < n_commits:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.terminate()
            process.wait(DEADLINE_S)
    assert process.returncode == 0


def test_a_commit_that_is_missing_from_the_database_is_found(tmp_path: Path) -> None:
    """The demo's proof would fail: one commit more in the log than in the database counts as lost."""
    database, log = tmp_path / "db", tmp_path / "log"
    run_writer("sqlite", database, log, 20)
    noted = read_log(log)
    assert [commit.number for commit in noted.commits] == list(range(1, len(noted.commits) + 1))
    assert check_sqlite(database, noted) == (0, "ok")
    more = Log([*noted.commits, Commit(len(noted.commits) + 1, 0.0, 1.0)], None)
    assert check_sqlite(database, more) == (1, "ok")


def test_a_record_that_is_missing_from_the_file_is_found(tmp_path: Path) -> None:
    """The same for the plain writer, also where records have overwritten each other."""
    file, log = tmp_path / "file", tmp_path / "log"
    file.write_bytes(bytes(16 * 4096))
    run_writer("plain", file, log, 40)  # more records than places
    noted = read_log(log)
    assert check_plain(file, noted) == 0
    content = bytearray(file.read_bytes())
    content[5 * 4096 + 100] ^= 1
    file.write_bytes(content)
    assert check_plain(file, noted) == 1
