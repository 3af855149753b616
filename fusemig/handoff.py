"""The hand-off as two state machines: two-phase commit, blocking rather than unsafe.

    source                          durable first            destination                  durable first
    FINAL(digests) ──────────────>  (nothing)
                    <────────────────────────────────────    PREPARED(digests)            image synced, `prepared`
    COMMIT ──────────────────────>  `handed-off`
                    <────────────────────────────────────    TAKEN                        `owner`, next epoch
    RELEASED ────────────────────>  `released`

Rules: the source may thaw in every state before HANDED_OFF and in none after it; the destination may write in OWNER
only. Neither state is left by a time-out. The tables below are the whole truth: what is not in them is an error.
What has to be durable is written *before* the message that announces it.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from fusemig.errors import RemoteProtocolError


class SourceState(Enum):
    """Where the source is in the hand-off."""

    SENDING = "sending"
    FINAL_SENT = "final-sent"
    PEER_PREPARED = "peer-prepared"
    HANDED_OFF = "handed-off"
    RELEASED = "released"
    ABORTED = "aborted"


class SourceEvent(Enum):
    """What moves the source."""

    FROZEN_AND_SENT = "frozen, drained, synced and all sent"
    PREPARED = "PREPARED received, proofs equal"
    HANDOFF_DURABLE = "`handed-off` is durable"
    TAKEN = "TAKEN received"
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
    (_S.HANDED_OFF, _SE.TAKEN): _S.RELEASED,
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


class SourceHandoff:
    """The source's side."""

    def __init__(self) -> None:
        """Start while sending."""
        self.state = SourceState.SENDING

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
        return self.state not in (SourceState.HANDED_OFF, SourceState.RELEASED)


class DestinationHandoff:
    """The destination's side."""

    def __init__(self) -> None:
        """Start incoming."""
        self.state = DestinationState.INCOMING

    def on(self, event: DestinationEvent) -> None:
        """Move; raises as `SourceHandoff.on` does."""
        following = DESTINATION_TABLE.get((self.state, event))
        if following is None:
            raise RemoteProtocolError(
                f"hand-off out of order at the destination: '{event.value}' while {self.state.value}"
            )
        self.state = following

    @property
    def may_write(self) -> bool:
        """Whether guests may write here."""
        return self.state is DestinationState.OWNER
