"""The hand-off as two state machines: two-phase commit, blocking rather than unsafe.

    source                          durable first            destination                  durable first
    FINAL(digests) ──────────────>  (nothing)
                    <────────────────────────────────────    PREPARED(digests)            image synced, `prepared`
    COMMIT ──────────────────────>  `handed-off`
                    <────────────────────────────────────    TAKEN                        `owner`, next epoch
    RELEASED ────────────────────>  `released`

Rules: the source may thaw in every state before HANDED_OFF but those of a pledge (below); from HANDED_OFF only the
destination's durable word that it has not taken the disk, and will not, leads back. The destination may write in OWNER
only. Neither state is left by a time-out. The tables below are the whole truth: what is not in them is an error. What
has to be durable is written *before* the message that announces it.

A source that moves in a group with others (`fusemig.core.group`) makes a pledge durable between PREPARED and
`handed-off`. From there it may thaw only when `abort` is decided, and hand off only when `commit` is:

    PEER_PREPARED ── `pledged` ──> PLEDGED ── commit ──> BOUND ── `handed-off` ──> HANDED_OFF
          └<───────── abort ──────────┘

After a crash, or a link that was lost between COMMIT and TAKEN, a source that is HANDED_OFF asks ("who owns it?") and
judges by what the destination's durable record says of this very migration (`judge`):

    source            destination says     so                                    the source
    HANDED_OFF        OWNED                COMMIT arrived                         is RELEASED
    HANDED_OFF, all   PREPARED             COMMIT was not heard, or never sent    says COMMIT again; then as above
    HANDED_OFF, some  PREPARED             COMMIT was never sent                  has it called off; then as below
    HANDED_OFF        INCOMING             it was called off                      takes the disk back
    HANDED_OFF        UNKNOWN              nothing follows                        stays in doubt
    any other         anything             it knows by itself                     does not ask

Why each is safe:

- PREPARED, commit: a source that is HANDED_OFF has not let a guest write since its FINAL, in no process: `handed-off`
  is durable, so a restart is read-only, and a process that only *may* have made it durable does not thaw before the
  destination has answered its ABORT (`fusemig.migration.commit`). So what is prepared is still the disk.
- PREPARED, called off: a group moves as a whole, and COMMIT is sent when `handed-off` is durable for all of its disks.
  Where it is not, the destination makes `incoming` durable first and answers then.
- INCOMING: the record names this migration. OWNER is entered from PREPARED only, PREPARED from INCOMING only by a FINAL
  of this migration, which a source that is HANDED_OFF does not send again; and the destination answers only when no
  other connection works on the disk, so no FINAL and no COMMIT of an earlier one is still to be heard. It has not taken
  the disk and never will. "The destination does not know the disk" proves nothing of the kind: it may have taken it,
  moved it on and forgotten it. That is UNKNOWN.
- Two disks of one migration are never OWNED and INCOMING at the same time: the destination goes to OWNER for all when
  it hears COMMIT, to INCOMING for all when it hears ABORT, and after a crash in the middle the rest follows what was
  begun.

The destination concludes nothing by itself: PREPARED waits, whatever it may suspect.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from fusemig.errors import RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence


class SourceState(Enum):
    """Where the source is in the hand-off."""

    SENDING = "sending"
    FINAL_SENT = "final-sent"
    PEER_PREPARED = "peer-prepared"
    PLEDGED = "pledged"
    BOUND = "bound"
    HANDED_OFF = "handed-off"
    RELEASED = "released"
    ABORTED = "aborted"
    TAKEN_BACK = "taken-back"


class SourceEvent(Enum):
    """What moves the source."""

    FROZEN_AND_SENT = "frozen, drained, synced and all sent"
    PREPARED = "PREPARED received, proofs equal"
    PLEDGE_DURABLE = "`pledged` is durable"
    COMMIT_DECIDED = "`commit` is decided of the group"
    ABORT_DECIDED = "`abort` is decided of the group"
    HANDOFF_DURABLE = "`handed-off` is durable"
    TAKEN = "TAKEN received, or ANSWER: owned"
    CALLED_OFF = "ANSWER received: incoming"
    FAILURE = "anything failed, or ABORT received"


class DestinationState(Enum):
    """Where the destination is in the hand-off."""

    INCOMING = "incoming"
    PREPARED = "prepared"
    OWNER = "owner"
    ABORTED = "aborted"


class DestinationEvent(Enum):
    """What moves the destination."""

    PREPARED_DURABLE = "image synced, digests equal, `prepared` is durable"
    OWNER_DURABLE = "COMMIT received, `owner` is durable"
    FAILURE = "anything failed, or ABORT received"


_S, _SE, _D, _DE = SourceState, SourceEvent, DestinationState, DestinationEvent

SOURCE_TABLE: Final = {
    (_S.SENDING, _SE.FROZEN_AND_SENT): _S.FINAL_SENT,
    (_S.FINAL_SENT, _SE.PREPARED): _S.PEER_PREPARED,
    (_S.PEER_PREPARED, _SE.HANDOFF_DURABLE): _S.HANDED_OFF,
    (_S.PEER_PREPARED, _SE.PLEDGE_DURABLE): _S.PLEDGED,
    (_S.PLEDGED, _SE.COMMIT_DECIDED): _S.BOUND,
    (_S.PLEDGED, _SE.ABORT_DECIDED): _S.PEER_PREPARED,
    (_S.BOUND, _SE.HANDOFF_DURABLE): _S.HANDED_OFF,
    (_S.HANDED_OFF, _SE.TAKEN): _S.RELEASED,
    (_S.HANDED_OFF, _SE.CALLED_OFF): _S.TAKEN_BACK,
    (_S.SENDING, _SE.FAILURE): _S.ABORTED,
    (_S.FINAL_SENT, _SE.FAILURE): _S.ABORTED,
    (_S.PEER_PREPARED, _SE.FAILURE): _S.ABORTED,
}

DESTINATION_TABLE: Final = {
    (_D.INCOMING, _DE.PREPARED_DURABLE): _D.PREPARED,
    (_D.PREPARED, _DE.OWNER_DURABLE): _D.OWNER,
    (_D.INCOMING, _DE.FAILURE): _D.ABORTED,
    # A prepared destination is no longer free to forget: only the source's ABORT brings it here.
    (_D.PREPARED, _DE.FAILURE): _D.ABORTED,
}


_NO_THAW: Final = frozenset({_S.PLEDGED, _S.BOUND, _S.HANDED_OFF, _S.RELEASED})


class SourceHandoff:
    """The source's side."""

    def __init__(self, state: SourceState = SourceState.SENDING) -> None:
        """Start while sending, or where the epoch file says that we are."""
        self.state = state

    def on(self, event: SourceEvent) -> None:
        """Move.

        Raises:
            RemoteProtocolError: the event does not belong here; the peer is out of order.
        """
        following = SOURCE_TABLE.get((self.state, event))
        if following is None:
            raise RemoteProtocolError(f"hand-off out of order at the source: '{event.value}' while {self.state.value}")
        self.state = following

    @property
    def may_thaw(self) -> bool:
        """Whether the source may let guests write again."""
        return self.state not in _NO_THAW


