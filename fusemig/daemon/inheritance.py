"""Inheritance: what a daemon leaves to its successor, and what it found of its predecessor's.

    keep         the daemon's state as it is now ─> memory that outlives it     at every change, before it is reported
    restore      parameters, capabilities, objects, where to listen             before anybody can ask for them
    take_up      the outgoing migration                                         when migrations can run

Without a memory, in a daemon that nobody would succeed, nothing is kept and nothing found.

What decides about guests' requests, `stop` too, is in force before the first is answered (`fusemig.daemon.estate`). Who
may write a disk is in its epoch file, and what was sent in the maps and journals: nothing of that is here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import structlog

from fusemig.daemon.qmp_objects import load, make_object
from fusemig.errors import FusemigError, StateError
from fusemig.fuse.lane_mount import DataLaneMount
from fusemig.handover.state import FileTimes, Hints, Parameters, State
from fusemig.net.credentials import Endpoint

if TYPE_CHECKING:
    from fusemig.daemon.daemon import Daemon
    from fusemig.handover.state import Outgoing
    from fusemig.net.credentials import Credentials

log = structlog.get_logger(__name__)


class Inheritance:
    """Of one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        """Have what the daemon before this one left from the daemon's `Estate`."""
        self._daemon = daemon
        self._estate = daemon.estate
        self.found = self._estate.found
        """What the daemon before this one left."""
        self._estate.exports.on_times_set = self.keep_anyhow

    # What is left

    def keep(self, left_s: float = 0.0) -> None:
        """Have a successor know what is known now, and `State.left_s`; returns when it would.

        Raises:
            StateError: it has grown too large; a successor would find what was kept before.
        """
        if self._estate.memory is not None:
            self._estate.memory.write(msgspec.structs.replace(self.state(), left_s=left_s))

    def keep_anyhow(self, left_s: float = 0.0) -> None:
        """Do as `keep`, where a failure cannot be told to anybody."""
        try:
            self.keep(left_s)
        except StateError as exc:
            log.error("a successor would not know the latest state", reason=str(exc))

    def state(self) -> State:
        """Return what a successor must know."""
        daemon = self._daemon
        security, parameters = daemon.security, daemon.migrator.parameters
        listener = daemon.inbound.listener
        return State(
            mount=self._estate.mount(),
            sizes={name: served.disk.size for name, served in daemon.disks.items() if served.disk is not None},
            is_stopped=daemon.pause.is_on,
            parameters=Parameters(
                max_bandwidth=parameters.max_bandwidth,
                downtime_limit_s=parameters.downtime_limit_s,
                tls_creds=security.tls_creds,
                tls_hostname=security.tls_hostname,
                tls_authz=security.tls_authz,
            ),
            capabilities=tuple(sorted(daemon.migrator.capabilities)),
            objects=tuple(security.described.values()),
            listening="" if listener is None else str(listener.uri),
            outgoing=self.left_outgoing or daemon.migrator.lasting,
            hints=self._hints(),
            n_predecessors=0 if self.found is None else self.found.n_predecessors + 1,
        )

    def _hints(self) -> Hints | None:
        exports = [served.export for served in self._daemon.disks.values() if served.export.changed_ns]
        times = {
            one.name: FileTimes(atime_ns=one.atime_ns, mtime_ns=one.mtime_ns, changed_ns=one.changed_ns)
            for one in exports
        }
        return Hints(times=times) if times else None

    @property
    def pause_s(self) -> float | None:
        """How long no request was taken, where the daemon before this one left for it; None: it did not, or not yet."""
        mount = self._daemon.mount
        if self.found is None or not self.found.left_s or not isinstance(mount, DataLaneMount):
            return None
        return max(0.0, mount.started_s - self.found.left_s)

    # What was found

    async def restore(self) -> None:
        """Be as the daemon before this one was, but for its migration; the disks are as it left them already."""
        state = self.found
        if state is None:
            return
        daemon = self._daemon
        if state.is_stopped:
            daemon.pause.hold()
        daemon.migrator.parameters.max_bandwidth = state.parameters.max_bandwidth
        daemon.migrator.parameters.downtime_limit_s = state.parameters.downtime_limit_s
        daemon.migrator.capabilities.update(state.capabilities)
        security = daemon.security
        security.tls_creds = state.parameters.tls_creds
        security.tls_hostname = state.parameters.tls_hostname
        security.tls_authz = state.parameters.tls_authz
        for described in state.objects:
            try:
                security.add(described, await make_object(described))
            except FusemigError as exc:  # the guests' disks are served all the same
                log.warning("an object is missing after the restart", object=described.id, reason=str(exc))
        if state.listening:
            daemon.inbound.listen_at(state.listening)

    async def take_up(self) -> None:
        """Go on with the outgoing migration of the daemon before this one, if it left one."""
        left = self.left_outgoing
        if left is None:
            return
        tls: Credentials | FusemigError | None = None
        try:
            if left.request.tls_directory:
                tls = await load(left.request.tls_directory, Endpoint.CLIENT)
        except FusemigError as exc:
            tls = exc
        self._daemon.continuation.take_up(left, tls)

    @property
    def left_outgoing(self) -> Outgoing | None:
        """The migration that was found and is still to be taken up."""
        return self.found.outgoing if self.found is not None and self._daemon.migrator.migration is None else None
