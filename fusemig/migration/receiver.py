"""FrameReceiver: receives frames and writes them; the bulk half of the destination, run in slices on a worker thread.

Frames are applied in the order in which they come, so whatever control message follows them finds them in the image.
They are acknowledged after each slice and whenever nothing more is there to be read: seldom enough to cost nothing,
often enough that the source, whose window is twice a slice, never waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from fusemig.migration.link import POLL_S, SLICE_BYTES, Need
from fusemig.wire import native

if TYPE_CHECKING:
    from fusemig.migration.link import NativeLink
    from fusemig.migration.writer import FrameWriter
_HESITATE_S: Final = 0.0003
"""A gap in the stream that is longer than this is worth an acknowledgement."""


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

        When `applied` is ahead of `acknowledged` the caller owes the source an acknowledgement.

        Raises:
            RemoteProtocolError: the peer's bytes are wrong.
            ConnectionLostError: it is gone.
            DiskError: the store failed.
        """
        done = 0
        while done < SLICE_BYTES:
            try:
                event = self._link.receive_shortly()
            except trio.WouldBlock:
                if self._wait_shortly():
                    continue
                return Need.STREAM
            if not isinstance(event, native.DataFrame | native.ZeroFrame):
                return event
            done += self._writer.apply(event)
            self.applied = event.sequence
        return Need.SLICE

    def _wait_shortly(self) -> bool:
        """Wait for more in this thread; return whether there is. Meanwhile the source learns what is done."""
        poll = self._link.stream.poll_readable
        if poll(_HESITATE_S):
            return True
        if self.applied > self.acknowledged and self._link.try_send(native.encode_ack(self.applied)):
            self.acknowledged = self.applied
        return poll(POLL_S)
