"""OutgoingHandoff: the source's half of the two-phase commit, with its messages and its epoch files.

    prove     FINAL ──> PREPARED, proofs equal          may be called off: `call_off`, `say_abort`
    pledge    `pledged` durable                         as its group decides (`fusemig.core.group`), where there is one
    commit    `handed-off` durable, COMMIT ──> TAKEN    may not; what fails here is in doubt
    release   `released` durable, RELEASED ──>          whatever fails, the destination owns the disks

If `handed-off` cannot be made durable and cannot be taken back either, it may be durable all the same, and a source
that is started again would have the prepared destination take the disks. So the guests go on here only after the
destination has answered ABORT with ABORT, which it does when it has durably forgotten; without that answer the disks
are in doubt.

The order of states is `fusemig.core.handoff`'s; here is what has to happen on the way from one to the next.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
import structlog
import trio

from fusemig.core.group import Word
from fusemig.core.handoff import SourceEvent, SourceHandoff, SourceState
from fusemig.errors import FusemigError, InDoubtError, StateError, VerificationError
from fusemig.failpoint import reach
from fusemig.migration.pledge import aborted_error
from fusemig.records.epoch import EpochRecord, Ownership
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from fusemig.disk.dirty_file import DirtyFile
    from fusemig.disk.tracked import TrackedDisk
    from fusemig.migration.link import NativeLink, Offload
    from fusemig.migration.pledge import Pledge
    from fusemig.migration.stats import MigrationParameters
    from fusemig.records.epoch import EpochFile

log = structlog.get_logger(__name__)

_FORGET_DEADLINE_S = 1.0
PLEDGED_HINT: Final = (
    "the disks are read-only here until it is known: see that the group's directory can be read and written; if it is "
    "gone for good, see `fusemig resolve --help`"
)


@dataclass(frozen=True)
class SourceDisk:
    """What the daemon lends for one disk."""

    disk: TrackedDisk
    epoch_file: EpochFile
    push_out_pages: Callable[[], Awaitable[None]]
    """Has the kernel write back what guests stored through mmap; must be called while the gate is open."""
    dirty_file: DirtyFile | None = None
    """Where it is kept what guests wrote since a migration began, and since the disk came here."""
    count_allocated: Callable[[], int] = lambda: 0
    """Tells about how many bytes of the image are no holes; 0: not known. May sleep."""
    stamp: Callable[[], str] = lambda: ""
    """Returns what the image is like, once nobody writes it any more (`fusemig.disk.stamp`); may sleep."""


@dataclass(frozen=True)
class Route:
    """How a destination is talked to beyond its URI, as far as somebody who asks it later has to know."""

    tls_creds: str = ""
    """The directory with the credentials that the migration brought along; "": the daemon's own."""
    tls_hostname: str = ""
    """What the destination's certificate must say; "": what the daemon's parameter or the URI says."""
    is_insecure: bool = False
    """Whether plain text may cross the network."""


NO_ROUTE: Final = Route()


