"""Migrations that a former daemon ran, beside those of this one: whose end is whose, and what is shown of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from fusemig.control.server import EventHub
from fusemig.core.phase import MigrationPhase
from fusemig.daemon.announcer import Announcer
from fusemig.daemon.continuation import Continuation
from fusemig.daemon.dialer import Dialer
from fusemig.daemon.disk_spec import DiskSpec
from fusemig.daemon.migrator import Migrator
from fusemig.daemon.pause import Pause
from fusemig.daemon.security import Security
from fusemig.daemon.served import ServedDisk
from fusemig.errors import AuthenticationError, ConfigError, InDoubtError
from fusemig.fuse.export import Exports
from fusemig.handover.state import Outgoing, Request
from fusemig.migration.link import BufferPool, NativeLink
from fusemig.migration.source import SourceMigration
from fusemig.records.epoch import EpochFile, EpochRecord, Ownership
from fusemig.wire import native
from support.pair import nothing
from support.streams import memory_connection

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fusemig.migration.outgoing import OutgoingMigration
    from fusemig.net.transport import ByteStream

URI = "tcp:127.0.0.1:9"
FORMER = "f0" * 16
OTHER = "07" * 16


class WholeDialer(Dialer):
    """Leads to destinations that have everything of the migrations in `whole`, and to none of others."""

    def __init__(self, security: Security) -> None:
        super().__init__(security)
        self.whole: dict[str, trio.Event] = {}
        self.nursery: trio.Nursery | None = None

    async def dial(self, record: EpochRecord) -> ByteStream:
        if record.session not in self.whole:
            await trio.sleep_forever()
        await self.whole[record.session].wait()
        ours, theirs = memory_connection()
        assert self.nursery is not None
        self.nursery.start_soon(self._say_whole, NativeLink(theirs, decoder(), BufferPool()))
        return ours

    async def _say_whole(self, link: NativeLink) -> None:
        assert isinstance(await link.receive(), native.Lend)
        await link.send_message(native.Whole())


def decoder() -> native.Decoder:
    return native.Decoder(native.FROM_SOURCE, preface=True)


class LendingHere(SourceMigration):
    """One that has handed over at once, and lends until it is told that the destination has everything."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.is_whole = trio.Event()

    async def _migrate(self) -> None:
        for phase in (MigrationPhase.BULK, MigrationPhase.FROZEN, MigrationPhase.COMMITTED, MigrationPhase.POSTCOPY):
            self._enter(phase)
        await self.is_whole.wait()


class Source:
    """The part of a daemon that migrates its disks ``a`` and ``b``, with what epoch files say of them."""

    def __init__(self, directory: Path, **states: tuple[Ownership, str]) -> None:
        self.disks: dict[str, ServedDisk] = {}
        exports = Exports()
        for name in ("a", "b"):
            path = directory / f"{name}.img"
            path.write_bytes(bytes(1 << 16))
            if name in states:
                self.write(EpochFile(directory / f"{name}.img.fusemig"), *states[name])
            self.disks[name] = ServedDisk(DiskSpec(name, path), exports, None, is_incoming=False)
        self.security = Security(None, (), is_destination=False)
        self.dialer = WholeDialer(self.security)
        pause = Pause(self.disks.values(), lambda _served: nothing())
        self.migrator = Migrator(
            self.disks,
            pause,
            self.security,
            self.dialer,
            Announcer(EventHub(lambda: False), pause),
            lambda: 0,
            lambda _migration: None,
            lambda: None,
            lambda: None,
            is_destination=False,
        )

    @staticmethod
    def write(file: EpochFile, state: Ownership, session: str) -> None:
        is_loan = state is Ownership.LENDING
        file.write(
            EpochRecord(state=state, image_id=file.path.name, epoch=0, session=session, peer=URI, is_loan=is_loan)
        )

    def set(self, name: str, state: Ownership, session: str) -> None:
        """Have an epoch file say something else."""
        self.write(self.disks[name].epoch_file, state, session)

    def close(self) -> None:
        for served in self.disks.values():
            served.close()


