"""The rules of a group, the file that decides, and what the command line refuses."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from fusemig.cli.group import DaemonMember, check_request, coordinate, parse_places, standing_of, tell
from fusemig.cli.migrate import MigrateRequest
from fusemig.cli.progress import make_display
from fusemig.control.client import QmpError
from fusemig.core.group import OVER, PAST, Conduct, Standing, Step, Word, conduct, next_step
from fusemig.disk.raw import file_system_of
from fusemig.errors import (
    ConfigError,
    ConnectionLostError,
    FusemigError,
    MigrationError,
    RemoteProtocolError,
    StateError,
)
from fusemig.migration.link import BufferPool, NativeLink
from fusemig.migration.pledge import Pledge
from fusemig.records.decision import COORDINATOR, DecisionFile
from fusemig.wire import native
from support.pair import inline
from support.streams import memory_connection

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fusemig.control.client import ControlClient


@pytest.mark.parametrize(
    ("word", "is_overdue", "expected"),
    [
        (None, False, Conduct.WAIT),
        (None, True, Conduct.PROPOSE_ABORT),
        (Word.COMMIT, False, Conduct.HAND_OFF),
        (Word.COMMIT, True, Conduct.HAND_OFF),
        (Word.ABORT, False, Conduct.TAKE_BACK),
        (Word.ABORT, True, Conduct.TAKE_BACK),
    ],
)
def test_conduct(word: Word | None, is_overdue: bool, expected: Conduct) -> None:
    """A decision counts whenever it comes; no time-out replaces one."""
    assert conduct(word, is_overdue=is_overdue) is expected


def test_every_next_step() -> None:
    """Of three daemons, in all of their standings, said otherwise than the code does."""
    n_commits = 0
    for standings in itertools.product(Standing, repeat=3):
        for word, is_continued, is_called_off in itertools.product((None, *Word), (False, True), (False, True)):
            step = next_step(standings, word, is_continued=is_continued, is_called_off=is_called_off)
            kinds = set(standings)
            if step is Step.PROPOSE_COMMIT:
                n_commits += 1
                assert kinds == {Standing.PLEDGED}
            if step is Step.REMOVE:
                assert word is not None
                assert kinds <= PAST
            if step is Step.CONTINUE:
                assert kinds == {Standing.READY}
                assert not is_continued
            if word is None:
                assert (step is Step.PROPOSE_ABORT) == (is_called_off or bool(kinds & OVER))
            else:
                assert step in (Step.WAIT, Step.REMOVE, Step.LEAVE)
                assert (step is Step.WAIT) == bool(kinds - OVER)
    assert n_commits == 2


@pytest.mark.parametrize("first", Word)
def test_who_is_first_decides(tmp_path: Path, first: Word) -> None:
    """And whoever comes later learns of it; when nobody needs it any more nothing is left."""
    file = DecisionFile(tmp_path / "g")
    file.check([tmp_path])
    others = {Word.COMMIT: Word.ABORT, Word.ABORT: Word.COMMIT}
    file.lay(first, "a")
    file.lay(others[first], "b")
    assert file.read() is None
    assert file.propose("a") is first
    assert file.propose("b") is first
    assert DecisionFile(tmp_path / "g").read() is first
    for who in "ab":
        file.forget(who)
    file.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", [None, *Word])
async def test_a_pledge_whose_time_is_up(tmp_path: Path, word: Word | None) -> None:
    """It ends by what is decided, also where that was decided in the last moment; or decides, for everybody."""
    forth, back = memory_connection()
    pledge, file = Pledge(tmp_path / "g", "me", inline), DecisionFile(tmp_path / "g")
    file.lay(Word.COMMIT, COORDINATOR)
    await pledge.prepare()
    if word is not None:
        file.lay(word, "other")
        file.propose("other")
        with pytest.raises(MigrationError, match="was called off"):
            await pledge.check()
    link = NativeLink(forth, native.Decoder(native.FROM_DESTINATION, preface=False), BufferPool())
    assert await pledge.decision(link, trio.current_time()) is (word or Word.ABORT)
    assert file.read() is (word or Word.ABORT)
    await forth.aclose()
    await back.aclose()


@pytest.mark.parametrize("missing", ["me", COORDINATOR])
async def test_a_directory_that_is_not_the_coordinators_is_no_place_for_a_pledge(tmp_path: Path, missing: str) -> None:
    """Another one under the same name would have a decision of its own; nor is one that lost what was laid there."""
    pledge, file = Pledge(tmp_path / "g", "me", inline), DecisionFile(tmp_path / "g")
    file.lay(Word.COMMIT, COORDINATOR)
    await pledge.prepare()
    await pledge.check()
    file.forget(missing)
    with pytest.raises(StateError, match="must see the same directory"):
        await pledge.check()


def test_whoever_loses_can_read_what_was_decided(tmp_path: Path) -> None:
    """The proposer's umask says nothing of who else has to know."""
    before = os.umask(0o077)
    try:
        DecisionFile(tmp_path / "g").lay(Word.COMMIT, "a")
    finally:
        os.umask(before)
    DecisionFile(tmp_path / "g").propose("a")
    assert (tmp_path / "g.decision").stat().st_mode & 0o777 == 0o644