class DestinationHandoff:
    """The destination's side."""

    def __init__(self, state: DestinationState = DestinationState.INCOMING) -> None:
        """Start incoming, or where the epoch file says that we are."""
        self.state = state

    def on(self, event: DestinationEvent) -> None:
        """Move; raises as `SourceHandoff.on` does."""
        following = DESTINATION_TABLE.get((self.state, event))
        if following is None:
            raise RemoteProtocolError(
                f"hand-off out of order at the destination: '{event.value}' while {self.state.value}"
            )
        self.state = following


class Evidence(Enum):
    """What the destination's durable record says of one disk in the migration that is asked about."""

    OWNED = "owned"
    """It was taken, in this migration's epoch or a later one."""
    PREPARED = "prepared"
    """All is there; COMMIT was not heard."""
    INCOMING = "incoming"
    """It was not taken and never will be in this migration."""
    UNKNOWN = "unknown"
    """The record is of another migration or another disk, or there is none."""


class Verdict(Enum):
    """What a source that is handed off must say before its disks can be settled."""

    COMMIT = "COMMIT: have those that are prepared taken over"
    CALL_OFF = "ABORT: have those that are prepared forgotten"
    SETTLE = "nothing: each disk's own testimony is all that will be known"


def judge(testimonies: Sequence[Evidence], *, is_whole: bool, is_taken: bool) -> Verdict:
    """Return what the testimonies of the disks of one migration ask for; see the table at the top.

    Args:
        testimonies: one per disk that is handed off at this source.
        is_whole: whether those are all the disks of the migration.
        is_taken: whether the destination owns any disk of the migration, asked about or not.
    """
    if Evidence.PREPARED not in testimonies:
        return Verdict.SETTLE
    was_taken = is_taken or Evidence.OWNED in testimonies
    was_called_off = Evidence.INCOMING in testimonies
    if was_taken:
        return Verdict.SETTLE if was_called_off else Verdict.COMMIT
    if was_called_off:
        return Verdict.CALL_OFF
    if Evidence.UNKNOWN in testimonies:
        return Verdict.SETTLE  # a part of the group alone is not moved
    return Verdict.COMMIT if is_whole else Verdict.CALL_OFF


def settled(testimonies: Sequence[Evidence], *, is_taken: bool) -> list[SourceState]:
    """Return where each disk of one migration stands at the source; HANDED_OFF is in doubt still."""
    was_taken = is_taken or Evidence.OWNED in testimonies
    states = []
    for testimony in testimonies:
        side = SourceHandoff(SourceState.HANDED_OFF)
        if testimony is Evidence.OWNED:
            side.on(SourceEvent.TAKEN)
        elif testimony is Evidence.INCOMING and not was_taken:
            side.on(SourceEvent.CALLED_OFF)
        states.append(side.state)
    return states
