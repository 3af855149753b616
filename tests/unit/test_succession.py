"""Who keeps a mount, and when a successor may begin: what needs no mount."""

from __future__ import annotations

import array
import errno
import os
import signal
import socket
import sys
import time
from contextlib import closing, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import pytest

from fusemig.daemon.daemon import Daemon
from fusemig.daemon.disk_spec import DiskSpec
from fusemig.daemon.estate import Estate
from fusemig.daemon.serve_options import ServeOptions
from fusemig.errors import ConfigError, DiskError, FuseUnavailableError
from fusemig.handover.state_memory import StateMemory
from fusemig.notify import Notifier
from fusemig.succession.dying import waits_only_for_us
from fusemig.succession.fdstore import FdStore, identity, open_store, read_memory, write_memory
from fusemig.succession.holder import STANDBY_PAUSE_S, Holder
from fusemig.succession.mount import KeptMount, why_not

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# A process that is being killed


KILLED, ALIVE = "0000000000000100", "0000000000000000"


def process(root: Path, *threads: tuple[str, str, str, str]) -> bool:
    """Ask about a process with threads of a state, pending signals, a system call, and what its first argument is."""
    for number, (state, pending, call, target) in enumerate(threads):
        thread = root / "7" / "task" / str(number)
        (thread / "fd").mkdir(parents=True)
        (thread / "status").write_text(f"State:\t{state} (x)\nSigPnd:\t{pending}\nShdPnd:\t{ALIVE}\n")
        (thread / "syscall").write_text(call)
        (thread / "fd" / "5").symlink_to(target or "/dev/null")
    return waits_only_for_us(7, str(root), "x86_64")


def test_threads_in_a_notification_or_a_stat_can_do_no_harm(tmp_path: Path) -> None:
    """Nobody else can set them free."""
    assert process(
        tmp_path, ("Z", ALIVE, "", ""), ("D", KILLED, "1 0x5 0x0", "/dev/fuse"), ("D", KILLED, "262 0x1 0x0", "")
    )


@pytest.mark.parametrize(
    "thread",
    [
        ("D", KILLED, "18 0x5 0x0", "/var/lib/vda.img"),  # pwrite64
        ("D", KILLED, "1 0x5 0x0", "/var/lib/vda.img"),
        ("D", ALIVE, "1 0x5 0x0", "/dev/fuse"),  # it is not being killed: it comes back and goes on
        ("R", KILLED, "running", "/dev/fuse"),
        ("D", KILLED, "-1 0x0 0x0", "/dev/fuse"),  # not in a call: a page fault, an exit
        ("D", KILLED, "75 0x5 0x0", "/dev/fuse"),  # fdatasync
    ],
)
def test_any_other_thread_is_waited_for(tmp_path: Path, thread: tuple[str, str, str, str]) -> None:
    """It may be changing an image."""
    assert not process(tmp_path, ("D", KILLED, "1 0x5 0x0", "/dev/fuse"), thread)


def test_a_process_without_threads_is_not_ours_to_judge(tmp_path: Path) -> None:
    """It has ended, or there is none: waitpid says."""
    assert not process(tmp_path, ("Z", ALIVE, "", ""))
    assert not waits_only_for_us(8, str(tmp_path), "x86_64")


def test_on_an_unknown_processor_nothing_fits(tmp_path: Path) -> None:
    """Its system calls have other numbers."""
    process(tmp_path, ("D", KILLED, "1 0x5 0x0", "/dev/fuse"))
    assert not waits_only_for_us(7, str(tmp_path), "s390x")


# The store


def receive(server: socket.socket) -> tuple[str, list[int]]:
    """Take one message as systemd does."""
    text, descriptors, _, _ = socket.recv_fds(server, 4096, 8)
    return text.decode(), list(descriptors)


