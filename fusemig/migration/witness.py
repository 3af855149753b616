"""Witness: the destination's side of `fusemig.migration.settlement`: says what its epoch files say, does what follows.

The disks are reserved from the question to the end of the connection, so nothing else takes, receives or resolves them
meanwhile; while anything else works on one of them there is no answer (REFUSE: ask again).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
import structlog
import trio

from fusemig.core.handoff import DestinationEvent, DestinationHandoff, DestinationState, Evidence
from fusemig.disk.tracked import Gate
from fusemig.errors import ConnectionLostError, PeerRefusedError, RemoteProtocolError, StateError
from fusemig.failpoint import reach
from fusemig.migration.link import HANDSHAKE_DEADLINE_S
from fusemig.records.epoch import Ownership, evidence_of
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fusemig.disk.tracked import TrackedDisk
    from fusemig.migration.link import NativeLink, Offload
    from fusemig.records.epoch import EpochFile, EpochRecord

log = structlog.get_logger(__name__)

LINGER_S = 2.0


@dataclass(frozen=True)
class RecalledDisk:
    """What the daemon lends of a disk that is asked about."""

    name: str
    epoch_file: EpochFile
    disk: TrackedDisk | None
    """None where the image is missing or read-only: it cannot be taken over."""


class RecallHost(Protocol):
    """What a witness needs of its daemon."""

    def recall(self, session: str, image_ids: Sequence[str], peer: str) -> list[RecalledDisk]:
        """Reserve every disk whose record names the migration or one of the images.

        Raises:
            PeerRefusedError: one of them is busy.
        """

    def let_go(self, disks: Sequence[RecalledDisk]) -> None:
        """End the reservation; whoever owns the disks is written in their epoch files."""


class Witness:
    """Answers one question."""

    def __init__(
        self, link: NativeLink, host: RecallHost, offload: Offload, on_taken: Callable[[], None] = lambda: None
    ) -> None:
        """Prepare to answer over ``link``; ``on_taken`` is called when disks became ours, with their gates open."""
        self._link = link
        self._host = host
        self._offload = offload
        self._on_taken = on_taken
        self._known: dict[str, RecalledDisk] = {}
        self._log = log

    async def answer(self, ask: native.Ask) -> None:
        """Answer, and do what the source then says; returns when the source has heard enough.

        Raises:
            PeerRefusedError: no answer can be given now; the source was told.
            StateError: an epoch file cannot be written: what was asked for was not done.
            FusemigError: the source is gone, or what it says is wrong.
        """
        self._log = log.bind(migration=ask.session[:8], source=self._link.peer)
        try:
            recalled = self._recall(ask)
        except PeerRefusedError as exc:
            await self._link.send_message(native.Refuse(str(exc)))
            await self._link.linger(LINGER_S)
            raise
        try:
            self._known = {disk.epoch_file.record.image_id: disk for disk in recalled if disk.epoch_file.record}
            await self._converse(ask, recalled)
        finally:
            self._host.let_go(recalled)

    def _recall(self, ask: native.Ask) -> list[RecalledDisk]:
        if ask.version != native.VERSION:
            raise PeerRefusedError(
                f"wire version {ask.version} offered, {native.VERSION} spoken here; upgrade one side"
            )
        if not ask.session or not ask.disks:
            raise PeerRefusedError("the question names no migration, or no disk")
        return self._host.recall(ask.session, [disk.image_id for disk in ask.disks], self._link.peer)

    async def _converse(self, ask: native.Ask, recalled: Sequence[RecalledDisk]) -> None:
        await self._say(ask, recalled)
        try:
            event = await self._link.receive(HANDSHAKE_DEADLINE_S)
        except ConnectionLostError:
            return  # it has heard enough
        prepared = [
            disk
            for asked in ask.disks
            for disk in [self._known.get(asked.image_id)]
            if disk is not None and self._testimony(ask, asked) is Evidence.PREPARED
        ]
        match event:
            case native.Commit():
                with trio.CancelScope(shield=True):
                    await self._take(ask.session, prepared, recalled)
            case native.Abort():
                self._check_not_taken(ask, recalled)
                await self._forget(prepared, event.reason)
            case _:
                raise RemoteProtocolError(f"{self._link.peer} sent {type(event).__name__} after ANSWER")
        await self._say(ask, recalled)
        await self._link.linger(LINGER_S)

    async def _say(self, ask: native.Ask, recalled: Sequence[RecalledDisk]) -> None:
        testimonies = [self._testimony(ask, asked) for asked in ask.disks]
        self._log.info("asked who owns the disks", answers=[testimony.value for testimony in testimonies])
        await self._link.send_message(
            native.Answer([testimony.value for testimony in testimonies], _is_taken(ask, recalled))
        )

    def _testimony(self, ask: native.Ask, asked: native.AskedDisk) -> Evidence:
        known = self._known.get(asked.image_id)
        record = None if known is None else known.epoch_file.record
        return evidence_of(record, session=ask.session, image_id=asked.image_id, epoch=asked.epoch)

    async def _take(self, session: str, disks: Sequence[RecalledDisk], recalled: Sequence[RecalledDisk]) -> None:
        handoff = DestinationHandoff(DestinationState.PREPARED if disks else DestinationState.INCOMING)
        for disk in disks:
            if disk.disk is None:
                raise StateError(
                    f"disk '{disk.name}' is to be taken over, and its image is missing or served read-only here"
                )
        reach("after-commit-received")
        for disk in disks:
            await self._offload(disk.epoch_file.write, _record(disk).taken())
            reach("after-one-owner")
        handoff.on(DestinationEvent.OWNER_DURABLE)
        reach("after-owner")
        for disk in recalled:  # also those whose turn came before something failed
            if disk.disk is not None and _owns(disk, session):
                disk.disk.set_gate(Gate.OPEN)
                self._log.warning("taken over at the source's word after a doubt", disk=disk.name)
        self._on_taken()

    def _check_not_taken(self, ask: native.Ask, recalled: Sequence[RecalledDisk]) -> None:
        if _is_taken(ask, recalled):
            raise RemoteProtocolError(f"{self._link.peer} calls off what was taken over already")

    async def _forget(self, disks: Sequence[RecalledDisk], reason: str) -> None:
        handoff = DestinationHandoff(DestinationState.PREPARED if disks else DestinationState.INCOMING)
        for disk in disks:
            await self._offload(disk.epoch_file.write, _forgotten(disk))
            self._log.warning("called off by the source", disk=disk.name, reason=reason)
        handoff.on(DestinationEvent.FAILURE)


def _is_taken(ask: native.Ask, recalled: Sequence[RecalledDisk]) -> bool:
    return any(_owns(disk, ask.session) for disk in recalled)


def _owns(disk: RecalledDisk, session: str) -> bool:
    record = disk.epoch_file.record
    return record is not None and record.session == session and record.state in _OURS


_OURS: Final = frozenset({Ownership.OWNER, Ownership.BORROWING})


def _forgotten(disk: RecalledDisk) -> EpochRecord:
    return msgspec.structs.replace(_record(disk), state=Ownership.INCOMING, is_loan=False)


def _record(disk: RecalledDisk) -> EpochRecord:
    record = disk.epoch_file.record
    assert record is not None, "a prepared disk has a record"
    return record
