"""What ``fusemig serve`` was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusemig.disk.zeroes import DetectZeroes
from fusemig.fuse.preflight import Lane
from fusemig.wire.base import IncomingWire

if TYPE_CHECKING:
    from pathlib import Path

    from fusemig.daemon.disk_spec import DiskSpec
    from fusemig.net.credentials import Credentials


@dataclass(frozen=True)
class ServeOptions:
    """The options, checked one by one; the daemon and `fusemig.daemon.estate` check them against each other."""

    mountpoint: Path
    disks: tuple[DiskSpec, ...]
    control: Path
    incoming: str | None = None
    wire: IncomingWire = IncomingWire.AUTO
    state_dir: Path | None = None
    allow_other: bool = False
    lane: Lane = Lane.AUTO
    lane_threads: int | None = None
    write_back: bool = False
    """The kernel's write-back cache (``--cache writeback``)."""
    allow_guest_commands: bool = False
    """Run the pause and resume commands that clients of the control socket name."""
    tls: Credentials | None = None
    """What proves this destination to sources; with it they must prove who they are."""
    tls_identities: tuple[str, ...] = ()
    """The sources that are admitted then."""
    tls_client: Credentials | None = None
    """What proves this source where a migration brings no credentials of its own."""
    tls_unloaded: Path | None = None
    """The directory that both are still to be loaded from, once guests are served; no migration before that."""
    is_insecure: bool = False
    """Plain text may cross the network."""
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    metrics: str | None = None
    """Where Prometheus is answered: a URI."""
    are_metrics_public: bool = False
    """That may be an address which other hosts reach."""
    web: str | None = None
    """Where the web page is served: a URI."""
    is_web_public: bool = False
    """That may be an address which other hosts reach."""
    heeds_signals: bool = True
    """SIGTERM and SIGINT ask for an orderly end; else they are left to the program that this is a part of."""
    is_resilient: bool = False
    """The mount must be one that can outlive this process."""
