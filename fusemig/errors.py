"""Every deliberate error of fusemig, in one tree.

    FusemigError
    ├── ConfigError                 the caller's input is wrong
    ├── StateError                  the request does not fit the present phase
    ├── FuseUnavailableError        no /dev/fuse, no helper, mount refused
    ├── ProtocolError               (abstract)
    │   ├── LocalProtocolError      our own misuse of a wire: a bug
    │   └── RemoteProtocolError     the peer sent bytes that no correct peer sends
    ├── TransportError
    │   ├── ConnectError
    │   ├── ConnectionLostError
    │   └── AuthenticationError     one side did not prove who it is, or is not admitted
    ├── DiskError                   errno, offset, length
    │   └── GateClosedError         this write must be parked, nothing has happened to it
    └── MigrationError
        ├── PeerRefusedError        the destination said no, with its reason
        │   └── PeerBusyError       ... and may say yes in a moment
        ├── VerificationError       the two sides hold different bytes
        ├── CancelledByUserError
        └── InDoubtError            COMMIT was sent and its outcome is unknown

Rules: the text says the cause and the next step. ``kind`` is the stable name that crosses the control socket and from
which the command line takes its exit code. ``ValueError`` and ``assert`` are for bugs. Foreign errors are translated
once, in the module that owns the foreign library, with ``raise ... from``. This module imports nothing of ours.
"""

from __future__ import annotations

import os
from typing import ClassVar


class FusemigError(Exception):
    """Base of all deliberate errors; the message says what happened and what to do next."""

    kind: ClassVar[str] = "failed"


class ConfigError(FusemigError):
    """The caller's input is wrong; nothing was started."""

    kind = "usage"


class StateError(FusemigError):
    """The request does not fit the present phase; nothing was changed."""


class FuseUnavailableError(FusemigError):
    """The file system cannot be mounted here."""

    kind = "fuse-unavailable"


class ProtocolError(FusemigError):
    """Abstract: a wire was used wrongly, by us or by the peer."""

    def __init__(self, *args: object) -> None:
        """Refuse to be raised itself: the reader must know whose fault it is."""
        if type(self) is ProtocolError:
            raise TypeError("raise LocalProtocolError or RemoteProtocolError")
        super().__init__(*args)


class LocalProtocolError(ProtocolError):
    """Our own code used a wire wrongly."""


class RemoteProtocolError(ProtocolError):
    """The peer's bytes are malformed or out of order; its connection is of no further use."""


class TransportError(FusemigError):
    """The way to the peer failed."""


class ConnectError(TransportError):
    """No connection could be made, or none could be listened for."""


class ConnectionLostError(TransportError):
    """An established connection ended or stalled."""


class AuthenticationError(TransportError):
    """Credentials cannot be used, or the peer's were not accepted, or ours were not."""

    kind = "authentication"


class DiskError(FusemigError):
    """A request to a disk failed.

    Attributes:
        errno: the error number to give the guest.
        offset: first byte of the request, in bytes.
        length: length of the request, in bytes.
    """

    def __init__(self, errno: int, what: str, offset: int = 0, length: int = 0) -> None:
        """Describe the failed request; ``what`` names the disk and the operation."""
        super().__init__(f"{what}: {os.strerror(errno)}")
        self.errno = errno
        self.offset = offset
        self.length = length


class GateClosedError(DiskError):
    """The write gate is closed: park the request and try again when the gate says so."""


class MigrationError(FusemigError):
    """A migration ended without a hand-off."""


class PeerRefusedError(MigrationError):
    """The destination refused, and this is its reason."""

    kind = "refused"


class PeerBusyError(PeerRefusedError):
    """The destination refused because something else has the disk at the moment; the same may be tried again."""


class VerificationError(MigrationError):
    """The two sides do not hold the same bytes."""

    kind = "mismatch"


class CancelledByUserError(MigrationError):
    """The migration was cancelled on request; the source still owns its disks."""

    kind = "cancelled"


class InDoubtError(MigrationError):
    """COMMIT was sent and no answer came: the source stays frozen until it is known who owns the disks."""

    kind = "in-doubt"