@pytest.fixture
def make_source(tmp_path: Path) -> Iterator[Any]:
    """Return what makes the source, once."""
    made: list[Source] = []

    def make(**states: tuple[Ownership, str]) -> Source:
        made.append(Source(tmp_path, **states))
        return made[0]

    yield make
    for source in made:
        source.close()


def phase_of(migration: OutgoingMigration) -> MigrationPhase:
    """Return where it is now (a call, so that no type checker takes it for settled)."""
    return migration.phase


async def until_released(served: ServedDisk) -> None:
    """Wait until a lender of this disk has ended, and a little longer."""
    while served.ownership is not Ownership.RELEASED or served.busy:
        await trio.sleep(0.01)
    await trio.testing.wait_all_tasks_blocked()


async def test_a_lender_of_another_migration_does_not_end_the_one_that_runs(make_source: Any) -> None:
    """It would be taken for completed with its rest not fetched, and completing again would end the daemon."""
    source = make_source(a=(Ownership.LENDING, FORMER))
    migrator, dialer = source.migrator, source.dialer
    dialer.whole[FORMER] = trio.Event()
    async with trio.open_nursery() as nursery:
        dialer.nursery = nursery
        await nursery.start(migrator.run)
        errand = migrator.make(LendingHere, Request(uri=URI, disks=("b",)), [source.disks["b"]])
        migration = errand.migration
        migrator.start(errand, [source.disks["b"]])
        while phase_of(migration) is not MigrationPhase.POSTCOPY:
            await trio.sleep(0.01)
        dialer.whole[FORMER].set()
        await until_released(source.disks["a"])
        assert phase_of(migration) is MigrationPhase.POSTCOPY
        migration.is_whole.set()
        await migration.wait_over()
        assert phase_of(migration) is MigrationPhase.COMPLETED
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("session", [FORMER, OTHER], ids=["its own", "another's"])
async def test_a_stand_in_ends_with_its_own_lender(make_source: Any, session: str) -> None:
    """And with no other one's."""
    source = make_source(a=(Ownership.LENDING, FORMER), b=(Ownership.LENDING, OTHER))
    migrator, dialer = source.migrator, source.dialer
    dialer.whole[FORMER] = trio.Event()
    async with trio.open_nursery() as nursery:
        dialer.nursery = nursery
        await nursery.start(migrator.run)
        name = "a" if session == FORMER else "b"
        migration = migrator.make(SourceMigration, Request(uri=URI, disks=(name,)), [source.disks[name]]).migration
        migration.session = session
        migration.stand_for(MigrationPhase.POSTCOPY, None)
        dialer.whole[FORMER].set()
        await until_released(source.disks["a"])
        is_own = session == FORMER
        assert migration.phase is (MigrationPhase.COMPLETED if is_own else MigrationPhase.POSTCOPY)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("is_ours_first", [False, True])
@pytest.mark.parametrize("is_handed_off", [False, True])
async def test_a_doubt_is_settled_by_its_own_disks(make_source: Any, is_ours_first: bool, is_handed_off: bool) -> None:
    """Whatever becomes of a disk that is in doubt since an earlier migration, and whenever."""
    source = make_source(a=(Ownership.HANDED_OFF, OTHER), b=(Ownership.HANDED_OFF, FORMER))
    continuation = Continuation(source.migrator, source.disks, source.security, source.dialer)
    async with trio.open_nursery() as nursery:
        await nursery.start(source.migrator.run)
        request = Request(uri=URI, disks=("b",))
        migration = source.migrator.make(SourceMigration, request, [source.disks["b"]]).migration
        migration.session = FORMER
        migration.stand_for(MigrationPhase.IN_DOUBT, InDoubtError("no TAKEN came"))

        def settle(name: str, state: Ownership, session: str) -> None:
            source.set(name, state, session)
            continuation.settled([source.disks[name]], is_by_hand=True)

        # The other disk has the other end: neither is taken for this one's.
        of_another = Ownership.OWNER if is_handed_off else Ownership.RELEASED
        if not is_ours_first:
            settle("a", of_another, OTHER)
            assert phase_of(migration) is MigrationPhase.IN_DOUBT
        settle("b", Ownership.RELEASED if is_handed_off else Ownership.OWNER, FORMER)
        assert phase_of(migration) is (MigrationPhase.COMPLETED if is_handed_off else MigrationPhase.FAILED)
        settle("a", of_another, OTHER)
        nursery.cancel_scope.cancel()


