"""The history of a daemon's last migrations, as plain data for reports and charts.

Nothing of it is durable: a successor begins anew, with the migration that it goes on with. Rules:

1. At most `MAX_MIGRATIONS` are kept, and of each at most so many steps and samples as the limits below say: of too
   many samples every second one goes, and from then on they are taken half as often; of too many steps those in the
   middle go.
2. It only looks: at each change that it is told of, and once a second while a migration runs.
3. Times come in as ``now``, in seconds of trio's clock.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final

from msgspec import UNSET, UnsetType

from fusemig.phase import OVER
from fusemig.qmp.schema import MigrationRecord
from fusemig.qmp.seeing import PassStep, PhaseStep, Sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.migration.incoming import IncomingMigration
    from fusemig.migration.outgoing import OutgoingMigration
    from fusemig.qmp.schema import MigrationInfo
    from fusemig.qmp.seeing import RecordParameters

    Migration = OutgoingMigration | IncomingMigration

MAX_MIGRATIONS: Final = 16
MAX_SAMPLES: Final = 256
MAX_PASSES: Final = 128
MAX_PHASES: Final = 64
SAMPLE_S: Final = 1.0


class History:
    """The records; for one task at a time, as all of the daemon's state."""

    def __init__(self) -> None:
        """Nothing has migrated."""
        self._records: deque[_Record] = deque(maxlen=MAX_MIGRATIONS)

    def begin(
        self,
        migration: Migration,
        peer: str,
        look: Callable[[], MigrationInfo],
        asked: Callable[[], RecordParameters] | None = None,
    ) -> None:
        """Keep a record of a migration that begins.

        Args:
            migration: itself.
            peer: the other side.
            look: tells how it stands.
            asked: tells what it is asked for now; of a source.
        """
        if asked is not None:
            for record in self._records:  # there is one outgoing migration at a time
                if record.is_outgoing:
                    record.let_go()
        self._records.append(_Record(migration, peer, look, asked))

    def note(self, migration: Migration, now: float) -> None:
        """Take note of what may have changed: its phase, its pass."""
        for record in self._records:
            if record.migration is migration:
                record.note(now)

    def tick(self, now: float) -> None:
        """Take a sample of what runs."""
        for record in self._records:
            if record.is_running:
                record.note(now)

    def end(self, migration: Migration) -> None:
        """Let go of a migration of which nothing will change any more."""
        for record in self._records:
            if record.migration is migration:
                record.let_go()

    def records(self, now: float) -> list[MigrationRecord]:
        """Return all records, the newest last."""
        self.tick(now)
        return [record.told() for record in self._records if record.phases]


class _Record:
    """One migration."""

    def __init__(
        self,
        migration: Migration,
        peer: str,
        look: Callable[[], MigrationInfo],
        asked: Callable[[], RecordParameters] | None,
    ) -> None:
        self.migration: Migration | None = migration
        self.is_outgoing = asked is not None
        self.phases: list[PhaseStep] = []
        self._peer = peer
        self._look: Callable[[], MigrationInfo] | None = look
        self._asked = asked
        self._info: MigrationInfo | None = None
        self._parameters: RecordParameters | UnsetType = UNSET
        self._passes: list[PassStep] = []
        self._samples: list[Sample] = []
        self._sample_s = SAMPLE_S
        self._began_at = 0.0  # trio's clock
        self._began_ms = 0

    @property
    def is_running(self) -> bool:
        return self.migration is not None and bool(self.phases) and self.migration.phase not in OVER

    def let_go(self) -> None:
        self.migration = self._look = self._asked = None

    def note(self, now: float) -> None:
        assert self.migration is not None
        assert self._look is not None
        phase = self.migration.phase.value
        if phase == "none":
            return
        self._info = info = self._look()
        if self._asked is not None:
            self._parameters = self._asked()
        if not self.phases:
            before_s = 0.0 if isinstance(info.total_time, UnsetType) else info.total_time / 1000
            self._began_at = now - before_s  # of a predecessor's migration, that began before this record
            self._began_ms = round((time.time() - before_s) * 1000)
        at_ms = (now - self._began_at) * 1000
        is_new_phase = not self.phases or self.phases[-1].phase != phase
        if is_new_phase:
            self.phases.append(PhaseStep(phase=phase, at_ms=at_ms))
            _thin_out(self.phases, MAX_PHASES)
        own, disk = info.x_fusemig, info.disk
        assert not isinstance(own, UnsetType)
        assert not isinstance(disk, UnsetType)
        if own.pass_ and (not self._passes or self._passes[-1].pass_ != own.pass_):
            step = PassStep(pass_=own.pass_, at_ms=at_ms, remaining=disk.remaining, wire_bytes=own.wire_bytes)
            self._passes.append(step)
            _thin_out(self._passes, MAX_PASSES)
        if phase == "setup":
            return  # what is to be sent is not known yet
        if is_new_phase or not self._samples or at_ms - self._samples[-1].at_ms >= self._sample_s * 1000:
            self._samples.append(
                Sample(
                    at_ms=at_ms,
                    remaining=disk.remaining,
                    wire_bytes=own.wire_bytes,
                    bandwidth=own.bandwidth,
                    dirty_rate=own.dirty_rate,
                )
            )
            if len(self._samples) > MAX_SAMPLES:
                del self._samples[1:-1:2]
                self._sample_s *= 2

    def told(self) -> MigrationRecord:
        assert self._info is not None
        return MigrationRecord(
            began=self._began_ms,
            peer=self._peer,
            parameters=self._parameters,
            phases=list(self.phases),
            passes=list(self._passes),
            samples=list(self._samples),
            info=self._info,
        )


def _thin_out(steps: list[PhaseStep] | list[PassStep], limit: int) -> None:
    """Drop one in the middle of too many: how it began and how it ended tells most."""
    if len(steps) > limit:
        del steps[limit // 2]
