"""Asking who owns the disks, over memory: every testimony, what is refused, and what fails half-way."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio

from fusemig.core.handoff import Evidence
from fusemig.core.phase import MigrationPhase
from fusemig.disk.tracked import Gate
from fusemig.errors import FusemigError, InDoubtError, PeerRefusedError, StateError
from fusemig.migration.destination import DestinationMigration
from fusemig.migration.link import BufferPool, NativeLink
from fusemig.migration.settlement import DoubtfulDisk, Settlement, is_askable
from fusemig.records.epoch import EpochFile, EpochRecord, Ownership, Side, evidence_of, resolved
from fusemig.wire import native
from support.pair import Pair, inline
from support.streams import memory_connection
from support.world import FaultyEpochFile, run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.world import World

O, E = Ownership, Evidence  # noqa: E741
SIZES = {"a": 4096, "b": 8192}


def record(state: Ownership, epoch: int = 0, **changes: object) -> EpochRecord:
    """Return a record of the migration that is asked about."""
    fields = {"image_id": "d15c", "session": "5e55", "peer": "tcp:there:1", "wire": "native", "group": 2}
    return EpochRecord(state=state, epoch=epoch, **{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("there", "evidence"),
    [
        (None, E.UNKNOWN),
        (record(O.OWNER, 5), E.OWNED),
        (record(O.PREPARED, 5), E.PREPARED),
        (record(O.INCOMING, 5), E.INCOMING),
        # It has moved on, over another migration:
        (record(O.HANDED_OFF, 5, session="later"), E.OWNED),
        (record(O.RELEASED, 5, session="later"), E.OWNED),
        (record(O.INCOMING, 7, session="later"), E.OWNED),
        (record(O.PREPARED, 7, session="later"), E.OWNED),
        # It is about something else:
        (record(O.INCOMING, 5, session="other"), E.UNKNOWN),
        (record(O.PREPARED, 5, session="other"), E.UNKNOWN),
        (record(O.OWNER, 5, image_id="other"), E.UNKNOWN),
        (record(O.INCOMING, 5, image_id="other"), E.UNKNOWN),
        (record(O.OWNER, 4), E.UNKNOWN),
        (record(O.RELEASED, 3, session="earlier"), E.UNKNOWN),
    ],
)
def test_what_a_record_proves(there: EpochRecord | None, evidence: Evidence) -> None:
    """Asked about epoch 4: its own record speaks against a take-over, that or a later epoch for one; nothing else."""
    assert evidence_of(there, session="5e55", image_id="d15c", epoch=4) is evidence


@pytest.mark.parametrize("owner", Side)
@pytest.mark.parametrize("state", [None, *Ownership])
def test_what_a_person_may_say(state: Ownership | None, owner: Side) -> None:
    """The table of `docs/architecture.md`, and nothing else."""
    expected = {
        (O.PLEDGED, Side.SOURCE): (O.OWNER, 6),
        (O.PLEDGED, Side.DESTINATION): (O.RELEASED, 4),
        (O.HANDED_OFF, Side.SOURCE): (O.OWNER, 6),
        (O.RELEASED, Side.SOURCE): (O.OWNER, 6),
        (O.LENDING, Side.SOURCE): (O.OWNER, 6),
        (O.LENDING, Side.DESTINATION): (O.RELEASED, 4),
        (O.HANDED_OFF, Side.DESTINATION): (O.RELEASED, 4),
        (O.PREPARED, Side.SOURCE): (O.INCOMING, 4),
        (O.PREPARED, Side.DESTINATION): (O.OWNER, 4),
    }
    before = None if state is None else record(state, 4, is_loan=state in (O.LENDING, O.BORROWING))
    if state is not None and (state, owner) in expected:
        after = resolved(before, owner)
        assert (after.state, after.epoch) == expected[state, owner]
        assert (after.image_id, after.session) == ("d15c", "5e55")
        assert not after.is_loan
    else:
        with pytest.raises(StateError, match=r"^there is nothing to resolve: "):
            resolved(before, owner)


def test_who_can_be_asked(tmp_path: Path) -> None:
    """A fusemig that was named; nobody over QEMU's wire, and about nothing that is not in doubt."""
    file = EpochFile(tmp_path / "x.fusemig")
    assert not is_askable(file)
    for one, expected in (
        (record(O.HANDED_OFF), True),
        (record(O.HANDED_OFF, wire="qemu"), False),
        (record(O.HANDED_OFF, wire=""), False),
        (record(O.HANDED_OFF, peer=""), False),
        (record(O.RELEASED), False),
    ):
        file.write(one)
        assert is_askable(file) is expected


