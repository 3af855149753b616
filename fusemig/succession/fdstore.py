"""FdStore: descriptors that outlive this process, kept by systemd or by our own holder.

Both are spoken to in the same way, which is systemd's: sd_pid_notify_with_fds(3) on the way in (``FDSTORE=1`` and
``FDNAME=`` in a datagram to ``$NOTIFY_SOCKET``, the descriptor as SCM_RIGHTS), sd_listen_fds(3) on the way back
(``LISTEN_PID``, ``LISTEN_FDS``, ``LISTEN_FDNAMES``, descriptors from 3 on). A successor that waited warm got them over
the socket that it waited on instead (`wait_for_turn`).

Names, and who keeps them:

    fuse, fuse-init          the mount and its INIT request: `fusemig.fuse.lane_mount`
    image-DEV-INODE          images with their locks, and the maps beside them (file-DEV-INODE): `fusemig.disk.raw`
    base-NAME-DEV-INODE      what the overlay of a disk lies over: `fusemig.disk.overlay_file`
    failed-image-DEV-INODE   the same once more, when a sync of it has failed
    control, incoming-N      listening sockets: `fusemig.control.server`, `fusemig.net.listener`

Rules:

1. What is kept is in the store when `keep` returns: the datagram is queued, whatever becomes of this process.
2. `release` forgets what was inherited only when the daemon ends in order, or when it has no mount that outlives it: a
   successor that fails while it starts must not take away what the next one needs, and leaves nothing of its own but
   what it learned of what stays: the mark of a failed sync goes with the file that it marks.
3. Without a store everything here does nothing, and says so by `is_on`.
4. A full store drops what it is sent and tells nobody, so what it has room for is counted here (``$FDSTORE``), and the
   marks of failed syncs have places of their own: nothing else takes them.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from fusemig.errors import ConfigError
from fusemig.notify import Notifier, open_notifier

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, MutableMapping

STANDBY: Final = "FUSEMIG_STANDBY"
"""In the environment of a successor that waits: the number of the socket on which it is told to go on."""
HOLDER: Final = "FUSEMIG_HOLDER"
"""In the environment of a daemon that our own holder started: the holder's process id."""

FAILED: Final = "failed-"
"""What the names of the marks begin with."""

_FIRST: Final = 3  # SD_LISTEN_FDS_START
_MAX_MESSAGE: Final = 4096
_MAX_FDS: Final = 253  # SCM_MAX_FD of the kernel


class HasDescriptor(Protocol):
    """A socket, of whichever library."""

    def fileno(self) -> int:
        """Return its descriptor."""


def identity(descriptor: int) -> str:
    """Return what names an open file among the kept ones: its device and inode."""
    status = os.fstat(descriptor)
    return f"{status.st_dev:x}-{status.st_ino:x}"


