"""Doubts: the disks of a daemon that were handed off without a word of what became of them.

    watch ── for each migration pledged to a group: do what is decided, or decide (`fusemig.core.group`)
          ── for each migration in doubt: connect to its destination, `Settlement`     again and again, with back-off
    ask_at ── the same once, and from then on, where the destination has moved to
    resolve ── a person's word, with the other side fenced                             logged

Both change an epoch file, so they never do at the same time; a person's word ends a question that is under way. What is
in doubt is read from the epoch files alone, so a daemon that was started again goes on asking where its predecessor
stopped.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
import structlog
import trio

from fusemig.core.backoff import Backoff
from fusemig.disk.tracked import Gate
from fusemig.errors import ConfigError, FusemigError, InDoubtError, StateError
from fusemig.migration.settlement import DoubtfulDisk, Settlement, is_askable
from fusemig.records.decision import DecisionFile
from fusemig.records.epoch import DOUBTFUL, Ownership, Side, redeemed, resolved

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from fusemig.daemon.served import ServedDisk
    from fusemig.migration.link import Offload
    from fusemig.net.transport import ByteStream
    from fusemig.records.epoch import EpochRecord

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
"""Between two questions about the same migration."""

log = structlog.get_logger(__name__)


class OnSettled(Protocol):
    """Hears that records have changed, and whether it was a person's word that changed them."""

    def __call__(self, settled: Sequence[ServedDisk], *, is_by_hand: bool) -> None:
        """Follow."""


