"""The enumerations of the vocabulary: QEMU's own and ours."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class MigrationStatus(StrEnum):
    """QAPI MigrationStatus; where there was no migration, ``query-migrate`` has no ``status``."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"


class RunState(StrEnum):
    """The QAPI RunStates that a disk server can be in."""

    RUNNING = "running"
    """Guests may write."""
    PAUSED = "paused"
    """``stop`` closed the gate."""
    FINISH_MIGRATE = "finish-migrate"
    """The switchover has closed the gate."""
    POSTMIGRATE = "postmigrate"
    """The disks were handed off."""
    INMIGRATE = "inmigrate"
    """The disks are not complete yet."""
    IO_ERROR = "io-error"
    SHUTDOWN = "shutdown"


class MigrationCapability(StrEnum):
    """QAPI MigrationCapability of QEMU 7.2, in its order; most of it is about guest memory and never supported."""

    XBZRLE = "xbzrle"
    RDMA_PIN_ALL = "rdma-pin-all"
    AUTO_CONVERGE = "auto-converge"
    ZERO_BLOCKS = "zero-blocks"
    COMPRESS = "compress"
    EVENTS = "events"
    POSTCOPY_RAM = "postcopy-ram"
    X_COLO = "x-colo"
    RELEASE_RAM = "release-ram"
    BLOCK = "block"
    RETURN_PATH = "return-path"
    PAUSE_BEFORE_SWITCHOVER = "pause-before-switchover"
    MULTIFD = "multifd"
    DIRTY_BITMAPS = "dirty-bitmaps"
    POSTCOPY_BLOCKTIME = "postcopy-blocktime"
    LATE_BLOCK_ACTIVATE = "late-block-activate"
    X_IGNORE_SHARED = "x-ignore-shared"
    VALIDATE_UUID = "validate-uuid"
    BACKGROUND_SNAPSHOT = "background-snapshot"
    ZERO_COPY_SEND = "zero-copy-send"
    POSTCOPY_PREEMPT = "postcopy-preempt"


SUPPORTED_CAPABILITIES: Final = frozenset(
    {
        MigrationCapability.EVENTS,
        MigrationCapability.PAUSE_BEFORE_SWITCHOVER,
        MigrationCapability.ZERO_BLOCKS,
        MigrationCapability.BLOCK,
        MigrationCapability.RETURN_PATH,
    }
)
"""What may be switched on."""
ALWAYS_ON_CAPABILITIES: Final = frozenset({MigrationCapability.ZERO_BLOCKS, MigrationCapability.BLOCK})
"""What cannot be switched off: there is nothing to migrate but blocks, and zero chunks are never sent as bytes."""


class QmpCapability(StrEnum):
    """QAPI QMPCapability; none is offered."""

    OOB = "oob"


class ShutdownCause(StrEnum):
    """The QAPI ShutdownCauses of a disk server's end."""

    HOST_QMP_QUIT = "host-qmp-quit"
    HOST_SIGNAL = "host-signal"


class SocketAddressType(StrEnum):
    """The QAPI SocketAddressTypes that we know."""

    INET = "inet"
    UNIX = "unix"


class Compression(StrEnum):
    """QAPI MultiFDCompression."""

    NONE = "none"
    ZLIB = "zlib"
    ZSTD = "zstd"


class Mode(StrEnum):
    """How a disk moves."""

    PRECOPY = "precopy"
    """Passes over what is dirty, then the switchover."""
    MIRROR = "mirror"
    """Guests' writes to what was sent are forwarded as they happen, and wait if it is too far behind."""
    POSTCOPY = "postcopy"
    """The destination takes over first and fetches what it lacks."""


class MirrorReach(StrEnum):
    """What is mirrored now."""

    NONE = "none"
    HOT = "hot"
    """What guests kept writing when passes did not help."""
    ALL = "all"


class Order(StrEnum):
    """In which order the bulk phase sends chunks."""

    SEQUENTIAL = "sequential"
    """Ascending, as QEMU does."""
    HEAT = "heat"
    """What guests write most comes last."""


class WireName(StrEnum):
    """The stream format."""

    NATIVE = "native"
    QEMU = "qemu"


class Side(StrEnum):
    """A side of a hand-off, as a person names the owner of a disk."""

    SOURCE = "source"
    DESTINATION = "destination"


class Role(StrEnum):
    """Which side of a migration this daemon is."""

    SOURCE = "source"
    DESTINATION = "destination"
