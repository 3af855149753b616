"""Continuation: what becomes of the migration that a former daemon ran, in the daemon that follows it.

    take_up     go on with it, or find out what has become of it and show that
    settled     it was in doubt, and it is known now who owns its disks: begin again, or end

Which of them, is decided by the epoch files of its disks; what it was asked for is what that daemon left. Only going on
needs its credentials: what has become of it is shown as it is without them, too.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from fusemig.core.phase import MigrationPhase
from fusemig.daemon.choice import resume_point
from fusemig.daemon.errand import route_of
from fusemig.errors import FusemigError, InDoubtError, MigrationError
from fusemig.migration.qemu_source import QemuSource
from fusemig.migration.source import SourceMigration
from fusemig.net.transport import parse_uri
from fusemig.records.epoch import DOUBTFUL, Ownership

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fusemig.daemon.dialer import Dialer
    from fusemig.daemon.migrator import Migrator
    from fusemig.daemon.security import Security
    from fusemig.daemon.served import ServedDisk
    from fusemig.handover.state import Outgoing
    from fusemig.migration.outgoing import OutgoingMigration
    from fusemig.net.credentials import Credentials

RECONNECT_LIMIT_S: Final = 30.0
"""How long a successor tries to reach the destination again, where nobody has said how long."""
_RESTARTED: Final = "the daemon was restarted"
_RESTARTED_IN_GROUP: Final = (
    "the daemon was restarted while its disks were to move in a group, which was called off: they stay here; migrate "
    "the group again"
)
_KILLED_IN_HANDOFF: Final = (
    "the daemon was restarted in the moment of the hand-off: the destination is being asked whether it owns the disks, "
    "see `fusemig status`; if it is gone for good, see `fusemig resolve --help`"
)
_RESTARTED_WITH_GUEST: Final = (
    "the daemon was restarted while a guest was to move with the disks, which stay here: see that the guest runs here "
    "and that none waits at the destination, then migrate again"
)
_RESTARTED_ON_QEMU_WIRE: Final = (
    "the daemon was restarted, and a migration on QEMU's wire cannot go on; the disks stay here: restart the QEMU that "
    "was to receive them, then migrate again"
)

log = structlog.get_logger(__name__)


class Continuation:
    """Of one daemon, and of at most one migration."""

    def __init__(self, migrator: Migrator, disks: Mapping[str, ServedDisk], security: Security, dialer: Dialer) -> None:
        """Take up nothing.

        Args:
            migrator: runs it, or shows it.
            disks: all disks of the daemon.
            security: decides how its destination may be talked to.
            dialer: connects to it.
        """
        self._migrator = migrator
        self._disks = disks
        self._security = security
        self._dialer = dialer
        self._interrupted: tuple[Outgoing, Credentials | FusemigError | None, OutgoingMigration] | None = None
        """What was left in doubt, and what stands for it: to be gone on with if its disks turn out to be ours."""

    def take_up(self, left: Outgoing, tls: Credentials | FusemigError | None) -> None:
        """Go on with the migration that a former daemon ran, or tell what has become of it; returns at once.

        Args:
            left: what that daemon left.
            tls: the credentials of `Request.tls_directory`, or why there are none.
        """
        states = {self._disks[name].ownership for name in left.request.disks}
        if not states.isdisjoint(DOUBTFUL):
            stand_in = self._stand_for(left, MigrationPhase.IN_DOUBT, InDoubtError(_KILLED_IN_HANDOFF))
            self._interrupted = left, tls, stand_in
        elif Ownership.LENDING in states:
            self._stand_for(left, MigrationPhase.POSTCOPY)  # `Lenders` go on with it
        elif states == {Ownership.RELEASED}:
            self._stand_for(left, MigrationPhase.COMPLETED)
        else:
            self._try_to_go_on(left, tls, may_be_there=left.has_sent or left.request.is_resumed)

    def _stand_for(self, left: Outgoing, phase: MigrationPhase, error: FusemigError | None = None) -> OutgoingMigration:
        """Show a former daemon's migration as what it has become; return what stands for it."""
        new = QemuSource if left.request.is_qemu else SourceMigration
        errand = self._migrator.make(new, left.request, [self._disks[name] for name in left.request.disks])
        errand.migration.session = left.session
        errand.count_from(left)
        errand.migration.stand_for(phase, error)
        return errand.migration

    def _try_to_go_on(self, left: Outgoing, tls: Credentials | FusemigError | None, *, may_be_there: bool) -> None:
        try:
            self._go_on(left, tls, may_be_there=may_be_there)
        except FusemigError as exc:
            self._stand_for(left, MigrationPhase.FAILED, exc)

    def _go_on(self, left: Outgoing, tls: Credentials | FusemigError | None, *, may_be_there: bool) -> None:
        request = left.request
        if request.has_guest:
            raise MigrationError(_RESTARTED_WITH_GUEST)
        if request.is_qemu:
            raise MigrationError(_RESTARTED_ON_QEMU_WIRE)
        if request.group:
            raise MigrationError(_RESTARTED_IN_GROUP)
        if isinstance(tls, FusemigError):
            raise tls
        uri = parse_uri(request.uri)
        secure = self._security.outgoing(uri, tls, request.tls_hostname, is_insecure=request.is_insecure)
        self._dialer.remember(uri, secure)
        chosen = self._migrator.choose(request.disks)
        resume = resume_point(self._migrator.migration, chosen) if may_be_there else None
        if not request.reconnect_limit_s:
            request = msgspec.structs.replace(request, reconnect_limit_s=RECONNECT_LIMIT_S)
        new = partial(
            SourceMigration,
            resume=resume,
            route=route_of(request),
            n_reconnects=left.n_reconnects,
            waiting=_RESTARTED,
        )
        errand = self._migrator.make(new, request, chosen)
        errand.count_from(left)
        if left.may_switch_over:
            errand.migration.allow_switchover()
        log.info("going on with the migration of the daemon before", uri=request.uri, disks=request.disks)
        self._migrator.start(errand, chosen)

    def settled(self, settled: Sequence[ServedDisk], *, is_by_hand: bool) -> None:
        """Have the rest of the daemon follow disks of which it is known again who owns them.

        A migration of the daemon before this one begins again if they are ours, unless it was a person who said so.
        """
        self._migrator.look_again(settled)
        migration = self._migrator.migration
        if migration is None or migration.phase is not MigrationPhase.IN_DOUBT:
            return
        records = [served.epoch_file.record for served in self._disks.values()]
        states = {record.state for record in records if record is not None and record.session == migration.session}
        if not states or not states.isdisjoint(DOUBTFUL):  # what was settled is another one's, or not all of it is
            return
        is_handed_off = Ownership.OWNER not in states
        interrupted, self._interrupted = self._interrupted, None
        if interrupted is None or interrupted[2] is not migration or is_handed_off or is_by_hand:
            migration.settle(is_handed_off=is_handed_off)
            return
        left, tls, _ = interrupted
        self._try_to_go_on(left, tls, may_be_there=False)  # nothing is there, in the epoch that the disks are in now
