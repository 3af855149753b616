"""What `fusemig doctor` looks at on this machine: each check returns findings, with how to mend what is amiss.

Files of the system are read below `Machine.root`, so that a test can show a machine that it does not have.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import shutil
import ssl
import stat
import time
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fusemig.core.units import format_size
from fusemig.errors import AuthenticationError, FuseUnavailableError
from fusemig.fuse.preflight import check_device, check_library, is_allow_other_allowed
from fusemig.fuse.tuning import READ_AHEAD_KIB
from fusemig.net.credentials import Endpoint, decode_certificate, load_credentials, names_of

if TYPE_CHECKING:
    from collections.abc import Iterator

MIN_DESCRIPTORS: Final = 256
MIN_STATE_BYTES: Final = 64 << 20
"""For epoch files, journals and maps: a 16 TiB disk's map and journal have 2 MiB each."""
EXPIRY_WARNING_S: Final = 30 * 86400
_PAGES_PER_REQUEST: Final = 256
_TIME_ERROR: Final = 5
"""What adjtimex(2) returns for a clock that nobody keeps right."""


class Level(StrEnum):
    """How a finding is."""

    OK = "ok"
    WARN = "warn"
    """It works, but less well, or not for everything."""
    FAIL = "fail"
    """It does not work."""


@dataclass(frozen=True)
class Finding:
    """What was seen of one thing."""

    subject: str
    level: Level
    text: str
    remedy: str = ""
    """What to do; empty where nothing is to be done."""


@dataclass(frozen=True)
class Machine:
    """Where to look."""

    root: Path = Path("/")
    uid: int = field(default_factory=os.geteuid)
    release: str = field(default_factory=platform.release)
    path: str = field(default_factory=lambda: os.environ.get("PATH", os.defpath))

    @property
    def is_root(self) -> bool:
        """Whether we may do everything."""
        return self.uid == 0

    def read(self, name: str) -> str | None:
        """Return a file's text; None if there is none."""
        try:
            return (self.root / name.lstrip("/")).read_text(errors="replace").strip()
        except OSError:
            return None


def fuse(machine: Machine) -> Iterator[Finding]:
    """Look at what mounting needs, and at what an ordinary user goes without."""
    try:
        check_device(machine.root / "dev/fuse")
        yield Finding("fuse device", Level.OK, "/dev/fuse can be opened")
    except FuseUnavailableError as exc:
        cause, _, remedy = str(exc).partition("; " if "; " in str(exc) else ": ")
        yield Finding("fuse device", Level.FAIL, cause, remedy)
    helper = shutil.which("fusermount3", path=machine.path)
    if machine.is_root:
        yield Finding("fuse helper", Level.OK, "root mounts by itself")
    elif helper is None:
        yield Finding("fuse helper", Level.FAIL, "there is no fusermount3", "install the package fuse3, or run as root")
    elif not Path(helper).stat().st_mode & stat.S_ISUID:
        remedy = f"make it so (chown root {helper} && chmod u+s {helper}), or run as root"
        yield Finding("fuse helper", Level.FAIL, f"{helper} is not setuid root, so it cannot mount", remedy)
    else:
        yield Finding("fuse helper", Level.OK, f"{helper} mounts for this user")
    if machine.is_root or is_allow_other_allowed(machine.root / "etc/fuse.conf"):
        yield Finding("allow_other", Level.OK, "--allow-other may be used")
    else:
        yield Finding(
            "allow_other",
            Level.WARN,
            "--allow-other may not be used: a VM of another user cannot open the disks",
            "add the line user_allow_other to /etc/fuse.conf, or run as root",
        )
    if machine.is_root:
        yield Finding("user", Level.OK, "root")
    else:
        yield Finding(
            "user",
            Level.OK,
            f"an ordinary one ({machine.uid}): disks are served and moved; root adds a read-ahead of "
            f"{READ_AHEAD_KIB} KiB for buffered readers, a deep queue in the pyfuse3 lane, and block devices",
        )


