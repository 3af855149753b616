"""Announcer: tells QMP clients of migrations, in QEMU's order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fusemig.core.phase import QMP_STATUS, MigrationPhase
from fusemig.qmp import schema

if TYPE_CHECKING:
    from fusemig.control.server import EventHub
    from fusemig.core.mirror import Reach
    from fusemig.daemon.pause import Pause


_THAWED: Final = (MigrationPhase.FAILED, MigrationPhase.CANCELLED, MigrationPhase.DIRTY)
"""What follows a freeze that came to nothing; DIRTY where the destination was lost in it and is waited for."""


class Announcer:
    """The events of one daemon's migrations; their order and what is left out follow QEMU's migration/migration.c."""

    def __init__(self, events: EventHub, pause: Pause) -> None:
        """Nothing was announced yet.

        Args:
            events: takes the events to the clients.
            pause: while an operator's `stop` is on, migrations neither stop nor resume anything.
        """
        self._events = events
        self._pause = pause
        self._is_stopped_for_guests = False
        self._last_status = ""

    def begin(self) -> None:
        """Take note that another migration begins: its status is told also if it is the last one's."""
        self._last_status = ""

    def status(self, phase: MigrationPhase) -> None:
        """Tell the status of a phase, unless it was told last."""
        status = QMP_STATUS[phase]
        if status != self._last_status:
            self._last_status = status
            self._events.emit("MIGRATION", schema.MigrationEvent(status=schema.MigrationStatus(status)))

    def outgoing_phase(self, phase: MigrationPhase, *, is_pausing: bool) -> None:
        """Tell a phase of a source: STOP before the freeze is announced, RESUME after a failure is.

        The first pass is announced before `active`, and `device` only if the migration paused at `pre-switchover`
        (``is_pausing``).
        """
        if phase is MigrationPhase.BULK:
            self._events.emit("MIGRATION_PASS", schema.MigrationPassEvent(pass_=1))
        if phase is MigrationPhase.FROZEN and not self._pause.is_on:
            self._is_stopped_for_guests = True
            self._events.emit("STOP")
        if QMP_STATUS[phase] != "device" or is_pausing:
            self.status(phase)
        if phase in _THAWED and self._is_stopped_for_guests:
            self._is_stopped_for_guests = False
            if not self._pause.is_on:
                self._events.emit("RESUME")

    def incoming_phase(self, phase: MigrationPhase) -> None:
        """Tell a phase of a destination: whoever hears `completed` finds the disks writable."""
        was_taken = self._last_status == QMP_STATUS[MigrationPhase.POSTCOPY]
        is_taken = phase in (MigrationPhase.POSTCOPY, MigrationPhase.COMPLETED)
        if is_taken and not was_taken and not self._pause.is_on:
            self._events.emit("RESUME")
        if QMP_STATUS[phase] != "device":
            self.status(phase)

    def pass_begins(self, number: int) -> None:
        """Tell the beginning of a pass after the first, which goes with its phase."""
        if number > 1:
            self._events.emit("MIGRATION_PASS", schema.MigrationPassEvent(pass_=number))

    def paced(self, reach: Reach, throttle_percent: int) -> None:
        """Tell what a migration does to its guests from now on."""
        event = schema.PacingEvent(mirror=schema.MirrorReach(reach.value), throttle_percentage=throttle_percent)
        self._events.emit("X_FUSEMIG_PACING", event)

    def writable_again(self) -> None:
        """Tell that disks are writable of which it was not known who owns them."""
        self._is_stopped_for_guests = False
        self._events.emit("RESUME")
