"""What is asked of a mount, and what can be told before it is tried: each refusal says what to do about it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from fusemig.errors import FuseUnavailableError

FUSE_DEVICE: Final = Path("/dev/fuse")
FUSE_CONFIG: Final = Path("/etc/fuse.conf")


class Lane(Enum):
    """How guest I/O reaches the disks; the words of ``--lane``."""

    AUTO = "auto"
    """The data lane; if it cannot be had, the pyfuse3 lane, and a line in the log that says why."""
    DATA = "data"
    """Threads that answer reads and writes straight from /dev/fuse."""
    PYFUSE3 = "pyfuse3"
    """A handler of pyfuse3's for every request."""


@dataclass(frozen=True)
class MountOptions:
    """How to mount."""

    allow_other: bool = False
    """Let other users in; without root it needs ``user_allow_other`` in /etc/fuse.conf."""
    max_tasks: int = 4096
    """Requests handled at a time; every parked write occupies one."""
    write_back: bool = False
    """Let the kernel acknowledge buffered writes before we have seen them; `fusemig.fuse.operations` has the cost."""


def check_mountable(mountpoint: Path, options: MountOptions) -> None:
    """Raise `FuseUnavailableError`, with what to do, for every reason that can be told beforehand."""
    if "FUSE_URING_ENABLE" in os.environ:
        raise FuseUnavailableError(
            "FUSE_URING_ENABLE is set: libfuse would run its own threads, which pyfuse3 does not survive; unset it"
        )
    check_device(FUSE_DEVICE)
    is_root = os.geteuid() == 0
    if not is_root and shutil.which("fusermount3") is None:
        raise FuseUnavailableError("mounting without root needs fusermount3: install the package fuse3, or run as root")
    if options.allow_other and not is_root and not is_allow_other_allowed():
        raise FuseUnavailableError(
            f"allow-other without root needs the line user_allow_other in {FUSE_CONFIG}: add it, or run as root"
        )
    _check_mountpoint(mountpoint)


def check_device(device: Path) -> None:
    """Raise `FuseUnavailableError` unless this process may open ``device``."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError as exc:
        raise FuseUnavailableError(
            f"there is no {device}: load the module (modprobe fuse), or start the container with --device /dev/fuse"
        ) from exc
    except OSError as exc:
        raise FuseUnavailableError(
            f"cannot open {device}: {exc.strerror}; "
            "give this user access to it, or start the container with --device /dev/fuse"
        ) from exc


def check_library() -> None:
    """Raise `FuseUnavailableError` if pyfuse3, or the libfuse that it was built for, cannot be loaded."""
    try:
        import pyfuse3  # noqa: F401
    except ImportError as exc:
        raise FuseUnavailableError(f"pyfuse3 cannot be loaded: {exc}; install libfuse3 and fusemig anew") from exc


def is_allow_other_allowed(config: Path = FUSE_CONFIG) -> bool:
    """Tell whether users may use ``--allow-other``, by fuse.conf."""
    try:
        lines = config.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _check_mountpoint(mountpoint: Path) -> None:
    try:
        mode = mountpoint.stat().st_mode
        is_mounted = os.path.ismount(mountpoint)
        if is_mounted and stat.S_ISDIR(mode):
            with contextlib.suppress(PermissionError):
                os.scandir(mountpoint).close()  # stat may be answered from the attributes that a dead mount left behind
    except OSError as exc:
        hint = {
            errno.ENOENT: f"create it (mkdir -p {mountpoint})",
            errno.ENOTCONN: f"a dead mount is left there: unmount it (fusermount3 -u -z {mountpoint})",
        }.get(exc.errno or 0, "check the path")
        raise FuseUnavailableError(f"cannot mount at {mountpoint}: {exc.strerror}; {hint}") from exc
    if not stat.S_ISDIR(mode):
        raise FuseUnavailableError(f"cannot mount at {mountpoint}: it is not a directory; name an empty directory")
    if is_mounted:
        raise FuseUnavailableError(
            f"cannot mount at {mountpoint}: something is mounted there already; unmount it, or name another directory"
        )
    with contextlib.suppress(PermissionError):  # not readable for us: the mount itself will tell
        if any(mountpoint.iterdir()):
            raise FuseUnavailableError(
                f"cannot mount at {mountpoint}: it is not empty, and the mount would hide what is in it; "
                "name an empty directory"
            )
