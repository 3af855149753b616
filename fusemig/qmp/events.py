"""The vocabulary of events."""

from __future__ import annotations

from typing import Final

from msgspec import field

from fusemig.qmp.base import Result
from fusemig.qmp.status import UpgradeInfo
from fusemig.qmp.words import MigrationStatus, MirrorReach, ShutdownCause


class MigrationEvent(Result, frozen=True, kw_only=True):
    """Data of MIGRATION."""

    status: MigrationStatus


class MigrationPassEvent(Result, frozen=True, kw_only=True):
    """Data of MIGRATION_PASS."""

    pass_: int = field(name="pass")


class PacingEvent(Result, frozen=True, kw_only=True):
    """Data of X_FUSEMIG_PACING: what is done to guests from now on."""

    mirror: MirrorReach
    throttle_percentage: int


class ShutdownEvent(Result, frozen=True, kw_only=True):
    """Data of SHUTDOWN."""

    guest: bool = False
    reason: ShutdownCause = ShutdownCause.HOST_QMP_QUIT


EVENTS: Final[dict[str, type[Result] | None]] = {
    "MIGRATION": MigrationEvent,
    "MIGRATION_PASS": MigrationPassEvent,
    "STOP": None,
    "RESUME": None,
    "SHUTDOWN": ShutdownEvent,
    "X_FUSEMIG_PACING": PacingEvent,
    "X_FUSEMIG_UPGRADE": UpgradeInfo,
}
"""Every event and its data."""
MIGRATION_EVENTS: Final = frozenset({"MIGRATION", "MIGRATION_PASS", "X_FUSEMIG_PACING"})
"""The events that are sent only while the capability ``events`` is on."""