async def test_a_doubt_lasts_as_long_as_one_of_its_disks_is_in_doubt(make_source: Any) -> None:
    """All of them were handed off together."""
    source = make_source(a=(Ownership.HANDED_OFF, FORMER), b=(Ownership.HANDED_OFF, FORMER))
    continuation = Continuation(source.migrator, source.disks, source.security, source.dialer)
    async with trio.open_nursery() as nursery:
        await nursery.start(source.migrator.run)
        request = Request(uri=URI, disks=("a", "b"))
        migration = source.migrator.make(SourceMigration, request, list(source.disks.values())).migration
        migration.session = FORMER
        migration.stand_for(MigrationPhase.IN_DOUBT, InDoubtError("no TAKEN came"))
        for name, phase in (("a", MigrationPhase.IN_DOUBT), ("b", MigrationPhase.COMPLETED)):
            source.set(name, Ownership.RELEASED, FORMER)
            continuation.settled([source.disks[name]], is_by_hand=False)
            assert phase_of(migration) is phase
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize(
    ("state", "phase"),
    [
        (Ownership.HANDED_OFF, MigrationPhase.IN_DOUBT),
        (Ownership.LENDING, MigrationPhase.POSTCOPY),
        (Ownership.RELEASED, MigrationPhase.COMPLETED),
        (Ownership.OWNER, MigrationPhase.FAILED),
    ],
    ids=lambda word: word.value,
)
async def test_only_going_on_needs_credentials(
    make_source: Any, state: Ownership, phase: MigrationPhase, is_loaded: bool
) -> None:
    """A disk that is in doubt, lent or gone is no failed migration, whether or not the file is missing, or all are."""
    source = make_source(a=(state, FORMER))
    why = AuthenticationError("there is no client-cert.pem")
    uri = "tcp:192.0.2.1:9" if is_loaded else URI  # without credentials, a network that plain text may not cross
    left = Outgoing(request=Request(uri=uri, disks=("a",), tls_directory="/gone"), session=FORMER, began_s=0.0)
    continuation = Continuation(source.migrator, source.disks, source.security, source.dialer)
    async with trio.open_nursery() as nursery:
        await nursery.start(source.migrator.run)
        continuation.take_up(left, None if is_loaded else why)
        migration = source.migrator.migration
        assert migration is not None
        assert migration.phase is phase
        if phase is MigrationPhase.FAILED:
            assert isinstance(migration.error, ConfigError if is_loaded else AuthenticationError)
        nursery.cancel_scope.cancel()


async def test_what_was_in_doubt_cannot_begin_again_without_credentials(make_source: Any) -> None:
    """The disks are ours again, and it failed for that reason."""
    source = make_source(a=(Ownership.HANDED_OFF, FORMER))
    why = AuthenticationError("there is no client-cert.pem")
    left = Outgoing(request=Request(uri=URI, disks=("a",), tls_directory="/gone"), session=FORMER, began_s=0.0)
    continuation = Continuation(source.migrator, source.disks, source.security, source.dialer)
    async with trio.open_nursery() as nursery:
        await nursery.start(source.migrator.run)
        continuation.take_up(left, why)
        source.set("a", Ownership.OWNER, FORMER)
        continuation.settled([source.disks["a"]], is_by_hand=False)
        migration = source.migrator.migration
        assert migration is not None
        assert (migration.phase, migration.error) == (MigrationPhase.FAILED, why)
        nursery.cancel_scope.cancel()
