"""Limits of the kernel's side of a mount that only root can raise, and that pyfuse3 has no option for.

    read_ahead_kb          how far a buffered reader reads ahead: 128 KiB by default
    max_background         asynchronous requests (O_DIRECT of libaio and io_uring, read-ahead) that may wait for an
                           answer at a time: 12 by default, for the whole mount. That bounds the queue depth; and
                           twelve parked asynchronous writes of one frozen disk would stop those of every other disk.
    congestion_threshold   where the kernel starts to hold read-ahead back

Every failure is logged and otherwise ignored: the mount works without.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

if TYPE_CHECKING:
    from collections.abc import Iterator

READ_AHEAD_KIB: Final = 1024

_CONNECTIONS: Final = Path("/sys/fs/fuse/connections")
# System calls of the mount API have one number on every architecture (asm-generic/unistd.h).
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_CLOEXEC: Final = 1  # FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC
_FSCONFIG_CMD_CREATE: Final = 6

log = structlog.get_logger()


def raise_limits(device: int, max_background: int) -> None:
    """Raise the limits of the mount whose device number is ``device``, where we may."""
    try:
        name = f"{os.major(device)}:{os.minor(device)}"
        Path(f"/sys/class/bdi/{name}/read_ahead_kb").write_text(str(READ_AHEAD_KIB))
    except OSError as exc:
        log.info("read-ahead stays as it is", reason=str(exc))
    value = min(max_background, 0xFFFF)
    try:
        with _connections() as directory:
            connection = os.open(str(os.minor(device)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
            try:
                _write(connection, "max_background", value)
                _write(connection, "congestion_threshold", value * 3 // 4)
            finally:
                os.close(connection)
    except OSError as exc:
        log.info("the depth of the queue stays as it is", reason=str(exc))


def _write(directory: int, name: str, value: int) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.write(fd, b"%d\n" % value)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _connections() -> Iterator[int]:
    """Open the directory of FUSE connections; where nobody has mounted it, through a mount that is attached nowhere."""
    fds: list[int] = []
    try:
        if any(_CONNECTIONS.glob("*")):
            fds.append(os.open(_CONNECTIONS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        else:
            fds.append(_syscall(_SYS_FSOPEN, b"fusectl", _CLOEXEC))
            _syscall(_SYS_FSCONFIG, fds[0], _FSCONFIG_CMD_CREATE, None, None, 0)
            fds.append(_syscall(_SYS_FSMOUNT, fds[0], _CLOEXEC, 0))
        yield fds[-1]
    finally:
        for fd in fds:
            os.close(fd)


def _syscall(number: int, *args: bytes | int | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result = int(libc.syscall(ctypes.c_long(number), *args))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