class FdStore:
    """What a predecessor left, and the way to leave something."""

    def __init__(
        self, inherited: Mapping[str, int] | None = None, notifier: Notifier | None = None, room: int | None = None
    ) -> None:
        """Own the ``inherited`` descriptors and the ``notifier``, the way to whoever keeps some.

        Args:
            inherited: what a predecessor left, by name.
            notifier: the way to the store.
            room: how many descriptors it keeps; None: it did not say.
        """
        self._inherited = dict(inherited or {})
        self.notifier = Notifier() if notifier is None else notifier
        self._own: set[str] = set()
        self.room = room
        self._kept = set(self._inherited)
        self._n_reserved = 0
        self._is_ending = False
        self.has_mount = "fuse" in self._inherited
        """Whether there is a mount that outlives this process, inherited or our own."""

    @property
    def is_on(self) -> bool:
        """Whether what is kept outlives this process."""
        return self.notifier.is_on

    @property
    def is_ending(self) -> bool:
        """Whether the daemon ends in order."""
        return self._is_ending

    def take(self, name: str) -> int | None:
        """Return the inherited descriptor of this name, which is the caller's from now on; None if there is none."""
        return self._inherited.pop(name, None)

    def untaken(self, prefix: str) -> list[str]:
        """Return the names that begin with ``prefix`` of what was inherited and nobody has taken."""
        return [name for name in self._inherited if name.startswith(prefix)]

    def keep(self, name: str, descriptor: int) -> None:
        """Have a duplicate of ``descriptor`` outlive this process under ``name``, which must not be kept already.

        Raises:
            ConfigError: there is no room for it; never of a mark that a place was reserved for.
        """
        n_others = sum(not kept.startswith(FAILED) for kept in self._kept)
        is_full = self.room is not None and n_others >= self.room - self._n_reserved
        if is_full and self.is_on and not name.startswith(FAILED):
            raise ConfigError(
                f"no room to keep '{name}' for a successor of this daemon: the descriptor store holds {self.room}; "
                "serve fewer disks per daemon, or raise the unit's FileDescriptorStoreMax="
            )
        self._own.add(name)
        self._kept.add(name)
        self.notifier.send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [descriptor])

    def reserve(self, n_marks: int) -> None:
        """Leave places to as many marks, whatever else is to be kept."""
        self._n_reserved = n_marks

    def forget(self, name: str) -> None:
        """Have what is kept under ``name`` closed."""
        self._kept.discard(name)
        self.notifier.send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    @property
    def is_last(self) -> bool:
        """Whether nobody comes after this daemon: it ends in order, or nothing outlives it."""
        return self._is_ending or not self.has_mount or not self.is_on

    def release(self, name: str) -> bool:
        """Forget it, if nobody comes after us, or if it was not there before us; tell whether that was so."""
        is_over = self.is_last or name in self._own
        if is_over:
            self.forget(name)
        return is_over

    def keep_sockets(self, prefix: str, sockets: Iterable[HasDescriptor]) -> None:
        """Keep listening sockets as ``PREFIX0``, ``PREFIX1``, ...: who connects meanwhile waits for a successor."""
        for number, one in enumerate(sockets):
            self.keep(f"{prefix}{number}", one.fileno())

    def take_sockets(self, prefix: str) -> list[socket.socket]:
        """Return what a predecessor kept so."""
        return [socket.socket(fileno=self._inherited.pop(name)) for name in sorted(self.untaken(prefix))]

    def mounted(self) -> None:
        """Take note that there is a mount now which outlives this process."""
        self.has_mount = True

    def start_candidate(self, channel: HasDescriptor) -> None:
        """Have a successor started that answers on ``channel``; only by our own holder, anybody else ignores it."""
        self.notifier.send("X_FUSEMIG_UPGRADE=1", [channel.fileno()])

    def hand_over(self) -> None:
        """Have that one be the successor when this process ends."""
        self.notifier.send("X_FUSEMIG_HANDOVER=1")

    def ready(self) -> None:
        """Say that guests are served."""
        self.notifier.send("READY=1")

    def ending(self) -> None:
        """Say that the end is in order, and wanted."""
        self._is_ending = True
        self.notifier.send("STOPPING=1")

    def close(self) -> None:
        """Close what nobody took, and the way to the store; idempotent."""
        for descriptor in self._inherited.values():
            os.close(descriptor)
        self._inherited.clear()
        self.notifier.close()


def open_store(environment: MutableMapping[str, str]) -> FdStore:
    """Return the store that ``environment`` tells of, which then tells no child of ours of it.

    A standby waits here until it is its turn.

    Raises:
        SystemExit: the holder of a standby has ended.
    """
    turn = environment.pop(STANDBY, "")
    inherited = wait_for_turn(int(turn)) if turn else _inherited(environment)
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environment.pop(name, None)
    room = environment.pop("FDSTORE", "")  # systemd 254 or later, and our holder
    return FdStore(inherited, open_notifier(environment), int(room) if room.isdecimal() else None)


def wait_for_turn(descriptor: int) -> dict[str, int]:
    """Wait on the holder's socket for the descriptors of a mount whose daemon has ended."""
    with socket.socket(fileno=descriptor) as channel:
        names, rights, _, _ = socket.recv_fds(channel, _MAX_FDS * 64, _MAX_FDS)
    if not names:
        raise SystemExit(0)
    return _named(names.decode().split(":"), rights)


def _inherited(environment: Mapping[str, str]) -> dict[str, int]:
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return {}
    descriptors = range(_FIRST, _FIRST + int(environment.get("LISTEN_FDS", "0")))
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    return _named(names, descriptors)


def _named(names: Iterable[str], descriptors: Iterable[int]) -> dict[str, int]:
    """Return descriptors by name; of several with one name, which systemd keeps, the last."""
    found: dict[str, int] = {}
    for name, descriptor in zip(names, descriptors, strict=False):
        os.set_inheritable(descriptor, False)
        if name in found:
            os.close(found[name])
        found[name] = descriptor
    return found


def write_memory(name: str, content: bytes) -> int:
    """Return a descriptor of an anonymous file with ``content``, to be kept."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    os.pwrite(descriptor, content, 0)
    return descriptor


def read_memory(descriptor: int) -> bytes:
    """Return what `write_memory` put into a descriptor, and close it; empty if it is no such file."""
    try:
        size = os.fstat(descriptor).st_size
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        return os.pread(descriptor, size, 0) if is_file else b""
    finally:
        with suppress(OSError):
            os.close(descriptor)
