"""``fusemig migrate --group``: move disks of several daemons in one switchover, all or none (docs/groups.md).

`coordinate` is what the coordinator does with daemons and the decision, as `fusemig.core.group` says; `DaemonMember` is
a daemon over its control socket. The coordinator may die at any step: nothing waits for it.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from fusemig.cli.exits import EXIT_CODES, fail
from fusemig.cli.progress import make_display
from fusemig.control.client import QmpError, open_control
from fusemig.core.group import PAST, Standing, Step, Word, next_step
from fusemig.errors import ConfigError, FusemigError, StateError
from fusemig.failpoint import arm, reach
from fusemig.records.decision import COORDINATOR, DecisionFile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from fusemig.cli.migrate import MigrateRequest
    from fusemig.cli.progress import Display
    from fusemig.control.client import ControlClient

CALM_S: Final = 0.1
"""Between two looks while passes are made."""
SWITCHING_S: Final = 0.003
"""While guests' writes wait."""
_UNKNOWN_MEMBER: Final = "Parameter 'x-fusemig-group' is unexpected"


class Member(Protocol):
    """A daemon of the group."""

    async def start(self, group: Path) -> None:
        """Begin its migration; raises `FusemigError` if it refuses."""

    async def look(self) -> Standing:
        """Return where it is; MOVED, STAYS and LOST are for ever, and whatever goes wrong is LOST."""

    async def proceed(self) -> None:
        """Have it switch over."""

    async def call_off(self) -> None:
        """Cancel its migration, if that can be; what is pledged learns of it by the decision."""


async def coordinate(
    members: Sequence[Member],
    decision: DecisionFile,
    offload: Callable[..., Awaitable[Any]] = trio.to_thread.run_sync,
    is_called_off: Callable[[], bool] = lambda: False,
) -> Word:
    """Lead a group to its end; return what was decided.

    Args:
        members: its daemons, which nothing was said to yet.
        decision: of a group of a name that was never used.
        offload: runs calls that may sleep.
        is_called_off: whether the user wants it no more.

    Raises:
        StateError: nothing can be written or read in its directory: whatever is decided, each daemon finds it.
        FusemigError: a daemon refused to begin; the others were called off.
    """
    try:
        await offload(decision.lay, Word.COMMIT, COORDINATOR)
        await offload(decision.lay, Word.ABORT, f"{COORDINATOR}-abort")
        try:
            return await _lead(members, decision, offload, is_called_off)
        except BaseException:
            # Whoever is pledged does as is decided, by somebody; the others need not wait for a switchover any more.
            with trio.CancelScope(shield=True):
                with suppress(StateError):
                    await offload(decision.propose, f"{COORDINATOR}-abort")
                await _call_off(members)
            raise
    finally:
        with trio.CancelScope(shield=True):
            for who in (COORDINATOR, f"{COORDINATOR}-abort"):
                await offload(decision.forget, who)


async def _lead(
    members: Sequence[Member],
    decision: DecisionFile,
    offload: Callable[..., Awaitable[Any]],
    is_called_off: Callable[[], bool],
) -> Word:
    word: Word | None = None
    is_continued = False
    for member in members:
        await member.start(decision.path)
        reach("after-one-started")
    reach("after-started")
    while True:
        standings = [await member.look() for member in members]
        match next_step(standings, word, is_continued=is_continued, is_called_off=is_called_off()):
            case Step.CONTINUE:
                is_continued = True
                for member in members:
                    await member.proceed()
                    reach("after-one-continued")
                reach("after-continued")
            case Step.PROPOSE_COMMIT:
                reach("before-proposal")
                word = await offload(decision.propose, COORDINATOR)
            case Step.PROPOSE_ABORT:
                word = await offload(decision.propose, f"{COORDINATOR}-abort")
                if word is Word.ABORT:
                    await _call_off(members)
            case Step.REMOVE:
                reach("after-over")
                assert word is not None
                await offload(decision.remove)
                return word
            case Step.LEAVE:
                assert word is not None
                return word
            case Step.WAIT:
                await trio.sleep(SWITCHING_S if is_continued else CALM_S)


async def _call_off(members: Sequence[Member]) -> None:
    for member in members:
        await member.call_off()