def test_what_is_kept_is_sent_as_systemd_takes_it(tmp_path: Path) -> None:
    """Over a path or an abstract name, with the descriptor beside it; the environment tells no child of it."""
    for address in (str(tmp_path / "notify"), f"@fusemig-test-{os.getpid()}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
            server.bind(address.replace("@", "\0"))
            environment = {"NOTIFY_SOCKET": address, "FDSTORE": "9", "HOME": "/"}
            with closing(open_store(environment)) as store:
                assert environment == {"HOME": "/"}
                assert store.room == 9
                assert store.is_on
                memory = write_memory("test", b"content")
                store.keep("state", memory)
                os.close(memory)
                text, descriptors = receive(server)
                assert text.splitlines() == ["FDSTORE=1", "FDNAME=state", "FDPOLL=0"]
                assert read_memory(descriptors[0]) == b"content"
                store.forget("state")
                assert receive(server)[0].splitlines() == ["FDSTOREREMOVE=1", "FDNAME=state"]
                store.ready()
                assert receive(server)[0].startswith("READY=1")
                store.ending()
                assert receive(server)[0] == "STOPPING=1"


def test_descriptors_of_others_are_not_taken() -> None:
    """LISTEN_PID is another process: sd_listen_fds(3)."""
    with closing(
        open_store({"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "fuse"})
    ) as store:
        assert not store.has_mount
        assert not store.is_on
        store.keep("fuse", 0)  # nobody is there: nothing happens


def test_a_successor_that_fails_takes_nothing_away_but_its_own() -> None:
    """The next one needs what was inherited."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with (
        theirs,
        closing(FdStore({"fuse": os.memfd_create("x"), "image-1": os.memfd_create("y")}, Notifier(ours))) as store,
    ):
        taken = store.take("image-1")
        assert taken is not None
        store.release("image-1")
        store.keep("image-2", taken)
        os.close(taken)
        for descriptor in receive(theirs)[1]:
            os.close(descriptor)
        store.release("image-2")
        assert "FDNAME=image-2" in receive(theirs)[0]
        store.ending()
        store.release("image-1")
        assert [receive(theirs)[0] for _ in range(2)] == ["STOPPING=1", "FDSTOREREMOVE=1\nFDNAME=image-1"]
        assert store.untaken("") == ["fuse"]


def test_a_holder_that_is_gone_makes_a_daemon_an_ordinary_one() -> None:
    """It is noticed with the next message."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with closing(FdStore({}, Notifier(ours))) as store:
        store.mounted()
        assert not store.is_last
        theirs.close()
        store.ready()
        assert not store.is_on
        assert store.is_last


def test_a_full_store_is_noticed_and_its_marks_have_places_of_their_own() -> None:
    """It would drop what it is sent without a word: the mount, or that a sync has failed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs, closing(FdStore({}, Notifier(ours), room=3)) as store:
        store.reserve(1)
        store.keep("image-1", 0)
        store.keep("image-2", 0)
        with pytest.raises(ConfigError, match="no room to keep 'fuse'"):
            store.keep("fuse", 0)
        store.keep("failed-image-1", 0)
        store.forget("image-2")
        store.keep("fuse", 0)
        kept = [receive(theirs) for _ in range(5)]
        for descriptor in (one for _, descriptors in kept for one in descriptors):
            os.close(descriptor)
        assert [text.split("FDNAME=")[1].split()[0] for text, _ in kept] == [
            *("image-1", "image-2", "failed-image-1", "image-2", "fuse")
        ]
    with closing(FdStore({}, room=0)) as store:
        store.keep("fuse", 0)  # nobody keeps anything


@pytest.mark.parametrize(
    ("n_disks", "is_resilient", "step"),
    [(1, True, ""), (2, True, "fewer disks per daemon"), (2, False, "FileDescriptorStoreMax=14 in the unit")],
)
def test_disks_that_could_not_all_be_kept_are_refused_before_there_is_a_mount(
    tmp_path: Path, n_disks: int, *, is_resilient: bool, step: str
) -> None:
    """Each has an image, a map, and a place for a mark beside either."""
    disks = [DiskSpec(f"vd{number}", tmp_path / f"{number}.img") for number in range(n_disks)]
    for disk in disks:
        disk.path.write_bytes(bytes(512))
    options = ServeOptions(tmp_path, tuple(disks), tmp_path / "control", is_resilient=is_resilient)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    refusal = pytest.raises(ConfigError, match=step) if step else nullcontext()
    with theirs, closing(FdStore({}, Notifier(ours), room=10)) as store, refusal, Estate(options, store) as estate:
        assert len(estate.disks) == n_disks


@pytest.mark.parametrize("is_known", [True, False], ids=["", "twin"])
def test_an_image_that_was_cut_is_no_smaller_disk_for_a_successor(tmp_path: Path, *, is_known: bool) -> None:
    """What was lost stays an error, and a sync one too; where no size was left a successor cannot tell."""
    disk = DiskSpec("vda", tmp_path / "vda.img")
    disk.path.write_bytes(bytes(8192))
    options = ServeOptions(tmp_path, (disk,), tmp_path / "control")
    with Estate(options, FdStore()) as estate:
        state = Daemon(options, estate).inheritance.state()
    assert state.sizes == {"vda": 8192}
    memory = StateMemory.create()
    memory.write(state if is_known else msgspec.structs.replace(state, sizes={}))
    image = os.open(disk.path, os.O_RDWR)
    os.truncate(disk.path, 4096)
    with (
        closing(FdStore({"state": memory.fd, f"image-{identity(image)}": image})) as store,
        Estate(options, store) as estate,
    ):
        found = estate.disks["vda"].image
        assert found is not None
        assert found.size == (8192 if is_known else 4096)
        if is_known:
            for call in (found.flush, partial(found.pread, 4096, 4096), lambda: list(found.extents(0, 8192))):
                with pytest.raises(DiskError) as caught:
                    call()
                assert caught.value.errno == errno.EIO
            os.truncate(disk.path, 8192)
        found.flush()


# The kernel


@pytest.mark.parametrize(
    ("release", "is_fit"),
    [("6.9.0", True), ("6.18.44-x", True), ("7.0-rc1", True), ("6.8.12", False), ("5.10.0-30-amd64", False)],
)
def test_kernels_before_6_9_cannot_send_again(monkeypatch: pytest.MonkeyPatch, release: str, is_fit: bool) -> None:
    """And are named."""
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "host", release, "", "x86_64")))
    assert (not why_not()) is is_fit
    assert is_fit or release in why_not()


def test_a_kernel_that_says_it_cannot_is_believed() -> None:
    """Whatever its version: nothing is kept any more, and who demanded it is refused."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs, closing(FdStore({}, Notifier(ours))) as store:
        kept = KeptMount(store, is_demanded=True)
        kept.keep_device(0)
        kept.check()
        kept.keep_init(b"", can_resend=False)
        with pytest.raises(FuseUnavailableError, match="cannot send unanswered requests again"):
            kept.check()


# The holder


def test_the_holder_listens_to_nobody_but_the_daemon() -> None:
    """A stranger's word, and his descriptor, are dropped."""
    holder = Holder("/nowhere", [sys.executable], has_standby=False)
    with holder.notifications, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.connect("\0" + holder.address[1:])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]).tobytes())]
        client.sendmsg([b"FDSTORE=1\nFDNAME=fuse"], rights)
        holder._hear()
        assert holder.stored == {}
        holder.daemon = os.getpid()
        client.sendmsg([b"FDSTORE=1\nFDNAME=fuse"], rights)
        client.sendmsg([b"READY=1"])
        holder._hear()
        assert list(holder.stored) == ["fuse"]
        assert holder.is_ready
        client.sendmsg([b"FDSTOREREMOVE=1\nFDNAME=fuse"])
        holder._hear()
        assert holder.stored == {}
    os.close(holder.signals)
    os.close(holder.signalled)


