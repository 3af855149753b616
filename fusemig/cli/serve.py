"""``fusemig serve``."""

from __future__ import annotations

import gc
import os
import signal
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from fusemig import failpoint
from fusemig.cli.exits import run
from fusemig.daemon.disk_spec import parse_disk
from fusemig.daemon.estate import Estate
from fusemig.daemon.serve_options import ServeOptions
from fusemig.disk.zeroes import DetectZeroes
from fusemig.errors import ConfigError
from fusemig.fuse.preflight import Lane
from fusemig.records.epoch import sync_directory
from fusemig.wire.base import IncomingWire

if TYPE_CHECKING:
    from pathlib import Path

    from fusemig.daemon.disk_spec import DiskSpec
    from fusemig.net.credentials import Credentials
    from fusemig.succession.fdstore import FdStore


log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ServeRequest:
    """The options of ``fusemig serve``, in the words of the command line."""

    mountpoint: Path
    disks: tuple[str, ...]
    control: Path
    incoming: str | None
    wire: str
    read_only: tuple[str, ...]
    state_dir: Path | None
    allow_other: bool
    lane: str
    lane_threads: int | None
    cache: str
    detect_zeroes: str
    allow_guest_commands: bool
    tls_creds: Path | None
    tls_authz: tuple[str, ...]
    insecure: bool
    metrics: str | None
    metrics_insecure: bool
    web: str | None
    web_insecure: bool
    resilient: bool
    standby: bool


def begin(request: ServeRequest, store: FdStore) -> Estate:
    """Answer the guests of a predecessor, if ``store`` has its mount; then `go_on`.

    This is what the guests of a daemon that was killed wait for, so nothing is loaded for it that it does not need.

    Raises:
        FusemigError: it cannot be served so; nothing is left open.
    """
    with ExitStack() as stack:
        stack.callback(store.close)
        options = _options(request, is_first=not store.has_mount)
        if point := failpoint.arm(os.environ):
            log.warning("a test has this daemon kill itself", failpoint=point)
        estate = Estate(options, store)
        if store.has_mount:
            stack.enter_context(estate)
            estate.adopt()
        stack.pop_all()
    return estate


def load_rest() -> None:
    """Load what answering guests does not need: who waits for its turn has the time."""
    import fusemig.daemon.daemon  # noqa: F401


def go_on(estate: Estate) -> int:
    """Serve until SIGTERM, SIGINT, ``quit`` or an unmount from outside; return the exit code."""
    try:
        load_rest()
    except BaseException as exc:
        estate.give_up(exc)
        raise
    gc.freeze()  # what is loaded by now stays: the collector need not look at it again while guests wait
    return run(_serve, estate)


async def _serve(estate: Estate) -> None:
    from fusemig.daemon.daemon import Daemon

    try:
        await Daemon(estate.options, estate).run()
    finally:
        for number in (
            signal.SIGTERM,
            signal.SIGINT,
        ):  # nothing is left to be ended: who asks again changes no exit code
            signal.signal(number, signal.SIG_IGN)


def _options(request: ServeRequest, *, is_first: bool) -> ServeOptions:
    if request.wire != "auto" and request.incoming is None:
        raise ConfigError(f"--wire {request.wire} says what --incoming takes: add --incoming URI, or leave it out")
    tls, tls_client = _load_tls(request, is_first=is_first)
    specs = _parse_disks(request.disks, request.read_only)
    if request.state_dir is not None:
        _make_durably(request.state_dir.absolute())
    return ServeOptions(
        request.mountpoint,
        specs,
        request.control,
        request.incoming,
        IncomingWire(request.wire),
        request.state_dir,
        request.allow_other,
        Lane(request.lane),
        request.lane_threads,
        write_back=request.cache == "writeback",
        allow_guest_commands=request.allow_guest_commands,
        tls=tls,
        tls_identities=request.tls_authz,
        tls_client=tls_client,
        tls_unloaded=None if is_first else request.tls_creds,
        is_insecure=request.insecure,
        metrics=request.metrics,
        are_metrics_public=request.metrics_insecure,
        web=request.web,
        is_web_public=request.web_insecure,
        is_resilient=request.resilient,
        detect_zeroes=DetectZeroes(request.detect_zeroes),
    )


def _load_tls(request: ServeRequest, *, is_first: bool) -> tuple[Credentials | None, Credentials | None]:
    """Return `load_own`'s of --tls-creds; of a successor nothing, for its guests do not wait for files like those."""
    directory = request.tls_creds
    if request.tls_authz and (directory is None or request.incoming is None):
        raise ConfigError("--tls-authz lists who may send disks here over TLS: add --tls-creds DIR and --incoming URI")
    if directory is None:
        return None, None
    if request.insecure:
        raise ConfigError("--insecure takes back what --tls-creds demands: leave one of them out")
    if not is_first:
        return None, None
    from fusemig.net.credentials import load_own

    return load_own(directory, is_destination=request.incoming is not None)


def _make_durably(directory: Path) -> None:
    """Create a directory and what leads to it; what is created is there after a power loss too."""
    if directory.is_dir():
        return
    _make_durably(directory.parent)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        sync_directory(directory.parent)
    except OSError as exc:
        raise ConfigError(f"--state-dir {directory} cannot be created: {exc.strerror}") from exc


def _parse_disks(disks: tuple[str, ...], read_only: tuple[str, ...]) -> tuple[DiskSpec, ...]:
    specs = [parse_disk(text, read_only) for text in disks]
    names = {spec.name for spec in specs}
    for name in read_only:
        if name not in names:
            raise ConfigError(
                f"--readonly {name}: there is no --disk {name}=PATH; disks are {', '.join(sorted(names))}"
            )
    return tuple(specs)
