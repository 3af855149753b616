"""Mounting by ourselves: a /dev/fuse descriptor that belongs to a mount, and the end of that mount.

Root calls mount(2). Everybody else lets ``fusermount3`` do it, which hands the descriptor over a socket whose number it
finds in ``_FUSE_COMMFD`` (the same way libfuse uses it, lib/mount.c).

Every function here may sleep: not for the event loop.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import re
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fusemig.errors import FuseUnavailableError

if TYPE_CHECKING:
    from fusemig.fuse.preflight import MountOptions

NAME: Final = "fusemig"
"""File system name and subtype: what mount(8) shows as source, and as type after ``fuse.``."""
HELPER_TIMEOUT_S: Final = 10.0
GONE: Final = frozenset({errno.ENOENT, errno.ENOTCONN, errno.ENODEV, errno.ECONNABORTED})
"""The kernel knows nothing (any more) of what it was told about: an inode, a request, the mount."""

_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


def mount_device(mountpoint: Path, options: MountOptions) -> int:
    """Mount at ``mountpoint``; return the descriptor that its requests are read from (close-on-exec).

    Raises:
        FuseUnavailableError: the kernel or ``fusermount3`` refused, with its reason.
    """
    if os.geteuid() == 0:
        return _mount_as_root(mountpoint, options)
    return _mount_as_user(mountpoint, options)


def _mount_as_root(mountpoint: Path, options: MountOptions) -> int:
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions"
    if options.allow_other:
        data += ",allow_other"
    kind = f"fuse.{NAME}".encode()
    if _libc.mount(NAME.encode(), os.fsencode(mountpoint), kind, _MS_NOSUID | _MS_NODEV, data.encode()):
        code = ctypes.get_errno()
        os.close(device)
        raise FuseUnavailableError(
            f"cannot mount at {mountpoint}: {os.strerror(code)}; "
            "in a container, add --device /dev/fuse --cap-add SYS_ADMIN"
        )
    return device


def _mount_as_user(mountpoint: Path, options: MountOptions) -> int:
    words = ["rw", "nosuid", "nodev", f"fsname={NAME}", f"subtype={NAME}", "default_permissions"]
    if options.allow_other:
        words.append("allow_other")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            process = subprocess.Popen(
                ["fusermount3", "-o", ",".join(words), "--", os.fspath(mountpoint)],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"_FUSE_COMMFD": str(theirs.fileno())},
                stderr=subprocess.PIPE,
            )
        ours.settimeout(HELPER_TIMEOUT_S)
        devices = array.array("i")
        try:
            room = socket.CMSG_SPACE(devices.itemsize)
            _, ancillary, _, _ = ours.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    devices.frombytes(data[: devices.itemsize])
            _, errors = process.communicate(timeout=HELPER_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as exc:
            process.kill()
            process.communicate()
            for device in devices:
                os.close(device)
            raise FuseUnavailableError(f"cannot mount at {mountpoint}: fusermount3 does not answer") from exc
    if not devices:
        reason = errors.decode(errors="replace").strip() or f"fusermount3 ended with {process.returncode}"
        raise FuseUnavailableError(f"cannot mount at {mountpoint}: {reason}")
    return devices[0]


def unmount(mountpoint: Path, *, lazily: bool = False) -> bool:
    """Unmount; return False if files are open there. What is not mounted counts as unmounted.

    Lazily: take it out of the tree at once; it ends when its last file is closed, or with the descriptor.
    """
    if os.geteuid() != 0:
        command = ["fusermount3", "-u", "-q", *(["-z"] if lazily else []), "--", os.fspath(mountpoint)]
        result = subprocess.run(command, check=False, timeout=HELPER_TIMEOUT_S, capture_output=True)
        return result.returncode == 0
    if not _libc.umount2(os.fsencode(mountpoint), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazily else 0)):
        return True
    return ctypes.get_errno() in (errno.EINVAL, errno.ENOENT)


def mounted_at(mountpoint: Path) -> int | None:
    """Return the ``st_dev`` of our kind of file system at ``mountpoint``, without asking it; None if none is there."""
    found = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        rest = fields[fields.index("-") + 1 :]
        path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        if path == os.fspath(mountpoint) and rest[0] == f"fuse.{NAME}":
            major, minor = fields[2].split(":")
            found = os.makedev(int(major), int(minor))  # the last one lies on top
    return found


def is_mounted(device_number: int) -> bool:
    """Tell whether the file system with this ``st_dev`` is mounted anywhere in our namespace."""
    wanted = f"{os.major(device_number)}:{os.minor(device_number)}"
    return any(line.split()[2] == wanted for line in Path("/proc/self/mountinfo").read_text().splitlines())


def replace_by_null(descriptor: int) -> None:
    """Close a descriptor whose number must not be used again: a late answer to it shall reach nobody."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, descriptor, inheritable=False)
    os.close(null)
