"""``fusemig migrate``: start a migration, follow it, and say how it ended."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from fusemig.cli.exits import fail
from fusemig.cli.guest import STUCK
from fusemig.cli.guest import lines as guest_lines
from fusemig.cli.progress import make_display
from fusemig.control.client import open_control
from fusemig.core.units import format_size
from fusemig.errors import ConnectError, ConnectionLostError, StateError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fusemig.cli.progress import Display
    from fusemig.control.client import ControlClient

POLL_INTERVAL_S: Final = 0.1
DEFAULT_RECONNECT_S: Final = 30.0
SUCCESSOR_DEADLINE_S: Final = 30.0
"""For the successor of a daemon that has died to answer."""
_UNPROVEN: Final = (
    "fusemig: warning: QEMU's wire has no acknowledgement: everything was sent, and nobody has said that it arrived.\n"
    "fusemig: the disks stay read-only here; before their guests run elsewhere, see that the destination completed"
)
_OVER: Final = frozenset({"completed", "failed", "cancelled"})


@dataclass(frozen=True)
class MigrateRequest:
    """The options of ``fusemig migrate``."""

    socket: Path
    uri: str
    disks: tuple[str, ...] = ()
    max_bandwidth: int | None = None
    downtime_limit: float | None = None
    mode: str = "precopy"
    mirror_lag: str | None = None
    auto_mirror: bool | None = None
    throttle_max: int | None = None
    wire: str = "native"
    machine: str | None = None
    order: str = "sequential"
    compress: str | None = None
    streams: int = 1
    incremental: bool | None = None
    resume: bool = False
    reconnect: float = DEFAULT_RECONNECT_S
    guest: str | None = None
    guest_destination: str | None = None
    guest_uri: str | None = None
    pause_command: str | None = None
    resume_command: str | None = None
    command_deadline: float | None = None
    progress: str = "auto"
    detach: bool = False
    tls_creds: Path | None = None
    tls_hostname: str | None = None
    insecure: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of QMP's ``migrate``."""
        arguments: dict[str, Any] = {"uri": self.uri, "blk": True}
        if self.disks:
            arguments["x-fusemig-disks"] = list(self.disks)
        if self.mode != "precopy":
            arguments["x-fusemig-mode"] = self.mode
        if self.wire != "native":
            arguments["x-fusemig-wire"] = self.wire
        if self.machine is not None:
            arguments["x-fusemig-machine"] = self.machine
        if self.order != "sequential":
            arguments["x-fusemig-order"] = self.order
        if self.compress is not None:
            arguments["x-fusemig-compress"] = self.compress
        if self.streams != 1:
            arguments["x-fusemig-streams"] = self.streams
        if self.incremental is not None:
            arguments["inc"] = self.incremental
        if self.resume:
            arguments["resume"] = True
        if self.reconnect and self.wire == "native":
            arguments["x-fusemig-reconnect"] = round(self.reconnect * 1000)
        if self.tls_creds is not None:
            arguments["x-fusemig-tls-creds"] = str(self.tls_creds.absolute())
        if self.tls_hostname is not None:
            arguments["x-fusemig-tls-hostname"] = self.tls_hostname
        if self.insecure:
            arguments["x-fusemig-insecure"] = True
        return arguments | self._guest_arguments()

    def _guest_arguments(self) -> dict[str, Any]:
        """Return those about a guest; it is the daemon that connects, so its sockets' paths are made absolute."""
        arguments = {
            "x-fusemig-guest": _absolute(self.guest),
            "x-fusemig-guest-destination": _absolute(self.guest_destination),
            "x-fusemig-guest-uri": self.guest_uri,
            "x-fusemig-pause-command": self.pause_command,
            "x-fusemig-resume-command": self.resume_command,
            "x-fusemig-command-deadline": None
            if self.command_deadline is None
            else round(self.command_deadline * 1000),
        }
        return {name: value for name, value in arguments.items() if value is not None}

    def parameters(self) -> dict[str, Any]:
        """Return the arguments of QMP's ``migrate-set-parameters``; empty if none is given."""
        parameters: dict[str, Any] = {}
        if self.max_bandwidth is not None:
            parameters["max-bandwidth"] = self.max_bandwidth
        if self.downtime_limit is not None:
            parameters["downtime-limit"] = round(self.downtime_limit * 1000)
        if self.mirror_lag is not None:
            parameters["x-fusemig-mirror-lag"] = self.mirror_lag
        if self.auto_mirror is not None:
            parameters["x-fusemig-auto-mirror"] = self.auto_mirror
        if self.throttle_max is not None:
            parameters["x-fusemig-throttle-max"] = self.throttle_max
        return parameters


