"""How fast is the way to a destination? Measured by sending, for an estimate; no disk has a part in it.

PROBE ──────>  again and again, at most `WINDOW` unanswered, for `PROBE_S`
      <──────  PROBED, one for each
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from fusemig.errors import AuthenticationError, ConnectionLostError, PeerRefusedError, RemoteProtocolError
from fusemig.migration.link import HANDSHAKE_DEADLINE_S, BufferPool, NativeLink
from fusemig.wire import native

if TYPE_CHECKING:
    from fusemig.net.transport import ByteStream

PROBE_S: Final = 1.0
"""How long the source sends, in seconds."""
LONGEST_S: Final = 10.0
"""How long the destination listens to that."""
WINDOW: Final = 64
N_SMALL: Final = 16
"""So many begin with little in them: on a slow way one of the others would take all the time there is."""
_SMALL: Final = 8 << 10
_LARGE: Final = 128 << 10
"""As base64 it is within `native.MAX_MESSAGE`."""


@dataclass(frozen=True)
class Path:
    """What was measured."""

    bytes_per_s: float
    round_trip_s: float


async def measure(stream: ByteStream) -> Path:
    """Measure the way over ``stream``, which the caller closes.

    Raises:
        PeerRefusedError: the destination does not let itself be measured, and why.
        FusemigError: it is gone, or what it says is wrong.
    """
    link = NativeLink(stream, native.Decoder(native.FROM_DESTINATION, preface=False), BufferPool())
    began = trio.current_time()
    try:
        await link.send([native.PREFACE, native.encode_message(native.Probe())])
        await _answer(link, HANDSHAKE_DEADLINE_S)
    except ConnectionLostError as exc:  # an older one does not know the question
        raise PeerRefusedError(
            f"{link.peer} does not let the way be measured ({exc}): give it with --link RATE"
        ) from exc
    round_trip_s = trio.current_time() - began
    padding = os.urandom(_LARGE)  # nothing on the way may compress it
    frames = [native.encode_message(native.Probe(padding[:length])) for length in (_SMALL, _LARGE)]
    started_at = trio.current_time()
    sent: list[int] = []
    answered_at: list[float] = []
    while True:
        may_send = trio.current_time() < started_at + PROBE_S
        if may_send and len(sent) - len(answered_at) < min(WINDOW, 1 + len(answered_at)):
            frame = frames[len(sent) >= N_SMALL]
            await link.send([frame])
            sent.append(len(frame))
            with suppress(trio.WouldBlock):  # answers count from when they come, not from when they are missed
                while True:
                    _check(link, link.receive_nowait())
                    answered_at.append(trio.current_time())
        elif len(sent) > len(answered_at):
            await _answer(link, LONGEST_S)
            answered_at.append(trio.current_time())
        else:
            break
    half = len(sent) // 2  # the first half is the start, which is slow
    took_s = answered_at[-1] - (answered_at[half - 1] if half else started_at)
    return Path(sum(sent[half:]) / max(took_s, 1e-6), round_trip_s)


async def _answer(link: NativeLink, deadline_s: float) -> None:
    _check(link, await link.receive(deadline_s))


def _check(link: NativeLink, event: native.Event) -> None:
    if isinstance(event, native.Refuse):
        if event.kind == AuthenticationError.kind:
            raise AuthenticationError(f"{link.peer} refused: {event.reason}")
        raise PeerRefusedError(f"{link.peer} refused: {event.reason}")
    if not isinstance(event, native.Probed):
        raise RemoteProtocolError(f"{link.peer} sent {type(event).__name__} where PROBED was due")


async def answer_probes(link: NativeLink) -> None:
    """Answer the first PROBE, which has come, and those that follow until the source has seen enough.

    Raises:
        RemoteProtocolError: something else came, or it went on for too long.
    """
    with trio.move_on_after(LONGEST_S):
        try:
            event: native.Event = native.Probe()
            while isinstance(event, native.Probe):
                await link.send_message(native.Probed())
                event = await link.receive(HANDSHAKE_DEADLINE_S)
        except ConnectionLostError:
            return  # it has seen enough
        raise RemoteProtocolError(f"{link.peer} sent {type(event).__name__} after PROBE")
    raise RemoteProtocolError(f"{link.peer} measured the way for longer than {LONGEST_S:g} s")
