"""MetadataLink: the way of requests that the lane does not answer to pyfuse3, and of its replies to the kernel.

pyfuse3 need not be there yet: what it is sent waits in the socket pair, and in a thread when that is full. What it
cannot say is said here, in the replies to INIT and OPEN.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from fusemig.fuse import abi
from fusemig.fuse.abi import AbiError, Opcode
from fusemig.fuse.device import GONE
from fusemig.fuse.lane import MAX_WRITE
from fusemig.fuse.pool import SleepPool

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_BACKGROUND: Final = 128
"""Asynchronous requests that the kernel has in flight; its default of 12 leaves deep queues waiting."""
CONGESTION_THRESHOLD: Final = 96

_SOCKET_BUFFER: Final = 4 << 20
_SO_SNDBUFFORCE: Final = 32
_MAX_MESSAGE: Final = (1 << 20) + 4096

log = structlog.get_logger()


class MetadataLink:
    """The way of other requests to pyfuse3, and of its replies to the kernel."""

    def __init__(self, device_fd: int, keep_init: Callable[[bytes, int], None] | None = None) -> None:
        """Make the socket pair; ``keep_init`` is given the kernel's INIT request, and its flags, before its answer."""
        self._device = device_fd
        self._keep_init = keep_init
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._ours, self._theirs):
            try:
                end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BUFFER)
            except PermissionError:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        self._sender = SleepPool("lane-link-send", 1)
        self._thread = threading.Thread(target=self._run, name="lane-link", daemon=True)
        # Requests whose reply will be edited, by unique; each is written by one thread and taken by another.
        self._asked: dict[int, int] = {}
        self._direct: set[int] = set()
        # Of an adopted mount: the reply to the INIT request that pyfuse3 was given again.
        self._is_adopted = False
        self._init_reply: bytes | None = None
        self._init_unique: int | None = None
        self._init_lock = threading.Lock()
        self.has_init = threading.Event()
        """Set when pyfuse3 has answered an INIT."""

    def start(self) -> str:
        """Start the thread; return the mount point to give to pyfuse3, whose session owns the descriptor from now."""
        self._thread.start()
        return f"/dev/fd/{self._theirs.detach()}"

    def adopt(self, init_request: bytes) -> None:
        """Give pyfuse3 the INIT request of a mount that exists, before any other; after `start`."""
        self._is_adopted = True
        self._asked[abi.parse_in_header(init_request).unique] = abi.parse_init(init_request).flags
        self._ours.send(abi.without_splice(init_request), socket.MSG_NOSIGNAL)

    def forward(self, opcode: int, unique: int, message: bytes) -> None:
        """Send a request to pyfuse3; from any thread, does not wait."""
        if opcode == Opcode.INIT:
            if self._is_adopted:  # the predecessor died before it had answered
                self._settle_init(unique=unique)
                return
            flags = abi.parse_init(message).flags
            if self._keep_init is not None:
                self._keep_init(message, flags)
            self._asked[unique] = flags
            message = abi.without_splice(message)
        elif opcode == Opcode.OPEN and abi.parse_open(message).flags & os.O_DIRECT:
            self._direct.add(unique)
        try:
            self._ours.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            self._sender.submit(partial(self._send_slowly, message))

    def _send_slowly(self, message: bytes) -> None:
        try:
            self._ours.send(message, socket.MSG_NOSIGNAL)
        except OSError as exc:
            log.error("a request could not be passed to pyfuse3", error=str(exc))

    def _run(self) -> None:
        buffer = bytearray(_MAX_MESSAGE)
        view = memoryview(buffer)
        while True:
            try:
                n = self._ours.recv_into(buffer)
                if n == 0:
                    return
                if reply := self._edited(view[:n]):
                    os.write(self._device, reply)
            except AbiError:
                log.exception("pyfuse3 sent a malformed reply")
            except OSError as exc:
                if exc.errno not in GONE:
                    log.exception("a reply of pyfuse3 was lost")

    def _settle_init(self, *, unique: int | None = None, reply: bytes | None = None) -> None:
        """Answer the kernel's own INIT request of an adopted mount, when it has come and what to answer is known."""
        with self._init_lock:
            self._init_unique = self._init_unique if unique is None else unique
            self._init_reply = self._init_reply if reply is None else reply
            if self._init_unique is None or self._init_reply is None:
                return
            answer = abi.with_unique(self._init_reply, self._init_unique)
        os.write(self._device, answer)

    def _edited(self, message: memoryview) -> memoryview | bytes:
        """Return the reply that the kernel gets for this one of pyfuse3; nothing if it gets none."""
        header = abi.parse_out_header(message)
        if header.unique in self._direct:
            self._direct.discard(header.unique)
            if not header.error:
                out = abi.parse_open_reply(message)
                flags = out.open_flags | abi.FOPEN_DIRECT_IO | abi.FOPEN_PARALLEL_DIRECT_WRITES
                return abi.open_reply(header.unique, out._replace(open_flags=flags))
        elif header.unique in self._asked:
            asked = self._asked.pop(header.unique)
            if not header.error:
                reply = abi.init_reply(header.unique, edited_init(asked, abi.parse_init_reply(message)))
                self.has_init.set()
                if self._is_adopted:
                    self._settle_init(reply=reply)
                    return b""
                return reply
        return message

    def close(self, timeout_s: float) -> None:
        """End the thread; pyfuse3 must have closed its end, or never got it. May wait for it."""
        self._sender.close()
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout_s)
        self._ours.close()
        self._theirs.close()


def edited_init(asked: int, out: abi.InitOut) -> abi.InitOut:
    """Return the INIT reply for a kernel that offers the flags ``asked``; never more flags than those.

    Shared mappings of files opened with O_DIRECT are asked for where the kernel has them: without, an inode that is
    open both ways would not be coherent. Nor would the write-back cache be, which therefore stays off without them: a
    read through O_DIRECT would not see what was written through the cache.
    """
    flags = out.flags
    if asked & abi.INIT_EXT and asked & abi.INIT_DIRECT_IO_ALLOW_MMAP:
        flags |= abi.INIT_EXT | abi.INIT_DIRECT_IO_ALLOW_MMAP
    elif flags & abi.INIT_WRITEBACK_CACHE:
        log.warning("no write-back cache: this kernel (before 6.6) could not keep it coherent with O_DIRECT")
        flags &= ~abi.INIT_WRITEBACK_CACHE
    return out._replace(
        flags=flags & asked,
        max_background=MAX_BACKGROUND,
        congestion_threshold=CONGESTION_THRESHOLD,
        max_write=min(out.max_write, MAX_WRITE),
    )