class Doubt:
    """A pair whose source is handed off, and whose destination says what a test wants."""

    def __init__(self, directory: Path) -> None:
        self.pair = Pair(directory, SIZES)
        self.here, self.there = self.pair.source, self.pair.destination
        for name in SIZES:
            self.here.disks[name].set_gate(Gate.READ_ONLY)
            self.here.epochs[name].write(record(O.HANDED_OFF, image_id=name))
        self.incoming: DestinationMigration | None = None
        self.phases: list[MigrationPhase] = []

    def say(self, **states: Ownership) -> None:
        for name, state in states.items():
            self.there.epochs[name].write(record(state, 1, image_id=name))

    async def ask(self, *names: str, is_whole: bool = True) -> None:
        """Ask; raises what the source is told."""
        doubtful = [DoubtfulDisk(name, self.here.epochs[name]) for name in names or SIZES]
        settlement = Settlement(doubtful, inline, is_whole=is_whole)
        here, there = memory_connection()
        self.incoming = DestinationMigration(there, self.there, inline, self.phases.append)

        async def answer() -> None:
            assert self.incoming is not None
            await self.incoming.run()
            there.close()

        error: FusemigError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            try:
                await settlement.run(here)
            except FusemigError as exc:
                error = exc
            here.close()
        if error is not None:
            raise error

    def states(self) -> tuple[list[Ownership], list[Ownership]]:
        """Return what is durable, here and there."""
        found = []
        for side in (self.here, self.there):
            records = [EpochFile(file.path).record for file in side.epochs.values()]
            found.append([one.state for one in records if one is not None])
        return found[0], found[1]


@pytest.fixture
def doubt(tmp_path: Path) -> Doubt:
    return Doubt(tmp_path)


async def test_owned(doubt: Doubt, autojump_clock: trio.testing.MockClock) -> None:
    """Nothing is done there."""
    doubt.say(a=O.OWNER, b=O.OWNER)
    await doubt.ask()
    assert doubt.states() == ([O.RELEASED] * 2, [O.OWNER] * 2)
    assert doubt.phases == []
    assert doubt.incoming is not None
    assert doubt.incoming.is_question


async def test_prepared(doubt: Doubt, autojump_clock: trio.testing.MockClock) -> None:
    """Taken over, gates open, and told to whoever listens."""
    doubt.say(a=O.PREPARED, b=O.PREPARED)
    await doubt.ask()
    assert doubt.states() == ([O.RELEASED] * 2, [O.OWNER] * 2)
    assert doubt.pair.gates() == ({Gate.READ_ONLY}, {Gate.OPEN})
    assert doubt.phases == [MigrationPhase.COMPLETED]


async def test_a_part_of_the_group(doubt: Doubt, autojump_clock: trio.testing.MockClock) -> None:
    """COMMIT was never sent: called off, durably there first, then taken back in an epoch that nobody else has used."""
    doubt.here.epochs["b"].write(record(O.OWNER, image_id="b"))
    doubt.say(a=O.PREPARED, b=O.PREPARED)
    await doubt.ask("a", is_whole=False)
    assert doubt.states() == ([O.OWNER, O.OWNER], [O.INCOMING, O.PREPARED])
    taken_back = doubt.here.epochs["a"].record
    assert taken_back is not None
    assert taken_back.epoch == 2
    assert doubt.pair.gates()[1] == {Gate.READ_ONLY}


async def test_a_part_of_a_group_that_was_taken(doubt: Doubt, autojump_clock: trio.testing.MockClock) -> None:
    """Also where the source asks about the other disk alone, the group is not split."""
    doubt.say(a=O.OWNER, b=O.PREPARED)
    await doubt.ask("b", is_whole=False)
    assert doubt.states() == ([O.HANDED_OFF, O.RELEASED], [O.OWNER] * 2)