class HandoffRecords:
    """The epoch files of a group of disks on their way out."""

    def __init__(
        self, disks: Sequence[SourceDisk], session: str, offload: Offload, wire: str, route: Route = NO_ROUTE
    ) -> None:
        """Look after the files of ``disks`` in migration ``session`` over ``wire``."""
        self._route = route
        self._lent = disks
        self._session = session
        self._wire = wire
        self._offload = offload
        self._records: list[EpochRecord] = []
        self.is_loan = False
        """Whether the destination takes over before it has everything."""
        self.decision = ""
        """The group that decides, of records that are pledged."""

    async def own(self) -> list[EpochRecord]:
        """Return the disks' records, giving one to each disk that never moved before.

        Raises:
            StateError: a disk is not owned here, or its epoch file cannot be written.
        """
        self._records = [await self._offload(_own_record, lent) for lent in self._lent]
        return self._records

    async def write(self, state: Ownership, peer: str, *, may_undo: bool = False) -> None:
        """Make every disk's state durable; if one fails and it may be undone, take back those before it.

        Raises:
            StateError: an epoch file cannot be written.
        """
        done: list[tuple[SourceDisk, EpochRecord]] = []
        for lent, record in zip(self._lent, self._records, strict=True):
            new = self._record(record, state, peer)
            try:
                await self._offload(lent.epoch_file.write, new)
                reach(f"after-one-{state.value}")
            except StateError:
                for other, old in done if may_undo else ():
                    await self._offload(other.epoch_file.write, old)
                raise
            done.append((lent, record))

    async def release(self, peer: str) -> None:
        """Make durable that the disks are the destination's, and what their images were like then.

        Raises:
            StateError: an epoch file cannot be written.
        """
        for lent, record in zip(self._lent, self._records, strict=True):
            stamp = await self._offload(lent.stamp)
            released = self._record(record, Ownership.RELEASED, peer)
            await self._offload(lent.epoch_file.write, msgspec.structs.replace(released, stamp=stamp))
            reach(f"after-one-{Ownership.RELEASED.value}")

    def assume(self, state: Ownership, peer: str) -> None:
        """Go by a state that could not be written, but may be durable."""
        for lent, record in zip(self._lent, self._records, strict=True):
            lent.epoch_file.assume(self._record(record, state, peer))

    def _record(self, own: EpochRecord, state: Ownership, peer: str) -> EpochRecord:
        record = EpochRecord(
            state=state,
            image_id=own.image_id,
            epoch=own.epoch,
            session=self._session,
            peer=peer,
            wire=self._wire,
            group=len(self._lent),
            tls_creds=self._route.tls_creds,
            tls_hostname=self._route.tls_hostname,
            is_insecure=self._route.is_insecure,
            is_loan=self.is_loan and state is not Ownership.OWNER,
            decision=self.decision if state is Ownership.PLEDGED else "",
        )
        return record.handed_over() if state is Ownership.RELEASED else record


