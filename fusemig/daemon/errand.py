"""Errand: an outgoing migration and what was asked for; what a successor of the daemon must know of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec

from fusemig.core.phase import MigrationPhase
from fusemig.handover.state import Outgoing
from fusemig.migration.commit import Route
from fusemig.migration.order import Order

if TYPE_CHECKING:
    from fusemig.handover.state import Request
    from fusemig.migration.outgoing import OutgoingMigration
    from fusemig.migration.stats import MigrationParameters

_DONE_WITH: Final = frozenset(
    {MigrationPhase.CANCELLING, MigrationPhase.CANCELLED, MigrationPhase.COMPLETED, MigrationPhase.FAILED}
)
"""A successor has nothing to do with a migration in these; whoever cancelled it was answered."""


class Errand:
    """Made with each migration that begins, or that stands for one of a former daemon."""

    def __init__(self, request: Request, migration: OutgoingMigration) -> None:
        """It begins now."""
        self.request = request
        self.migration = migration
        self._began_s = time.monotonic()
        self._has_sent = request.is_resumed

    def count_from(self, left: Outgoing) -> None:
        """It began with what a former daemon left."""
        self._began_s, self._has_sent = left.began_s, left.has_sent
        self.migration.elapsed_before_s = max(0.0, time.monotonic() - left.began_s)

    def note_phase(self, phase: MigrationPhase) -> None:
        """From the bulk phase on the destination may have something."""
        self._has_sent |= phase is MigrationPhase.BULK

    def lasting(self, parameters: MigrationParameters) -> Outgoing | None:
        """Return what a successor must know of it; None where there is nothing to go on with or to find out."""
        if self.migration.phase in _DONE_WITH:
            return None
        return Outgoing(
            request=msgspec.structs.replace(
                self.request, is_postcopy=parameters.is_postcopy, mirrors=parameters.mirrors
            ),
            session=self.migration.session,
            began_s=self._began_s,
            has_sent=self._has_sent,
            may_switch_over=self.migration.may_switch_over,
            n_reconnects=self.migration.statistics().n_reconnects,
        )


def set_parameters(parameters: MigrationParameters, request: Request, *, pauses: bool) -> None:
    """Have a migration run as ``request`` says; it pauses before the switchover if that was set (``pauses``), too."""
    parameters.pause_before_switchover = pauses or bool(request.group)
    parameters.reconnect_limit_s = request.reconnect_limit_s
    parameters.incremental = request.incremental
    parameters.compression_level = request.compression_level
    parameters.streams = request.streams
    parameters.mirrors = request.mirrors
    parameters.is_postcopy = request.is_postcopy
    parameters.order = Order(request.order)


def route_of(request: Request) -> Route:
    """Return how the destination of a migration is talked to, for whoever asks it later."""
    return Route(request.tls_directory, request.tls_hostname, request.is_insecure)
