"""FrameReceiver: receives frames and writes them; the bulk half of the destination, run in slices on a worker thread.

Frames are applied in the order in which they come, so whatever control message follows them finds them in the image.
They are acknowledged after `ACK_BYTES`, when the source asks (PROGRESS, at the end of each pass) and when nothing more
comes for a moment: seldom enough to cost nothing, often enough that the source, whose window is larger, never waits.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import trio

from fusemig.core.units import BLOCK_SIZE
from fusemig.migration.link import POLL_S, SLICE_BYTES, SLICE_S, Need
from fusemig.wire import native

if TYPE_CHECKING:
    from fusemig.migration.link import NativeLink
    from fusemig.migration.writer import FrameWriter

ACK_BYTES: Final = 16 << 20
"""Disk bytes that are written before the source is told, while more keep coming."""


class FrameReceiver:
    """Applies the frames of a link until something else comes."""

    def __init__(self, link: NativeLink, writer: FrameWriter) -> None:
        """Receive from ``link``, which nobody else may do meanwhile."""
        self._link = link
        self._writer = writer
        self.applied = 0
        """The last frame that is in the image."""
        self.acknowledged = 0
        """The last frame that the source was told of."""

    def run_slice(self) -> native.Event | Need:
        """Receive and apply; return a control message, STREAM when nothing more is there, or SLICE.

        STREAM is also said of a frame that is too long under way: its pace is to be judged, by waiting for the stream.
        When `applied` is ahead of `acknowledged` the caller owes the source an acknowledgement.

        Raises:
            RemoteProtocolError: the peer's bytes are wrong.
            ConnectionLostError: it is gone.
            DiskError: the store failed.
        """
        done = unsaid = 0
        until = time.monotonic() + SLICE_S
        while done < SLICE_BYTES:
            try:
                event = self._link.receive_shortly()
            except trio.WouldBlock:
                if time.monotonic() < until and self._link.stream.poll_readable(POLL_S):
                    continue
                return Need.STREAM
            if not isinstance(event, native.Frame):
                return event
            n_bytes = max(self._writer.apply(event), BLOCK_SIZE)  # zeros must not make a slice endless
            self.applied = event.sequence
            done += n_bytes
            unsaid += n_bytes
            if unsaid >= ACK_BYTES and self._link.try_send(native.encode_ack(event.sequence)):
                self.acknowledged = event.sequence
                unsaid = 0
            if time.monotonic() >= until:
                break
        return Need.SLICE