def _absolute(guest: str | None) -> str | None:
    """Return ``qmp:PATH`` with an absolute path; anything else as it is, for the daemon to refuse."""
    if guest is None or not guest.startswith("qmp:") or guest == "qmp:":
        return guest
    return f"qmp:{Path(guest.removeprefix('qmp:')).absolute()}"


async def migrate_command(request: MigrateRequest) -> int:
    """Migrate; return the exit code.

    Cancellation by SIGINT: the first cancels the migration and waits for its end, the second gives up waiting.
    """
    async with open_control(request.socket) as control:
        if parameters := request.parameters():
            await control.execute("migrate-set-parameters", parameters)
        await control.execute("migrate", request.arguments())
        if request.detach:
            return 0
        with make_display(request.progress) as display:
            info = await _Watch(request.socket, display).follow(control)
    return _outcome(info, is_quiet=request.progress == "json")


class _Watch:
    """Shows a migration until it is over, also across daemons that succeed each other."""

    def __init__(self, socket: Path, display: Display) -> None:
        self._socket = socket
        self._display = display
        self._n_interrupts = 0
        self._session = ""
        self._has_changed = False
        """Whether another daemon answers, which may not have come as far as the migration yet."""
        self._changed_at = 0.0

    async def follow(self, control: ControlClient) -> dict[str, Any]:
        """Return the last answer of ``query-migrate``.

        Raises:
            ConnectionLostError: the daemon has gone, and none came after it.
            StateError: it is another migration that runs there.
        """
        with trio.open_signal_receiver(signal.SIGINT) as interrupts:
            try:
                return await self._follow(control, interrupts)
            except ConnectionLostError as exc:
                lost = exc
            while True:
                self._has_changed, self._changed_at = True, trio.current_time()
                try:
                    # Whoever is to be succeeded leaves a socket on which one can wait.
                    async with open_control(self._socket, SUCCESSOR_DEADLINE_S) as successor:
                        return await self._follow(successor, interrupts)
                except ConnectionLostError:
                    continue
                except ConnectError:
                    raise lost from None

    async def _follow(self, control: ControlClient, interrupts: AsyncIterator[int]) -> dict[str, Any]:
        while True:
            info: dict[str, Any] = await control.execute("query-migrate")
            begun = info.get("x-fusemig", {}).get("session", "")
            if begun or not self._has_changed:
                if self._session not in ("", begun) and not self._has_changed:
                    raise StateError("another migration began before this one's outcome was read; see the daemon's log")
                self._session, self._has_changed = begun, False
                self._display.show(info)
                if info.get("status") in _OVER:
                    return info
            elif trio.current_time() > self._changed_at + SUCCESSOR_DEADLINE_S:
                raise StateError(
                    "the daemon was restarted and knows of no migration: it may have ended just before; see"
                    " `fusemig status` on both sides"
                )
            with trio.move_on_after(POLL_INTERVAL_S):
                await anext(interrupts)
                self._n_interrupts += 1
            if self._n_interrupts == 1:
                self._n_interrupts += 1
                print("fusemig: cancelling (interrupt again to stop waiting)", file=sys.stderr)
                await control.execute("migrate_cancel")
            elif self._n_interrupts > 2:
                raise KeyboardInterrupt


def _outcome(info: dict[str, Any], *, is_quiet: bool) -> int:
    own = info["x-fusemig"]
    guest = own.get("guest", {})
    if guest and not is_quiet:
        for line in guest_lines(guest):
            print(f"fusemig: {line}", file=sys.stderr)
    code = _disks_outcome(info, is_quiet=is_quiet)
    if "error" in guest:
        stuck = fail(guest["error"], "guest")
        return stuck if guest["state"] in STUCK else code
    return code


def _disks_outcome(info: dict[str, Any], *, is_quiet: bool) -> int:
    own = info["x-fusemig"]
    if info["status"] == "completed":
        if not is_quiet:
            seconds = info["total-time"] / 1000
            kept = f", {format_size(own['kept-bytes'])} kept" if own["kept-bytes"] else ""
            print(
                f"fusemig: completed in {seconds:.2f} s, {own['pass']} passes, "
                f"downtime {info.get('downtime', '?')} ms{kept}",
                file=sys.stderr,
            )
        if own["wire"] == "qemu":
            print(_UNPROVEN, file=sys.stderr)
        return 0
    kind = own.get("error-kind", "failed")
    if info["status"] == "cancelled":
        return fail(info.get("error-desc", "cancelled; the disks stay here"), "cancelled")
    return fail(info.get("error-desc", "the migration failed; see the daemon's log"), kind)