async def test_unknown(doubt: Doubt, autojump_clock: trio.testing.MockClock) -> None:
    """No file there proves nothing: still in doubt, and a half of the group is not moved either."""
    doubt.say(a=O.PREPARED)
    with pytest.raises(InDoubtError, match=r"does not settle 'a' \(prepared\), 'b' \(unknown\)"):
        await doubt.ask()
    assert doubt.states() == ([O.HANDED_OFF] * 2, [O.PREPARED])


async def test_busy(doubt: Doubt, autojump_clock: trio.testing.MockClock) -> None:
    """While an earlier connection may still bring a COMMIT there is no answer."""
    doubt.say(a=O.PREPARED, b=O.PREPARED)
    doubt.there.busy = True
    with pytest.raises(PeerRefusedError, match="does not answer: it is being received"):
        await doubt.ask()
    assert doubt.states() == ([O.HANDED_OFF] * 2, [O.PREPARED] * 2)


async def test_a_take_over_that_fails_half_way(doubt: Doubt, autojump_clock: trio.testing.MockClock) -> None:
    """One file was written, one not: nothing is open yet; the next question ends it, for both."""
    doubt.say(a=O.PREPARED, b=O.PREPARED)
    faulty = FaultyEpochFile(doubt.there.epochs["b"].path)
    faulty.fails = lambda number: number == 1
    doubt.there.epochs["b"] = faulty
    with pytest.raises(FusemigError):
        await doubt.ask()
    assert doubt.states() == ([O.HANDED_OFF] * 2, [O.OWNER, O.PREPARED])
    assert doubt.pair.gates() == ({Gate.READ_ONLY}, {Gate.READ_ONLY})
    await doubt.ask()
    assert doubt.states() == ([O.RELEASED] * 2, [O.OWNER] * 2)
    assert doubt.pair.gates() == ({Gate.READ_ONLY}, {Gate.OPEN})


# What a destination does not take from a source

WRONG: dict[str, tuple[dict[str, Ownership], native.Message, str]] = {
    "a COMMIT to what is not prepared": ({"a": O.INCOMING, "b": O.INCOMING}, native.Commit(), "out of order"),
    "an ABORT of what was taken": ({"a": O.OWNER, "b": O.PREPARED}, native.Abort("no"), "was taken over already"),
    "FINAL": ({"a": O.PREPARED, "b": O.PREPARED}, native.FinalProofs([]), "sent FinalProofs after ANSWER"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_what_is_out_of_order(doubt: Doubt, autojump_clock: trio.testing.MockClock, case: str) -> None:
    """It changes nothing and ends the connection."""
    states, message, text = WRONG[case]
    doubt.say(**states)
    asked = [native.AskedDisk(name, 0) for name in SIZES]
    error = await converse(doubt, native.Ask(native.VERSION, "5e55", asked), message)
    assert text in str(error)
    assert doubt.states()[1] == list(states.values())
    assert doubt.pair.gates()[1] == {Gate.READ_ONLY}
    assert not doubt.there.busy


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (native.Ask(native.VERSION + 1, "5e55", [native.AskedDisk("a", 0)]), "wire version 2 offered"),
        (native.Ask(native.VERSION, "", [native.AskedDisk("a", 0)]), "names no migration"),
        (native.Ask(native.VERSION, "5e55", []), "or no disk"),
    ],
)
async def test_what_is_no_question(
    doubt: Doubt, autojump_clock: trio.testing.MockClock, ask: native.Ask, text: str
) -> None:
    """Refused, in words."""
    doubt.say(a=O.PREPARED, b=O.PREPARED)
    assert text in str(await converse(doubt, ask, None))
    assert not doubt.there.busy


async def test_a_stranger_learns_and_changes_nothing(doubt: Doubt, autojump_clock: trio.testing.MockClock) -> None:
    """Whoever does not know the migration hears that the disks are unknown, and cannot have them taken."""
    doubt.say(a=O.PREPARED, b=O.PREPARED)
    guess = native.Ask(native.VERSION, "guessed", [native.AskedDisk("c", 0)])
    assert "out of order" in str(await converse(doubt, guess, native.Commit()))
    assert doubt.states()[1] == [O.PREPARED] * 2