def kernel(machine: Machine) -> Iterator[Finding]:
    """Look at the version and at the limits that the kernel sets to FUSE."""
    match = re.match(r"(\d+)\.(\d+)", machine.release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version >= (6, 9):
        yield Finding("kernel", Level.OK, machine.release)
    else:
        lacks = "a mount that outlives its daemon needs 6.9"
        if version < (6, 6):
            lacks += ", --cache writeback in the data lane 6.6"
        yield Finding("kernel", Level.WARN, f"{machine.release}: {lacks}", "use a newer kernel where you need that")
    pages = machine.read("/proc/sys/fs/fuse/max_pages_limit")
    if pages is None or int(pages) >= _PAGES_PER_REQUEST:
        yield Finding("request size", Level.OK, "requests may have 1 MiB")
    else:
        size = format_size(int(pages) * os.sysconf("SC_PAGESIZE"))
        remedy = f"sysctl fs.fuse.max_pages_limit={_PAGES_PER_REQUEST}"
        yield Finding("request size", Level.WARN, f"requests have at most {size}: large ones are slower", remedy)
    timeout = machine.read("/proc/sys/fs/fuse/default_request_timeout")
    if timeout not in (None, "0"):
        yield Finding(
            "request timeout",
            Level.WARN,
            f"the kernel ends a mount when a request waits for {timeout} s: QMP's `stop` may last longer",
            "sysctl fs.fuse.default_request_timeout=0, before the mount is made",
        )


def limits() -> Iterator[Finding]:
    """Look at what this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < MIN_DESCRIPTORS:
        remedy = f"ulimit -n {MIN_DESCRIPTORS} (the hard limit is {hard}), or LimitNOFILE= in the unit"
        yield Finding("descriptors", Level.WARN, f"only {soft} files may be open", remedy)
    else:
        yield Finding("descriptors", Level.OK, f"{soft} files may be open")


def clock(machine: Machine) -> Iterator[Finding]:
    """Look whether certificates can be judged by the clock, and whether time has stood still."""
    if _is_clock_kept():
        yield Finding("clock", Level.OK, "kept right by somebody (NTP)")
    else:
        yield Finding(
            "clock",
            Level.WARN,
            f"nobody keeps it right; it says {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC",
            "run an NTP client (timedatectl set-ntp true): certificates are judged by the clock",
        )
    asleep_s = time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    if asleep_s > 1 and machine.root == Path("/"):
        yield Finding(
            "suspend",
            Level.WARN,
            f"this machine was suspended for {asleep_s:.0f} s since it started: deadlines do not see that time",
            "keep a host of VMs from sleeping (systemctl mask sleep.target)",
        )


def _is_clock_kept() -> bool:
    # struct timex is read only: with `modes` 0 nothing is set, and any user may ask (adjtimex(2)).
    buffer = ctypes.create_string_buffer(256)
    return ctypes.CDLL(None).adjtimex(buffer) not in (-1, _TIME_ERROR)


def packages() -> Iterator[Finding]:
    """Look at what the daemon is made of."""
    try:
        check_library()
    except FuseUnavailableError as exc:
        cause, _, remedy = str(exc).partition("; ")
        yield Finding("packages", Level.FAIL, cause, remedy)
    else:
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("fusemig", "pyfuse3", "trio"))
        yield Finding("packages", Level.OK, f"{versions} on Python {platform.python_version()}")


def space(name: str, image: Path, size: int | None = None) -> Iterator[Finding]:
    """Look whether a sparse image can grow to ``size`` bytes, None being the size that it has."""
    directory = image.parent
    subject = f"space of {name}"
    try:
        free = shutil.disk_usage(directory).free
    except OSError as exc:
        yield Finding(subject, Level.FAIL, f"{directory}: {exc.strerror}", f"create it: mkdir -p {directory}")
        return
    try:
        status = image.stat()
    except FileNotFoundError:
        yield Finding(subject, Level.OK, f"{format_size(free)} free in {directory} for an image that is still to come")
        return
    except OSError as exc:
        yield Finding(subject, Level.FAIL, f"{image}: {exc.strerror}", "let this user read and write it")
        return
    if not stat.S_ISREG(status.st_mode):
        yield Finding(subject, Level.OK, f"{image} is a device: it takes no space elsewhere")
        return
    to_grow = max(0, (size or status.st_size) - status.st_blocks * 512)
    if to_grow > free:
        yield Finding(
            subject,
            Level.WARN,
            f"{image} may grow by {format_size(to_grow)}, and {directory} has {format_size(free)}",
            "make room before guests meet ENOSPC",
        )
    else:
        yield Finding(subject, Level.OK, f"{format_size(free)} free; {image} may grow by {format_size(to_grow)}")


def state_directory(directory: Path) -> Iterator[Finding]:
    """Look whether what must outlive a crash can be written."""
    subject = f"state in {directory}"
    if not os.access(directory, os.W_OK | os.X_OK):
        remedy = "create it and let this user write there, or name another --state-dir"
        yield Finding(subject, Level.FAIL, "epoch files cannot be written there", remedy)
        return
    free = shutil.disk_usage(directory).free
    if free < MIN_STATE_BYTES:
        yield Finding(subject, Level.WARN, f"only {format_size(free)} free", "make room: hand-offs are recorded there")
    else:
        yield Finding(subject, Level.OK, f"{format_size(free)} free")


def credentials(directory: Path, now: float) -> Iterator[Finding]:
    """Look at each end's files in a directory for ``--tls-creds``, as of ``now`` (seconds of the Unix epoch)."""
    ends = [end for end in Endpoint if (directory / f"{end}-cert.pem").exists()]
    if not ends:
        remedy = "put server-cert.pem and server-key.pem there to receive, client-* to send (docs/security.md)"
        yield Finding(f"TLS in {directory}", Level.FAIL, "it holds no certificate of ours", remedy)
    for end in ends:
        subject = f"TLS {end} in {directory}"
        try:
            load_credentials(directory, end)
        except AuthenticationError as exc:
            cause, _, remedy = str(exc).rpartition(": ")
            yield Finding(subject, Level.FAIL, cause or str(exc), remedy if cause else "")
            continue
        key = directory / f"{end}-key.pem"
        if key.stat().st_mode & 0o077:
            yield Finding(subject, Level.WARN, f"others may read {key}", f"chmod 600 {key}")
        yield _validity(subject, directory / f"{end}-cert.pem", end, now)
    yield _validity(f"TLS authority in {directory}", directory / "ca-cert.pem", None, now)


def _validity(subject: str, path: Path, end: Endpoint | None, now: float) -> Finding:
    try:
        certificate = decode_certificate(path)
    except OSError as exc:
        return Finding(subject, Level.FAIL, f"{path} cannot be read: {exc}", "replace it")
    begins, ends = (ssl.cert_time_to_seconds(certificate[name]) for name in ("notBefore", "notAfter"))
    until = time.strftime("%Y-%m-%d", time.gmtime(ends))
    if now < begins:
        since = certificate["notBefore"]
        return Finding(subject, Level.FAIL, f"{path} is valid from {since}", "check the clock, or wait")
    if now > ends:
        return Finding(
            subject, Level.FAIL, f"{path} has expired on {until}", "have it signed anew; no daemon needs a restart"
        )
    if ends - now < EXPIRY_WARNING_S:
        return Finding(subject, Level.WARN, f"{path} expires on {until}", "have it signed anew before that")
    names = names_of(certificate)
    hosts = [name for name in names if name.startswith(("DNS:", "IP Address:"))]
    if end is Endpoint.SERVER and not hosts:
        remedy = "have it signed with subjectAltName DNS:HOST; sources check it, and nothing else"
        return Finding(subject, Level.FAIL, f"{path} names no host", remedy)
    who = ", ".join(hosts or names[:1]) if end is not None else certificate["subject"][-1][0][1]
    return Finding(subject, Level.OK, f"{who}, until {until}")
