"""Settlement: a source that said COMMIT and knows no more asks the destination who owns the disks.

    ASK     ──────────>
            <──────────    ANSWER                 what the destination's epoch files say
    COMMIT, or ABORT ──>                          if disks are prepared there (`fusemig.core.handoff.judge`)
            <──────────    ANSWER                 what they say then

    owned -> `released` here        incoming -> `owner` here, in the epoch after the next        else: in doubt still

(`lending` instead of `released` where the destination takes over before it has everything.)

One connection settles the disks of one migration. Nothing here opens a gate: that is for whoever called, after the
record is durable. An exchange that ends anywhere has changed nothing, or what was durably true.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from fusemig.core.handoff import Evidence, SourceState, Verdict, judge, settled
from fusemig.errors import InDoubtError, PeerRefusedError, RemoteProtocolError
from fusemig.failpoint import reach
from fusemig.migration.link import HANDSHAKE_DEADLINE_S, BufferPool, NativeLink
from fusemig.records.epoch import Ownership, Side, resolved
from fusemig.wire import native

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusemig.migration.link import Offload
    from fusemig.net.transport import ByteStream
    from fusemig.records.epoch import EpochFile

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class DoubtfulDisk:
    """A disk whose epoch file says `handed-off`."""

    name: str
    epoch_file: EpochFile


def is_askable(epoch_file: EpochFile) -> bool:
    """Tell whether somebody can be asked about a disk: it was handed off over a wire that has questions."""
    record = epoch_file.record
    return record is not None and record.state is Ownership.HANDED_OFF and record.wire == "native" and record.peer != ""


class Settlement:
    """Settles the disks of one migration."""

    def __init__(self, disks: Sequence[DoubtfulDisk], offload: Offload, *, is_whole: bool) -> None:
        """Prepare to settle ``disks``, which were handed off in the same migration.

        Args:
            disks: at least one.
            offload: runs calls that may sleep.
            is_whole: whether those are all the disks of that migration.
        """
        self._disks = disks
        self._records = [record for record in (disk.epoch_file.record for disk in disks) if record is not None]
        self._offload = offload
        self._is_whole = is_whole

    async def run(self, stream: ByteStream) -> None:
        """Ask over ``stream``, which the caller closes, until every disk is settled, durably.

        Raises:
            PeerRefusedError: the destination does not answer now, and why.
            InDoubtError: it has answered, and some disks are in doubt still; others may be settled.
            StateError: an epoch file cannot be written.
            FusemigError: the destination is gone, or what it says is wrong.

        Cancellation: what is settled is durable; the rest is in doubt still.
        """
        link = NativeLink(stream, native.Decoder(native.FROM_DESTINATION, preface=False), BufferPool())
        asked = [native.AskedDisk(record.image_id, record.epoch) for record in self._records]
        ask = native.Ask(native.VERSION, self._records[0].session, asked)
        await link.send([native.PREFACE, native.encode_message(ask)])
        testimonies, is_taken = await self._hear(link)
        verdict = judge(testimonies, is_whole=self._is_whole, is_taken=is_taken)
        if verdict is Verdict.COMMIT:
            for disk, record in zip(self._disks, self._records, strict=True):
                if not disk.epoch_file.is_certain:
                    await self._offload(disk.epoch_file.write, record)
            await link.send_message(native.Commit())
            reach("after-commit-sent")
        elif verdict is Verdict.CALL_OFF:
            await link.send_message(native.Abort("COMMIT was never sent: not all disks were ready to be handed off"))
        if verdict is not Verdict.SETTLE:
            testimonies, is_taken = await self._hear(link)
        await self._conclude(link.peer, testimonies, is_taken=is_taken)

    async def _hear(self, link: NativeLink) -> tuple[list[Evidence], bool]:
        event = await link.receive(HANDSHAKE_DEADLINE_S)
        if isinstance(event, native.Refuse):
            raise PeerRefusedError(f"{link.peer} does not answer: {event.reason}")
        if not isinstance(event, native.Answer) or len(event.disks) != len(self._disks):
            raise RemoteProtocolError(f"{link.peer} sent {type(event).__name__} where an answer was due")
        return [Evidence(word) for word in event.disks], event.is_taken

    async def _conclude(self, peer: str, testimonies: Sequence[Evidence], *, is_taken: bool) -> None:
        in_doubt = []
        states = settled(testimonies, is_taken=is_taken)
        for disk, record, testimony, state in zip(self._disks, self._records, testimonies, states, strict=True):
            if state is SourceState.RELEASED:
                new = record.handed_over()
            elif state is SourceState.TAKEN_BACK:
                new = resolved(record, Side.SOURCE)
            else:
                in_doubt.append(f"'{disk.name}' ({testimony.value})")
                continue
            await self._offload(disk.epoch_file.write, new)
            log.warning("settled", disk=disk.name, destination=peer, it_says=testimony.value, state=new.state.value)
        if in_doubt:
            raise InDoubtError(
                f"{peer} was asked, and its answer does not settle {', '.join(in_doubt)}: look at it with "
                "`fusemig status` there; see `fusemig resolve --help`"
            )
