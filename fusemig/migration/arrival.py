"""What a new connection speaks: its first bytes tell the wire, and the wire's own migration takes it from there.

QEVM            QEMU's migration stream
anything else   the native wire, whose decoder refuses what is no preface of its own
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from fusemig.errors import AuthenticationError, FusemigError, PeerRefusedError, RemoteProtocolError
from fusemig.migration.destination import DestinationMigration
from fusemig.migration.incoming import LINGER_S
from fusemig.migration.link import HANDSHAKE_DEADLINE_S, BufferPool, NativeLink
from fusemig.migration.qemu_destination import QemuDestination
from fusemig.wire import native, savevm
from fusemig.wire.base import IncomingWire

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.migration.incoming import IncomingHost, IncomingMigration
    from fusemig.migration.link import Offload
    from fusemig.phase import MigrationPhase
    from fusemig.transport import ByteStream

_MAGIC: Final = savevm.MAGIC.to_bytes(4, "big")


async def greet(
    stream: ByteStream,
    accepted: IncomingWire,
    host: IncomingHost,
    offload: Offload,
    on_phase: Callable[[MigrationPhase], None] = lambda _phase: None,
) -> IncomingMigration:
    """Return the migration for a new connection, to be run.

    Raises:
        RemoteProtocolError: nothing came.
        PeerRefusedError: the source speaks a wire that is not ``accepted``.
        ConnectionLostError: it is gone.
    """
    head = await _receive_head(stream)
    if head == _MAGIC:
        if accepted is IncomingWire.NATIVE:
            raise PeerRefusedError(
                f"{stream.peer} sends QEMU's migration stream and only the native wire is taken here: "
                "serve with --wire auto or --wire qemu"
            )
        return QemuDestination(stream, host, offload, on_phase, head)
    refusal = ""
    if accepted is IncomingWire.QEMU:
        refusal = "only QEMU's migration stream is taken there: serve with --wire auto or --wire native"
    return DestinationMigration(stream, host, offload, on_phase, head, refusal)


async def _receive_head(stream: ByteStream) -> bytes:
    """Return the first bytes, fewer if the stream ends or differs before."""
    head = bytearray(len(_MAGIC))
    n = 0
    with trio.move_on_after(HANDSHAKE_DEADLINE_S):
        while n < len(head) and _MAGIC.startswith(bytes(head[:n])):
            try:
                received = stream.receive_nowait(memoryview(head)[n:])
            except trio.WouldBlock:
                await stream.wait_readable()
                continue
            if not received:
                break
            n += received
        return bytes(head[:n])
    raise RemoteProtocolError(f"{stream.peer} said nothing within {HANDSHAKE_DEADLINE_S:g} s")


async def turn_away(stream: ByteStream, reason: str) -> None:
    """Tell somebody who is not welcome why, without reading a byte of what he sends; does not raise.

    A source of ours understands it; a QEMU finds the connection closed.
    """
    link = NativeLink(stream, native.Decoder(native.FROM_SOURCE, preface=True), BufferPool())
    with trio.move_on_after(LINGER_S):
        try:
            await link.send_message(native.Refuse(reason, AuthenticationError.kind))
            await link.linger(LINGER_S)
        except FusemigError:
            return