async def converse(doubt: Doubt, ask: native.Ask, then: native.Message | None) -> FusemigError | None:
    """Be a source that says these two things; return how the destination saw it end."""
    here, there = memory_connection()
    incoming = DestinationMigration(there, doubt.there, inline)
    link = NativeLink(here, native.Decoder(native.FROM_DESTINATION, preface=False), BufferPool())

    async def speak() -> None:
        await link.send([native.PREFACE, native.encode_message(ask)])
        await link.receive()
        if then is not None:
            await link.send_message(then)
            await link.linger(60)
        here.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(speak)
        await incoming.run()
        there.close()
    return incoming.error


# A source that cannot write down that it goes on


def uncertain(prepare: Callable[[World], object]) -> Callable[[World], object]:
    """Return a run in which no epoch file of disk ``b`` can be written once it says, perhaps, `handed-off`."""

    async def main(world: World) -> None:
        prepare(world)
        file = world.source.faulty_epochs["b"]

        def fails(number: int) -> bool:
            file.is_stored = number == 2  # `handed-off`, but not the `owner` that was to undo it
            return number >= 2

        file.fails = fails
        await world.migrate()

    return main


COMMIT, ABORT = bytes([native.FrameType.COMMIT]), bytes([native.FrameType.ABORT])


def lose_abort(world: World) -> None:
    """Have the connection end where the source says ABORT."""
    world.streams[0].on_send = lambda data: None if data[2:3] == ABORT else data


def test_the_source_goes_on_once_the_destination_has_forgotten(tmp_path: Path) -> None:
    """The file says `handed-off` and guests write on: the prepared image is not the disk any more, and is none."""
    world = run(uncertain(lambda _world: None), tmp_path / "world")
    assert world.outgoing.phase is MigrationPhase.FAILED
    assert {world.source.durable_state("b"), world.destination.durable_state("b")} == {O.HANDED_OFF, O.INCOMING}
    assert {disk.gate for disk in world.source.disks.values()} == {Gate.OPEN}


def test_the_source_blocks_unless_the_destination_has_forgotten(tmp_path: Path) -> None:
    """The twin: the destination cannot be told, stays prepared, and no guest writes at the source."""
    world = run(uncertain(lose_abort), tmp_path / "world")
    assert world.outgoing.phase is MigrationPhase.IN_DOUBT
    assert "it may say all the same that the disks were handed off" in str(world.outgoing.error)
    assert {world.source.durable_state("b"), world.destination.durable_state("b")} == {O.HANDED_OFF, O.PREPARED}
    assert {disk.gate for disk in world.source.disks.values()} == {Gate.READ_ONLY}
    assert {file.record.state for file in world.source.epochs.values() if file.record} == {O.HANDED_OFF}
    assert not any(file.is_certain for file in world.source.epochs.values())


def test_a_source_that_blocked_makes_sure_before_it_says_commit(tmp_path: Path) -> None:
    """It asks, and COMMIT waits until what it goes by is durable, for each disk."""
    seen: list[list[Ownership | None]] = []

    async def main(world: World) -> None:
        def look(data: bytes) -> bytes:
            if data[2:3] == COMMIT:
                seen.append(states(world))
            return data

        await uncertain(lose_abort)(world)  # type: ignore[misc]
        assert world.source.durable_state("a") is O.OWNER
        for is_mended in (False, True):
            if is_mended:
                world.source.mend()
            here, there = memory_connection()
            here.on_send = look
            disks = [DoubtfulDisk(name, file) for name, file in world.source.epochs.items()]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(DestinationMigration(there, world.destination, inline).run)
                with suppress(StateError):
                    await Settlement(disks, inline, is_whole=True).run(here)
                here.close()
            assert bool(seen) is is_mended
        assert states(world) == [O.RELEASED, O.RELEASED]
        assert world.destination.durable_state("b") is O.OWNER

    run(main, tmp_path / "world")
    assert seen == [[O.HANDED_OFF, O.HANDED_OFF]]


def states(world: World) -> list[Ownership | None]:
    """Return what is durable at the source."""
    return [world.source.durable_state(name) for name in world.source.disks]