class OutgoingHandoff:
    """The hand-off of a group of disks, all or none."""

    def __init__(
        self,
        disks: Sequence[SourceDisk],
        session: str,
        parameters: MigrationParameters,
        offload: Offload,
        route: Route = NO_ROUTE,
        pledge: Pledge | None = None,
    ) -> None:
        """Prepare to hand ``disks`` off in migration ``session``, to a destination that ``route`` leads to.

        ``pledge`` is made before; None: the disks are not to move together with those of other daemons.
        """
        self._pledge = pledge
        self._lent = disks
        self._parameters = parameters
        self._machine = SourceHandoff()
        self._records = HandoffRecords(disks, session, offload, "native", route)
        self._own: list[EpochRecord] = []
        self._peer = ""
        self._log = log.bind(migration=session[:8])

    @property
    def may_thaw(self) -> bool:
        """Whether the source may let guests write again."""
        return self._machine.may_thaw

    @property
    def is_loan(self) -> bool:
        """Whether the destination takes over before it has everything; set before `prove`."""
        return self._records.is_loan

    @is_loan.setter
    def is_loan(self, is_loan: bool) -> None:
        self._records.is_loan = is_loan

    @property
    def is_committing(self) -> bool:
        """Whether the destination is prepared and nothing stands between here and the commit but a group's decision."""
        return self._machine.state in (SourceState.PEER_PREPARED, SourceState.PLEDGED, SourceState.BOUND)

    async def own_records(self) -> list[EpochRecord]:
        """Return the disks' epoch records, giving one to each disk that never moved before.

        Raises:
            StateError: a disk is not owned here, or its epoch file cannot be written.
        """
        self._own = await self._records.own()
        return self._own

    async def prove(self, link: NativeLink, digests: Mapping[str, int]) -> None:
        """Ask the destination for its proofs and compare them with ours.

        Args:
            link: with nothing under way.
            digests: of each disk, by name.

        Raises:
            VerificationError: they differ.
            FusemigError: the destination refused or is gone.
        """
        self._peer = link.peer
        proofs = [
            native.DiskProof(digests[lent.disk.name], record.epoch + 1)
            for lent, record in zip(self._lent, self._own, strict=True)
        ]
        self._machine.on(SourceEvent.FROZEN_AND_SENT)
        await link.send_message(native.FinalProofs(proofs))
        prepared = await link.expect(native.PreparedProofs, self._parameters.freeze_deadline_s)
        if prepared.disks != proofs:
            raise VerificationError(self._difference(proofs, prepared.disks))
        self._machine.on(SourceEvent.PREPARED)
        reach("after-prepared-received")

    async def pledge(self, link: NativeLink, deadline: float, on_pledged: Callable[[], None]) -> None:
        """Bind the disks to what their group decides, and wait for that; the caller shields this.

        Until the coordinator hears of it (``on_pledged``), nobody has decided `commit`: so what fails before leaves the
        disks here, also where a record may say all the same that they are pledged.

        Args:
            link: which shows when the destination is lost.
            deadline: when the guests have waited long enough, on trio's clock.
            on_pledged: called when the pledge is durable.

        Raises:
            MigrationError: they are to stay.
            StateError: the pledge could not be made durable: they stay.
            InDoubtError: it cannot be known what is decided.
        """
        if self._pledge is None:
            return
        await self._pledge.check()
        self._records.decision = str(self._pledge.path)
        await self._records.write(Ownership.PLEDGED, self._peer)
        self._machine.on(SourceEvent.PLEDGE_DURABLE)
        reach("after-pledged")
        on_pledged()
        try:
            word = await self._pledge.decision(link, deadline)
        except StateError as exc:
            raise InDoubtError(f"{exc}; {PLEDGED_HINT}") from exc
        if word is Word.ABORT:
            self._machine.on(SourceEvent.ABORT_DECIDED)
            reach("after-abort-decided")
            raise aborted_error(self._pledge.path)
        self._machine.on(SourceEvent.COMMIT_DECIDED)
        reach("after-commit-decided")

    async def commit(self, link: NativeLink, on_committed: Callable[[], None]) -> None:
        """Give the disks away; the caller shields this.

        Raises:
            StateError: `handed-off` could not be made durable: nothing was given away.
            InDoubtError: COMMIT was sent, and no TAKEN came; or `handed-off` may be durable.
        """
        try:
            await self._records.write(Ownership.HANDED_OFF, self._peer)
        except StateError as exc:
            if self._machine.state is SourceState.BOUND:  # by the others: nothing leads back
                raise InDoubtError(f"{exc}; the group moves, and these disks follow when that can be written") from exc
            await self._undo(link, exc, on_committed)
            raise
        self._machine.on(SourceEvent.HANDOFF_DURABLE)
        reach("after-handed-off")
        on_committed()
        try:
            with trio.fail_after(self._parameters.taken_deadline_s):
                await link.send_message(native.Commit())
                reach("after-commit-sent")
                await link.expect(native.Taken, self._parameters.taken_deadline_s)
        except (FusemigError, trio.TooSlowError) as exc:
            raise InDoubtError(
                f"COMMIT was sent to {link.peer} and its answer is missing ({str(exc) or 'deadline passed'}); "
                "the disks are read-only here until it is known who owns them: the destination is being asked, see "
                "`fusemig status`; if it is gone for good, see `fusemig resolve --help`"
            ) from exc
        self._machine.on(SourceEvent.TAKEN)
        reach("after-taken-received")

    async def _undo(self, link: NativeLink, cause: StateError, on_committed: Callable[[], None]) -> None:
        """See that `handed-off`, which could not be written, cannot come to count: by our own word, or by the peer's.

        Raises:
            InDoubtError: neither can be had.
        """
        try:
            await self._records.write(Ownership.OWNER, self._peer)
        except StateError:
            reason = f"the source cannot write its epoch file: {cause}"
            if await self._is_forgotten(link, reason):
                return
            self._records.assume(Ownership.HANDED_OFF, self._peer)
            self._machine.on(SourceEvent.HANDOFF_DURABLE)
            on_committed()
            raise InDoubtError(
                f"{cause}; it may say all the same that the disks were handed off, and {link.peer}, which is prepared, "
                "did not answer that it forgets them: they are read-only here until it does or the file can be written"
            ) from cause

    async def _is_forgotten(self, link: NativeLink, reason: str) -> bool:
        """Call the hand-off off at the destination; return whether it says that this is durable there."""
        with trio.move_on_after(_FORGET_DEADLINE_S):
            try:
                await link.send_message(native.Abort(reason))
                await link.hear_abort()
            except FusemigError as exc:
                self._log.info("the destination could not be told", reason=str(exc))
            else:
                return True
        return False

    async def release(self, link: NativeLink) -> None:
        """Note that the destination owns the disks, and let it know that we know; never fails."""
        try:
            await self._records.release(self._peer)
            reach("after-released")
            with trio.move_on_after(1):
                await link.send_message(native.Released())
        except FusemigError as exc:
            # `handed-off` is durable here: nothing can be written twice.
            self._log.warning("could not note the release", reason=str(exc))

    async def call_off(self) -> None:
        """End the hand-off on this side; if the destination may be prepared, make durable that this side goes on."""
        may_be_prepared = self._machine.state in (SourceState.FINAL_SENT, SourceState.PEER_PREPARED)
        self._machine.on(SourceEvent.FAILURE)
        if not may_be_prepared:
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            try:
                await self._records.write(Ownership.OWNER, self._peer)
            except StateError as exc:
                # What is durable is `owner` from before, or `handed-off` of a destination that has forgotten (`_undo`).
                self._log.warning("could not note the end of the hand-off", reason=str(exc))

    async def say_abort(self, link: NativeLink, reason: str) -> None:
        """Tell the destination that it is over; the guests are served again by now and do not wait for this.

        It says so too when it has read everything before it. To close earlier, with its acknowledgements unread, would
        reset the connection, and it might never see the reason.
        """
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hear_abort, link)  # also while the way there is full: that one may be, too
                try:
                    await link.send_message(native.Abort(reason))
                except FusemigError as exc:
                    self._log.info("the destination could not be told", reason=str(exc))
                    nursery.cancel_scope.cancel()

    async def _hear_abort(self, link: NativeLink) -> None:
        with suppress(FusemigError):
            if link.aborted is None:
                await link.hear_abort()

    def _difference(self, ours: Sequence[native.DiskProof], theirs: Sequence[native.DiskProof]) -> str:
        if len(ours) != len(theirs):
            return f"the destination proved {len(theirs)} disks where {len(ours)} were sent"
        lent, mine, other = next(entry for entry in zip(self._lent, ours, theirs, strict=True) if entry[1] != entry[2])
        return (
            f"disk '{lent.disk.name}' differs at the destination: digest {other.digest:016x} in epoch {other.epoch} "
            f"there, {mine.digest:016x} in epoch {mine.epoch} here; nothing was handed over"
        )


def _own_record(lent: SourceDisk) -> EpochRecord:
    record = lent.epoch_file.record
    if record is None:
        record = EpochRecord(state=Ownership.OWNER, image_id=uuid.uuid4().hex, epoch=0)
        lent.epoch_file.write(record)
    elif not lent.epoch_file.is_certain:
        lent.epoch_file.write(record)  # what a failed write may have left behind must not count any more
    if record.state is not Ownership.OWNER:
        raise StateError(
            f"disk '{lent.disk.name}' is not owned here: its epoch file says {record.state.value}; "
            "migrate it from the host that owns it"
        )
    return record