class Doubts:
    """Asks about what is in doubt, and takes a person's word for it."""

    def __init__(
        self,
        disks: Mapping[str, ServedDisk],
        dial: Callable[[EpochRecord], Awaitable[ByteStream]],
        on_settled: OnSettled,
        offload: Offload = trio.to_thread.run_sync,
        offload_abandonable: Offload | None = None,
    ) -> None:
        """Look after ``disks``.

        Args:
            disks: all disks of the daemon.
            dial: connects to the destination that a record names, in time.
            on_settled: called at once when records have changed, after their disks' gates were set.
            offload: runs calls that may sleep.
            offload_abandonable: the same, of calls that need not be waited for: a person must not wait for a
                directory of a group that hangs; None: a thread.
        """
        self._offload = offload
        self._offload_abandonable = offload_abandonable or partial(trio.to_thread.run_sync, abandon_on_cancel=True)
        self._disks = disks
        self._dial = dial
        self._on_settled = on_settled
        self._changing = trio.Lock()
        self._question = trio.CancelScope()
        self._new = trio.Event()

    def look(self) -> None:
        """Ask soon: something may be in doubt that was not."""
        self._new.set()

    async def watch(self) -> None:
        """Ask until cancelled; waits for `look` while there is nothing to ask.

        Cancellation: at any moment; what is settled is durable.
        """
        backoff = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        while True:
            self._new = trio.Event()
            sessions = self._sessions()
            for session in sessions:
                await self._ask(session)
            if not self._sessions():
                backoff.reset()
                await self._new.wait()
                continue
            with trio.move_on_after(backoff.next_s()):
                await self._new.wait()
                backoff.reset()

    def _sessions(self) -> list[str]:
        """Return the migrations that can be asked about now."""
        found: dict[str, None] = {}
        for served in in_doubt(self._disks):
            record = served.epoch_file.record
            assert record is not None
            if served.busy:
                continue
            if record.state is Ownership.PLEDGED or is_askable(served.epoch_file):
                found[record.session] = None
            else:
                served.doubt = "nobody can be asked: look at the destination, then see `fusemig resolve --help`"
        return list(found)

    async def _ask(self, session: str) -> None:
        async with self._changing:
            chosen = [served for served in in_doubt(self._disks) if _session(served) == session and not served.busy]
            if not chosen:
                return
            for served in chosen:
                served.busy = "its destination is being asked whether it took it"
            try:
                with trio.CancelScope() as self._question:
                    handed_off = await self._redeem(chosen)
                    if handed_off:
                        await self._exchange(session, handed_off)
            finally:
                for served in chosen:
                    served.busy = ""
                self._apply([served for served in chosen if served.ownership not in DOUBTFUL], is_by_hand=False)

    async def _redeem(self, chosen: Sequence[ServedDisk]) -> list[ServedDisk]:
        """Do with pledged disks as their group is decided, or decide it; return those that are handed off then.

        None is asked about before it is known of all: together they are what the destination is to be told.
        """
        pledged = [served for served in chosen if served.ownership is Ownership.PLEDGED]
        if pledged:
            record = pledged[0].epoch_file.record
            assert record is not None
            file = DecisionFile(Path(record.decision))
            try:
                # One that comes about later does no harm: `abort` may be proposed at any time.
                word = await self._offload_abandonable(file.propose, record.session)
                for served in pledged:
                    record = served.epoch_file.record
                    assert record is not None
                    await self._offload(served.epoch_file.write, redeemed(record, word))
            except StateError as exc:
                for served in chosen:
                    if served.doubt != str(exc):
                        log.warning("in doubt", disk=served.name, reason=str(exc))
                    served.doubt = str(exc)
                return []
            log.warning("a group's decision was found", decision=word.value, disks=[served.name for served in pledged])
            await self._offload(file.forget, record.session)
        return [served for served in chosen if served.ownership is Ownership.HANDED_OFF]

    async def _exchange(self, session: str, chosen: Sequence[ServedDisk]) -> None:
        record = chosen[0].epoch_file.record
        assert record is not None
        doubtful = [DoubtfulDisk(served.name, served.epoch_file) for served in chosen]
        n_released = sum(
            served.ownership is Ownership.RELEASED and _session(served) == session for served in self._disks.values()
        )
        is_whole = len(chosen) + n_released == record.group
        try:
            stream = await self._dial(record)
            try:
                await Settlement(doubtful, self._offload, is_whole=is_whole).run(stream)
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await stream.aclose()
        except FusemigError as exc:
            for served in chosen:
                if served.doubt != str(exc):
                    log.warning("in doubt", disk=served.name, destination=record.peer, reason=str(exc))
                served.doubt = str(exc)

    async def ask_at(self, names: Sequence[str], uri: str) -> None:
        """Ask about disks at ``uri``, where their destination is now; also from then on, and after a restart.

        Raises:
            StateError: a disk is not in doubt, or nobody can be asked about it, or its file cannot be written.
            InDoubtError: that did not settle it, and why.
        """
        chosen = [self._disks[name] for name in dict.fromkeys(names)]
        self._question.cancel()
        async with self._changing:
            for served in chosen:
                record = served.epoch_file.record
                if record is not None and record.state is Ownership.PLEDGED:
                    raise StateError(f"disk '{served.name}' is as its group decides, see {record.decision}.decision")
                if served.ownership is not Ownership.HANDED_OFF:
                    raise StateError(f"disk '{served.name}' is not in doubt: there is nothing to ask")
                if served.busy:
                    raise StateError(f"disk '{served.name}' is busy: {served.busy}")
                if not is_askable(served.epoch_file):
                    raise StateError(f"disk '{served.name}' was handed off over a wire that has no questions")
            for served in chosen:
                record = served.epoch_file.record
                assert record is not None
                # Another host has another name: its certificate must say that of the URI.
                moved = msgspec.structs.replace(record, peer=uri, tls_hostname="")
                await self._offload(served.epoch_file.write, moved)
        for session in dict.fromkeys(map(_session, chosen)):
            await self._ask(session)
        left = [served for served in chosen if served.ownership is Ownership.HANDED_OFF]
        if left:
            raise InDoubtError("; ".join(dict.fromkeys(served.doubt for served in left)))

    async def resolve(self, names: Sequence[str], owner: Side, *, is_other_fenced: bool) -> None:
        """Take a person's word for who owns disks; all of them or none, unless a file cannot be written.

        Raises:
            ConfigError: he does not say that the other side is fenced.
            StateError: a disk is not in a state that can be resolved, or is busy, or its file cannot be written.
        """
        if not is_other_fenced:
            raise ConfigError(UNFENCED)
        self._question.cancel()
        async with self._changing:
            chosen = [self._disks[name] for name in dict.fromkeys(names)]
            records = []
            for served in chosen:
                if served.busy:
                    raise StateError(f"disk '{served.name}' is busy: {served.busy}")
                if owner is Side.DESTINATION and served.ownership is Ownership.PREPARED and served.disk is None:
                    raise StateError(f"disk '{served.name}' has no image here: {served.path} is missing")
                try:
                    records.append(resolved(served.epoch_file.record, owner))
                except StateError as exc:
                    raise StateError(f"disk '{served.name}': {exc}") from exc
            done = []
            for served in chosen:
                served.busy = "it is being resolved"
            try:
                for served, record in zip(chosen, records, strict=True):
                    await self._write(served, record, owner)
                    done.append(served)
            finally:
                for served in chosen:
                    served.busy = ""
                self._apply(done, is_by_hand=True)

    async def _write(self, served: ServedDisk, record: EpochRecord, owner: Side) -> None:
        before = served.ownership
        log.warning(
            "resolved by hand",
            disk=served.name,
            owner=owner.value,
            before=None if before is None else before.value,
            after=record.state.value,
            epoch=record.epoch,
            destination=record.peer,
            session=record.session,
        )
        await self._offload(served.epoch_file.write, record)

    def _apply(self, settled: Sequence[ServedDisk], *, is_by_hand: bool) -> None:
        """Have the gates say what the records do."""
        for served in settled:
            served.doubt = ""
            if served.ownership is Ownership.OWNER and served.disk is not None and not served.is_read_only:
                served.disk.set_gate(Gate.OPEN)
        if settled:
            self._on_settled(settled, is_by_hand=is_by_hand)


UNFENCED: Final = (
    "this decides who may write the disk, and nothing checks it: first see to it that the other side cannot write it "
    "and never will (its daemon ended, its copy moved away, or resolved there too), then add --i-have-fenced-the-other"
)


def in_doubt(disks: Mapping[str, ServedDisk]) -> list[ServedDisk]:
    """Return the disks that are handed off, or pledged to a group, without a word."""
    return [served for served in disks.values() if served.ownership in DOUBTFUL]


def _session(served: ServedDisk) -> str:
    record = served.epoch_file.record
    return "" if record is None else record.session
