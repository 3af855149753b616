"""``fusemig doctor``: what keeps fusemig from working well here, and how to mend it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from fusemig.cli import checkup
from fusemig.cli.checkup import Finding, Level, Machine
from fusemig.cli.output import print_json
from fusemig.control.client import open_control
from fusemig.daemon.disk_spec import parse_disk
from fusemig.daemon.security import Security
from fusemig.errors import AuthenticationError, ConfigError, FusemigError
from fusemig.net.credentials import Endpoint, load_credentials
from fusemig.net.transport import connect, is_private, parse_uri

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PEER_DEADLINE_S: Final = 5.0


@dataclass(frozen=True)
class DoctorRequest:
    """The options of ``fusemig doctor``."""

    socket: Path | None
    peer: str | None
    tls_creds: Path | None
    tls_hostname: str | None
    as_json: bool
    configured: Mapping[str, Any]
    """What `serve` would use, by the keys of fusemig.toml."""


async def doctor_command(request: DoctorRequest) -> int:
    """Look at everything; return 1 if something does not work."""
    findings = await trio.to_thread.run_sync(_look_around, request)
    if request.socket is not None:
        findings += await _look_at_daemon(request.socket)
    if request.peer is not None:
        findings.append(await _look_at_peer(request.peer, request.tls_creds, request.tls_hostname or ""))
    if request.as_json:
        for finding in findings:
            print_json(asdict(finding))
    else:
        for finding in findings:
            print(f"{finding.level.value:<5} {finding.subject}: {finding.text}")
            if finding.remedy:
                print(f"      -> {finding.remedy}")
    return int(any(finding.level is Level.FAIL for finding in findings))


def _look_around(request: DoctorRequest) -> list[Finding]:
    machine = Machine()
    findings = [
        *checkup.packages(),
        *checkup.fuse(machine),
        *checkup.kernel(machine),
        *checkup.limits(),
        *checkup.clock(machine),
    ]
    if request.tls_creds is not None:
        findings += checkup.credentials(request.tls_creds, time.time())
    if request.socket is None:
        findings += _look_at_configured_disks(request.configured)
    return findings


def _look_at_configured_disks(configured: Mapping[str, Any]) -> Iterator[Finding]:
    state = configured.get("state-dir")
    for text in configured.get("disk") or ():
        try:
            spec = parse_disk(text, ())
        except ConfigError as exc:
            yield Finding("disk", Level.FAIL, str(exc), "see docs/cli.md")
            continue
        yield from checkup.space(spec.name, spec.path)
        if state is None and not spec.path.is_block_device():
            yield from checkup.state_directory(spec.path.parent)
    if state is not None:
        yield from checkup.state_directory(Path(state))


async def _look_at_daemon(socket: Path) -> list[Finding]:
    try:
        async with open_control(socket) as control:
            status: dict[str, Any] = await control.execute("x-fusemig-status")
    except FusemigError as exc:
        cause, _, remedy = str(exc).partition("; ")
        return [Finding("daemon", Level.FAIL, cause, remedy)]
    found = [Finding("daemon", Level.OK, f"{status['status']}, fusemig {status['version']}, pid {status['pid']}")]
    if status["handler-errors"]:
        text = f"{status['handler-errors']} requests were answered EIO because of a bug"
        found.append(Finding("daemon", Level.FAIL, text, "look for `exception` in its log, and report it"))
    for disk in status["disks"]:
        found += await trio.to_thread.run_sync(_look_at_disk, disk)
    return found


def _look_at_disk(disk: Mapping[str, Any]) -> list[Finding]:
    name, path = disk["name"], Path(disk["path"])
    found = list(checkup.space(name, path, disk["size"] or None))
    if disk["io-error"]:
        remedy = "stop its guest, check the image and its store, then serve it anew"
        found.append(Finding(f"disk {name}", Level.FAIL, "a sync of its image has failed", remedy))
    if "in-doubt" in disk:
        text = f"it is in doubt who owns it: {disk['in-doubt']}"
        found.append(Finding(f"disk {name}", Level.FAIL, text, "see `fusemig resolve --help`"))
    return found


async def _look_at_peer(text: str, directory: Path | None, hostname: str) -> Finding:
    subject = f"peer {text}"
    try:
        uri = parse_uri(text)
        client = None
        if directory is not None:
            client = await trio.to_thread.run_sync(load_credentials, directory, Endpoint.CLIENT)
        secure = Security().outgoing(uri, client, hostname, is_insecure=True)
        begin = trio.current_time()
        stream = await connect(uri, PEER_DEADLINE_S)
        took_ms = (trio.current_time() - begin) * 1000
        with trio.move_on_after(PEER_DEADLINE_S) as deadline:
            stream_or_tls = await secure(stream)
            await stream_or_tls.aclose()
        if deadline.cancelled_caught:
            raise AuthenticationError(f"{uri} does not answer in the TLS handshake; look at its log")
    except FusemigError as exc:
        cause, _, remedy = str(exc).partition("; ")
        return Finding(subject, Level.FAIL, cause, remedy)
    if directory is not None:
        return Finding(subject, Level.OK, f"answers within {took_ms:.1f} ms, and proved who it is")
    if is_private(uri):
        return Finding(subject, Level.OK, f"answers within {took_ms:.1f} ms")
    return Finding(
        subject, Level.WARN, f"answers within {took_ms:.1f} ms, in plain text", "name credentials: --tls-creds DIR"
    )
