"""Which disks a migration is of, and from where it goes on."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from fusemig.daemon.doubt import in_doubt
from fusemig.errors import InDoubtError, StateError
from fusemig.migration.resume import ResumePoint
from fusemig.migration.source import SourceMigration
from fusemig.records.epoch import DOUBTFUL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fusemig.daemon.served import ServedDisk
    from fusemig.migration.outgoing import OutgoingMigration


def choose_disks(disks: Mapping[str, ServedDisk], names: Sequence[str] | None) -> list[ServedDisk]:
    """Return the named ones of ``disks``, or every writable one.

    Raises:
        StateError: one of them cannot be migrated now.
        InDoubtError: it is not known of one whose it is.
    """
    if names is None:
        chosen = [served for served in disks.values() if served.is_writable and not served.is_read_only]
        if not chosen and any(served.is_waiting for served in disks.values()):
            raise StateError("Guest is waiting for an incoming migration: no disk here is writable yet")
        chosen = chosen or in_doubt(disks)  # to be told so below
        if not chosen:
            raise StateError("no disk here is writable: there is nothing to migrate")
    else:
        chosen = [disks[name] for name in dict.fromkeys(names)]
    for served in chosen:
        _check_may_move(served)
    return chosen


def _check_may_move(served: ServedDisk) -> None:
    if served.ownership in DOUBTFUL:
        raise InDoubtError(
            f"disk '{served.name}' is in doubt: it is not known whether its destination took it "
            f"({served.doubt or 'it was not asked yet'}); see `fusemig resolve --help`"
        )
    if served.busy:
        raise StateError(f"disk '{served.name}' is busy: {served.busy}")
    if served.loan is not None:
        raise StateError(
            f"disk '{served.name}' is not all here yet: it can be migrated when its own migration has completed"
        )
    if not served.is_writable:
        raise StateError(f"disk '{served.name}' is read-only here, so there is nothing to hand off")
    if served.io_error is not None:
        raise StateError(f"disk '{served.name}' has an I/O error and cannot be trusted: {served.io_error}")


def resume_point(last: OutgoingMigration | None, chosen: Sequence[ServedDisk]) -> ResumePoint:
    """Return where a migration of these disks was interrupted: as the ``last`` one knows, or the maps, or unknown."""
    point = last.resume_point() if isinstance(last, SourceMigration) else None
    if point is not None and [disk.disk for disk in point.disks] == [served.disk for served in chosen]:
        return point
    sessions = {served.interrupted_session for served in chosen}
    session = sessions.pop()
    if session is None or sessions:
        session = uuid.uuid4().hex  # one that no journal is of: contents are compared
    return ResumePoint(session)