def test_who_has_laid_nothing_decides_nothing(tmp_path: Path) -> None:
    """A directory in the place of one that is not mounted looks undecided, and must not be taken for that."""
    file = DecisionFile(tmp_path / "g")
    with pytest.raises(StateError, match="nothing can be decided there"):
        file.propose("a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"commit", b"commit\n\n", b"abort\nabort\n", b"\0" * 16, b"perhaps\n"])
def test_what_is_no_decision_says_nothing(tmp_path: Path, content: bytes) -> None:
    """Nothing is concluded from it; the twin is read above."""
    (tmp_path / "g.decision").write_bytes(content)
    with pytest.raises(StateError, match="neither 'commit' nor 'abort'"):
        DecisionFile(tmp_path / "g").read()


@pytest.mark.parametrize("name", ["", "a.b", "a b", "..", "x" * 101])
def test_names_that_are_refused(tmp_path: Path, name: str) -> None:
    """They become parts of names of files."""
    with pytest.raises(ConfigError):
        DecisionFile(Path(f"{tmp_path}/{name}") if name else Path("g")).check()


def test_a_directory_that_a_power_loss_empties(tmp_path: Path) -> None:
    """Refused for disks whose records outlive that; not where they lie together."""
    memory = Path("/dev/shm")  # noqa: S108
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    fd = os.open(tmp_path, os.O_RDONLY)
    is_in_memory = file_system_of(fd) in {"tmpfs", "ramfs"}
    os.close(fd)
    if is_in_memory:
        pytest.skip("temporary files are in memory here: name a directory on a disk with --basetemp")
    with pytest.raises(ConfigError, match="which a power loss empties"):
        DecisionFile(memory / "g").check([tmp_path])
    DecisionFile(memory / "g").check([memory])
    DecisionFile(tmp_path / "g").check([memory])


class Daemon:
    """What a coordinator hears at a control socket: an answer to each `query-migrate`, or an error."""

    def __init__(self, *said: tuple[str, str] | FusemigError) -> None:
        """Say these in turn, each a status and a phase, the last one for ever."""
        self._said = list(said)
        self.n_asked = 0

    async def execute(self, command: str, arguments: object = None) -> Any:
        await trio.lowlevel.checkpoint()
        if command == "query-migrate-parameters":
            return {"downtime-limit": 300}
        if command != "query-migrate":
            return {}
        self.n_asked += 1
        now = self._said.pop(0) if len(self._said) > 1 else self._said[0]
        if isinstance(now, FusemigError):
            raise now
        status, phase = now
        own = {"phase": phase, "session": "5e55", "pass": 3}
        return {"status": status, "x-fusemig": own, "expected-downtime": 1, "total-time": 9.0}


WAITS, PLEDGED, MOVED = ("pre-switchover", "pre-switchover"), ("device", "pledged"), ("completed", "completed")
GONE = ConnectionLostError("the daemon closed the connection")
GARBAGE = RemoteProtocolError("the daemon sent a second greeting")


def left_in(directory: Path) -> list[str]:
    """Return what lies in the group's directory."""
    return [path.name for path in directory.iterdir()]


async def lead(directory: Path, *daemons: Daemon) -> tuple[Word, list[DaemonMember], DecisionFile]:
    """Lead daemons that say what they say through a group."""
    request, decision = MigrateRequest(socket=Path(), uri="", progress="none"), DecisionFile(directory / "g")
    with make_display("none") as display:
        members = [DaemonMember(Path(f"/run/{n}"), "unix:/x", request, display) for n in range(len(daemons))]
        for member, daemon in zip(members, daemons, strict=True):
            member.connected(cast("ControlClient", daemon))
        with trio.fail_after(20):
            return await coordinate(members, decision, inline), members, decision


async def test_a_daemon_that_ends_when_its_disks_have_moved_is_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that becomes of it changes that; nobody needs the decision any more."""
    first = Daemon(WAITS, PLEDGED, MOVED, GONE)
    second = Daemon(WAITS, PLEDGED, PLEDGED, PLEDGED, PLEDGED, MOVED)
    word, members, decision = await lead(tmp_path, first, second)
    assert word is Word.COMMIT
    assert [member.standing for member in members] == [Standing.MOVED] * 2
    assert first.n_asked == 3
    assert left_in(tmp_path) == []
    assert tell(members, word, decision, is_cancelled=False, is_quiet=False) == 0
    assert "closed the connection" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [GONE, GARBAGE, QmpError("GenericError", "an internal error")])
async def test_a_daemon_that_is_lost_after_the_decision_is_told_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: FusemigError
) -> None:
    """However it is lost, the group moves: the decision stays for it, and the command tells of all before it fails."""
    word, members, decision = await lead(tmp_path, Daemon(WAITS, PLEDGED, MOVED), Daemon(WAITS, PLEDGED, error))
    assert word is Word.COMMIT
    assert left_in(tmp_path) == ["g.decision"]
    assert tell(members, word, decision, is_cancelled=False, is_quiet=False) == 7
    said = capsys.readouterr().err
    assert f"/run/1: {error}; the group moves, and its disks with it" in said
    assert "/run/0: completed" in said


@pytest.mark.parametrize("error", [GONE, GARBAGE])
async def test_a_daemon_that_is_lost_before_the_decision_keeps_the_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: FusemigError
) -> None:
    """All stay, and that is what is said."""
    word, members, decision = await lead(
        tmp_path, Daemon(WAITS, PLEDGED, ("cancelled", "cancelled")), Daemon(WAITS, error)
    )
    assert word is Word.ABORT
    assert tell(members, word, decision, is_cancelled=False, is_quiet=False) == 7
    assert f"/run/1: {error}; the group was called off, so its disks stay" in capsys.readouterr().err


async def test_a_directory_that_fills_up_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator could lay one of its proposals and not the other."""
    lay = DecisionFile.lay

    def fail(self: DecisionFile, word: Word, who: str) -> None:
        if word is Word.ABORT:
            raise StateError("No space left on device")
        lay(self, word, who)

    monkeypatch.setattr(DecisionFile, "lay", fail)
    with pytest.raises(StateError, match="No space"):
        await lead(tmp_path, Daemon(WAITS))
    assert left_in(tmp_path) == []


def test_places() -> None:
    """SOCKET=URI, each daemon once, also by another name of its socket."""
    assert parse_places(["/run/a=tcp:h:1", "/run/b=unix:/x=y"]) == [
        (Path("/run/a"), "tcp:h:1"),
        (Path("/run/b"), "unix:/x=y"),
    ]
    for wrong in ("/run/a", "=tcp:h:1", "/run/a="):
        with pytest.raises(ConfigError, match="write SOCKET=URI"):
            parse_places([wrong])
    with pytest.raises(ConfigError, match="is named twice"):
        parse_places(["/run/a=tcp:h:1", "/run/../run/a=tcp:h:2"])


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"mode": "postcopy"}, "--mode postcopy does not go with --group"),
        ({"wire": "qemu"}, "--wire qemu"),
        ({"guest": "qmp:/x"}, "--guest"),
        ({"pause_command": "true"}, "--pause-command"),
        ({"disks": ("vda",)}, "--disk"),
        ({"detach": True}, "--detach"),
    ],
)
def test_options_that_do_not_go_with_it(option: Mapping[str, Any], text: str) -> None:
    """One text each; the twin: the others do."""
    check_request(MigrateRequest(socket=Path(), uri="", mode="mirror", compress="zstd", resume=True))
    with pytest.raises(ConfigError, match=text):
        check_request(MigrateRequest(socket=Path(), uri="", **option))


@pytest.mark.parametrize(
    ("status", "phase", "expected"),
    [
        ("active", "bulk", Standing.MOVING),
        ("pre-switchover", "pre-switchover", Standing.READY),
        ("device", "frozen", Standing.MOVING),
        ("device", "pledged", Standing.PLEDGED),
        ("device", "committed", Standing.MOVING),
        ("completed", "completed", Standing.MOVED),
        ("failed", "in-doubt", Standing.DOUBTFUL),
        ("failed", "failed", Standing.STAYS),
        ("cancelled", "cancelled", Standing.STAYS),
    ],
)
def test_standings(status: str, phase: str, expected: Standing) -> None:
    """What `query-migrate` says of a daemon; one that waits and would take too long is not ready."""
    info = {"status": status, "x-fusemig": {"phase": phase}, "expected-downtime": 300}
    assert standing_of(info, 300) is expected
    if expected is Standing.READY:
        assert standing_of(info, 200) is Standing.MOVING
        info["x-fusemig"] = {"phase": phase, "waiting": "the connection was lost"}
        assert standing_of(info, 300) is Standing.MOVING