@pytest.fixture
def holder() -> Iterator[Holder]:
    """Give one whose daemons wait for the end of their input, and own nothing else."""
    made = Holder("/nowhere", [sys.executable, "-c", "import os; os.read(3, 1)"], has_standby=True)
    with made.notifications:
        yield made
    made._end()
    os.close(made.signals)
    os.close(made.signalled)


def test_a_standby_that_ends_by_itself_has_a_successor(holder: Holder) -> None:
    """Not at once: what ended it may last."""
    holder._start_standby()
    first = holder.standby
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    before = time.monotonic()
    assert not holder._reap()
    assert holder.standby == 0
    assert holder.standby_at is not None
    assert holder.standby_at >= before + STANDBY_PAUSE_S
    holder._start_standby()
    assert holder.standby not in (0, first)


def test_a_standby_does_not_take_the_place_of_a_candidate(holder: Holder) -> None:
    """One that was due when an upgrade was agreed is left out: the candidate waits warm already."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        holder._obey({"X_FUSEMIG_UPGRADE": "1"}, array.array("i", [theirs.fileno()]))
    candidate = holder.candidate
    holder.standby_at = 0.0
    holder._obey({"X_FUSEMIG_HANDOVER": "1"}, array.array("i"))
    holder._start_standby()
    assert holder.standby == candidate != 0


@pytest.mark.parametrize(("code", "expected"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_without_a_mount_the_holder_ends_as_its_daemon(code: str, expected: int) -> None:
    """There is nothing to keep."""
    program = "import sys; from fusemig.succession.holder import main; sys.exit(main(sys.argv[1:]))"
    daemon = [sys.executable, "-c", f"import os, sys; {code}"]
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", program, "/nowhere", *daemon], os.environ)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == expected