class DaemonMember:
    """A daemon, over its control socket."""

    def __init__(self, socket: Path, uri: str, request: MigrateRequest, display: Display) -> None:
        """Be about the disks of the daemon at ``socket``, which go to ``uri``; `connect` comes first."""
        self.socket = socket
        self.info: dict[str, Any] = {}
        """The last answer of ``query-migrate``."""
        self.lost: FusemigError | None = None
        self._uri = uri
        self._request = request
        self._display = display
        self._control: ControlClient | None = None
        self._session = ""
        self._has_begun = False
        self.standing = Standing.MOVING
        """As it was seen last."""
        self._limit_ms = 0.0

    def connected(self, control: ControlClient) -> None:
        """Use this connection; another one would lead to another process, which has pledged nothing."""
        self._control = control

    async def start(self, group: Path) -> None:
        """Begin (`Member.start`)."""
        assert self._control is not None
        if parameters := self._request.parameters():
            await self._control.execute("migrate-set-parameters", parameters)
        self._limit_ms = (await self._control.execute("query-migrate-parameters"))["downtime-limit"]
        arguments = self._request.arguments() | {"uri": self._uri, "x-fusemig-group": str(group)}
        try:
            await self._control.execute("migrate", arguments)
        except QmpError as exc:
            if exc.desc.startswith(_UNKNOWN_MEMBER):
                raise ConfigError(
                    f"the daemon at '{self.socket}' is of a version that knows no groups: upgrade it first"
                ) from exc
            raise QmpError(exc.error_class, f"{self.socket}: {exc.desc}", exc.kind) from exc
        self._has_begun = True

    async def look(self) -> Standing:
        """Return where it is (`Member.look`); it is asked no more once that is for ever."""
        assert self._control is not None
        if self.standing in PAST:
            return self.standing  # whatever becomes of the daemon now
        if self.lost is not None:
            return Standing.LOST
        try:
            info = await self._control.execute("query-migrate")
        except FusemigError as exc:
            self.lost = exc
            return Standing.LOST
        own = info.get("x-fusemig", {})
        session = own.get("session", "")
        if self._session not in ("", session):
            self.lost = StateError("another migration began there before this one's outcome was read")
            return Standing.LOST
        self._session, self.info = session, info
        self._display.show(info, str(self.socket))
        self.standing = standing_of(info, self._limit_ms)
        return self.standing

    async def proceed(self) -> None:
        """Have it switch over (`Member.proceed`)."""
        assert self._control is not None
        try:
            await self._control.execute("migrate-continue", {"state": "pre-switchover"})
        except QmpError:
            return  # it waits no more: the next look tells why
        except FusemigError as exc:
            self.lost = exc

    async def call_off(self) -> None:
        """Cancel its migration (`Member.call_off`)."""
        if self._control is None or self.lost is not None or not self._has_begun:
            return
        try:
            await self._control.execute("migrate_cancel")
        except QmpError:
            return  # it is pledged, and learns of it, or over
        except FusemigError as exc:
            self.lost = exc


def standing_of(info: Mapping[str, Any], limit_ms: float) -> Standing:
    """Return where a daemon is by its answer to ``query-migrate``, and by its downtime limit."""
    own = info.get("x-fusemig", {})
    status, phase = info.get("status"), own.get("phase")
    if status == "completed":
        return Standing.MOVED
    if phase == "in-doubt":
        return Standing.DOUBTFUL
    if status in ("failed", "cancelled"):
        return Standing.STAYS
    if phase == "pledged":
        return Standing.PLEDGED
    if phase == "pre-switchover":
        is_connected = not own.get("waiting")
        fits = info.get("expected-downtime", 0) <= limit_ms + 1  # the daemon rounds up
        return Standing.READY if is_connected and fits else Standing.MOVING
    return Standing.MOVING


def parse_places(texts: Sequence[str]) -> list[tuple[Path, str]]:
    """Return what ``SOCKET=URI ...`` means.

    Raises:
        ConfigError: it is not written so, or a daemon is named twice.
    """
    places: list[tuple[Path, str]] = []
    for text in texts:
        socket, separator, uri = text.partition("=")
        if not separator or not socket or not uri:
            raise ConfigError(f"'{text}': with --group write SOCKET=URI, such as /run/a.sock=tcp:b.example:7000")
        places.append((Path(socket), uri))
    seen: set[str] = set()
    for path, _ in places:
        real = os.path.realpath(path)
        if real in seen:
            raise ConfigError(
                f"'{path}' is named twice: all disks of a daemon move with one SOCKET=URI; leave the other out"
            )
        seen.add(real)
    return places


def check_request(request: MigrateRequest) -> None:
    """Raise `ConfigError` if something was asked for that does not go with a group."""
    for is_asked, option, why in (
        (request.mode == "postcopy", "--mode postcopy", "it hands over when it begins"),
        (request.wire == "qemu", "--wire qemu", "it has no two-phase commit"),
        (request.guest is not None, "--guest", "its hand-over is its own"),
        (request.pause_command is not None, "--pause-command", "its hand-over is its own"),
        (bool(request.disks), "--disk", "all disks of each daemon move"),
        (request.detach, "--detach", "this command leads the switchover"),
    ):
        if is_asked:
            raise ConfigError(f"{option} does not go with --group, for {why}: leave it out")


async def migrate_group_command(directory: Path, texts: Sequence[str], request: MigrateRequest) -> int:
    """Move a group; return the exit code.

    Cancellation by SIGINT: the first calls the group off if it is not decided, the second gives up waiting.
    """
    arm(os.environ)
    check_request(request)
    places = parse_places(texts)
    decision = DecisionFile(directory / uuid.uuid4().hex)
    await trio.to_thread.run_sync(decision.check)
    interrupts = [0]
    with make_display(request.progress) as display:
        members = [DaemonMember(socket, uri, request, display) for socket, uri in places]
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_count_interrupts, signals, interrupts, nursery.cancel_scope)
                outcome: Word | FusemigError
                try:
                    outcome = await _with_controls(members, decision, lambda: interrupts[0] > 0)
                except FusemigError as exc:
                    outcome = exc
                nursery.cancel_scope.cancel()
    if interrupts[0] > 1:
        raise KeyboardInterrupt
    if isinstance(outcome, FusemigError):
        raise outcome
    return tell(members, outcome, decision, is_cancelled=interrupts[0] > 0, is_quiet=request.progress == "json")


async def _count_interrupts(signals: AsyncIterator[int], counted: list[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        counted[0] += 1
        if counted[0] > 1:
            scope.cancel()
        print("fusemig: calling the group off (interrupt again to stop waiting)", file=sys.stderr)


async def _with_controls(
    members: Sequence[DaemonMember], decision: DecisionFile, is_called_off: Callable[[], bool]
) -> Word:
    """Connect to every daemon before anything begins anywhere."""

    async def connect(left: Sequence[DaemonMember]) -> Word:
        if not left:
            return await coordinate(members, decision, is_called_off=is_called_off)
        async with open_control(left[0].socket) as control:
            left[0].connected(control)
            return await connect(left[1:])

    return await connect(members)


def tell(
    members: Sequence[DaemonMember], word: Word, decision: DecisionFile, *, is_cancelled: bool, is_quiet: bool
) -> int:
    """Say what became of each daemon; return the exit code of the worst."""
    codes = []
    for member in members:
        status = member.info.get("status")
        own = member.info.get("x-fusemig", {})
        if member.lost is not None and member.standing not in PAST:
            outcome = (
                "the group moves, and its disks with it, at the latest when they are served again"
                if word is Word.COMMIT
                else "the group was called off, so its disks stay"
            )
            codes.append(fail(f"{member.socket}: {member.lost}; {outcome}: see `fusemig status` there", "in-doubt"))
        elif status == "completed":
            codes.append(0)
            if not is_quiet:
                print(
                    f"fusemig: {member.socket}: completed in {member.info['total-time'] / 1000:.2f} s, "
                    f"{own['pass']} passes, downtime {member.info.get('downtime', '?')} ms",
                    file=sys.stderr,
                )
        else:
            kind = "cancelled" if status == "cancelled" else own.get("error-kind", "failed")
            codes.append(fail(f"{member.socket}: {member.info.get('error-desc', 'its disks stay here')}", kind))
    in_doubt, cancelled = EXIT_CODES["in-doubt"], EXIT_CODES["cancelled"]
    if in_doubt in codes:
        print(f"fusemig: the decision is kept in {decision.path}.decision", file=sys.stderr)
        return in_doubt
    if is_cancelled and word is Word.ABORT:
        return cancelled
    # Those that were called off for another's sake say less than that one does.
    return next((code for code in codes if code not in (0, cancelled)), max(codes))
