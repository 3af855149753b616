"""How each fault of the matrix is made to strike in the simulation.

A strike is called when the migration has got to its moment. It hits at once and says so, or it arms something that says
so when it hits; a migration that has moved on meanwhile is judged by the moment of the hit. A fault that lasts
(`SimWorld.is_lasting`) strikes again at every new connection, or stays in the store or the link that it is a fault of.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import trio

from fusemig.core.phase import MigrationPhase
from fusemig.disk.fault import Fault as DiskFault
from fusemig.disk.fault import Operation
from fusemig.errors import StateError
from support.matrix import Fault, Moment
from support.simhost import SimHost
from support.simulation import SIZES, refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.simhost import SimStream
    from support.simulation import SimWorld

    Strike = Callable[[SimWorld], None]

N_MANGLED = 200
"""How many frames one after the other are damaged where that lasts."""
_WRITES = frozenset({Operation.WRITE, Operation.ZERO})


def _kill(which: str, *, is_power_loss: bool) -> Strike:
    def strike(world: SimWorld) -> None:
        host: SimHost = getattr(world, which)
        if world.seed % 2:
            world.note_strike()
            host.die(is_power_loss=is_power_loss)
            return
        # At one of its next calls that can be seen from outside, in the middle of it.
        host.fate.is_power_loss = is_power_loss
        host.fate.left = world.rng.randrange(4)
        host.on_death = world.note_strike

    return _again_and_again(strike)


def _again_and_again(strike: Strike) -> Strike:
    """Return a strike that comes again with each new connection if the fault lasts."""

    def first(world: SimWorld) -> None:
        if world.is_lasting:
            world.on_connection = lambda: strike(world)
        strike(world)

    return first


def _reset(world: SimWorld) -> None:
    world.note_strike()
    world.streams[0].close()
    if world.rng.random() < 0.5:  # what was under way is lost with it
        for stream in world.streams:
            stream._incoming.data.clear()


def _on_link(fault: Callable[[SimStream], None]) -> Strike:
    """Return a strike at both ends of the connection, and of every later one if it lasts."""

    def strike(world: SimWorld) -> None:
        world.note_strike()
        for stream in world.streams:
            fault(stream)
        if world.is_lasting:
            world.link_faults = fault

    return strike


def _silence(stream: SimStream) -> None:
    stream.is_silent = True


def _disk(which: str, operations: frozenset[Operation], code: int) -> Strike:
    def strike(world: SimWorld) -> None:
        if world.is_prompt and world.moment is Moment.FROZEN:
            world.guest_writes_now()  # so that there is something left to be sent
        host: SimHost = getattr(world, which)
        torn = world.rng.choice([0, 100, 5000])

        def note(_operation: Operation, _offset: int, _length: int) -> bool:
            world.note_strike()
            return True

        for layer in host.layers.values():
            times = None if world.is_lasting else 1
            layer.add(DiskFault(operations, times=times, errno=code, torn_bytes=torn, when=note))

    return strike


def _source_sync(world: SimWorld) -> None:
    _disk("source", frozenset({Operation.FLUSH}), errno.EIO)(world)
    if world.is_prompt or world.rng.random() < 0.5:
        assert not world.guest_syncs(world.source, "a")


def _destination_eio(world: SimWorld) -> None:
    operations = world.rng.choice([_WRITES, frozenset({Operation.FLUSH}), _WRITES | {Operation.FLUSH}])
    _disk("destination", operations, errno.EIO)(world)


def _destination_full(world: SimWorld) -> None:
    _disk("destination", _WRITES, errno.ENOSPC)(world)
    if world.moment is Moment.SETUP:
        world.destination.fails_epoch_writes = False
        world.destination.next_epoch_writes = False if world.is_lasting else None


def _state(which: str) -> Strike:
    def strike(world: SimWorld) -> None:
        host: SimHost = getattr(world, which)
        host.fails_epoch_writes = world.rng.random() < 0.5
        host.next_epoch_writes = host.fails_epoch_writes if world.is_lasting else None

    return strike


def _frame(*kinds: str) -> Strike:
    def strike(world: SimWorld) -> None:
        stream = world.rng.choice(world.streams)
        if world.is_prompt and world.moment is Moment.PREPARED:
            stream = world.streams[1]  # which is about to say so; the source's next word is COMMIT
        kind = world.rng.choice(kinds)
        for number in range(1, N_MANGLED if world.is_lasting else 2):
            stream.faults[stream.n_sends + number] = kind
        stream.flip_at = world.rng.getrandbits(24)

    return _again_and_again(strike)


def _stranger(world: SimWorld) -> None:
    world.note_strike()
    mine, its = world.connection(world.source)
    kind, rng = world.rng.randrange(4), world.rng
    its.faults.clear()

    async def come() -> None:
        if kind == 0:
            mine._outgoing.data += rng.randbytes(200)
        elif kind == 1:
            mine._outgoing.data += b"FUSEMIG\n" + rng.randbytes(100)
        elif kind == 2:
            mine._outgoing.data += b"FUS"  # and no more
        mine._outgoing.note()
        migration = await world.receive(its)()
        assert migration.phase is MigrationPhase.NONE, "a stranger became a migration"
        assert migration.error is not None

    world.nursery.start_soon(world.destination.live, come)


def _rival(world: SimWorld) -> None:
    world.note_strike()
    directory = world.directory / "rival"
    rival = SimHost(directory, world.rng, world.clock.jump, SIZES, is_incoming=False)
    mine, its = world.connection(rival)

    async def connect() -> SimStream:
        await trio.lowlevel.checkpoint()
        return mine

    migration = world.migration_from(rival, connect, lambda _phase: None)

    async def come() -> None:
        await world.receive(its)()

    async def run() -> None:
        await migration.run()
        assert migration.phase is MigrationPhase.FAILED
        assert refused(migration.error), migration.error

    world.nursery.start_soon(world.destination.live, come)
    world.nursery.start_soon(rival.live, run)


def _mismatch(world: SimWorld) -> None:
    world.note_strike()
    world.later_destination = world.destination
    sizes = {**SIZES, "a": SIZES["a"] + 512}
    world.destination = SimHost(world.directory / "other", world.rng, world.clock.jump, sizes, is_incoming=True)
    world.connect()


def _cancel(world: SimWorld) -> None:
    world.note_strike()
    try:
        world.outgoing.cancel()
    except StateError as exc:
        assert "cannot be cancelled any more" in str(exc)  # noqa: PT017


def _end_source(world: SimWorld) -> None:
    world.note_strike()

    async def wind_down() -> None:
        await world.outgoing.wind_down()

    world.nursery.start_soon(world.source.live, wind_down)


def _end_destination(world: SimWorld) -> None:
    world.note_strike()
    world.destination.end()


def _suspend(world: SimWorld) -> None:
    world.note_strike()
    world.clock.jump(3600)


STRIKES: dict[Fault, Strike] = {
    Fault.SOURCE_KILLED: _kill("source", is_power_loss=False),
    Fault.DESTINATION_KILLED: _kill("destination", is_power_loss=False),
    Fault.SOURCE_POWER: _kill("source", is_power_loss=True),
    Fault.DESTINATION_POWER: _kill("destination", is_power_loss=True),
    Fault.LINK_RESET: _again_and_again(_reset),
    Fault.LINK_STALLED: _on_link(_silence),
    Fault.LINK_SLOW: _on_link(lambda stream: stream.slow_down(20_000)),
    Fault.DESTINATION_FULL: _destination_full,
    Fault.DESTINATION_EIO: _destination_eio,
    Fault.SOURCE_EIO: _disk("source", frozenset({Operation.READ, Operation.EXTENTS}), errno.EIO),
    Fault.SOURCE_SYNC: _source_sync,
    Fault.SOURCE_STATE: _state("source"),
    Fault.DESTINATION_STATE: _state("destination"),
    Fault.FLIPPED: _frame("flip"),
    Fault.MANGLED: _frame("half", "duplicate", "reorder"),
    Fault.STRANGER: _stranger,
    Fault.RIVAL: _rival,
    Fault.MISMATCH: _mismatch,
    Fault.CANCELLED: _cancel,
    Fault.SOURCE_ENDED: _end_source,
    Fault.DESTINATION_ENDED: _again_and_again(_end_destination),
    Fault.GUEST_BUSY: lambda world: world.note_strike(),
    Fault.CLOCK_JUMP: _suspend,
}
"""Every fault that the simulation can play."""

_AT = r"disk '[ab]': \w+ at \d+\+\d+ .*"
SAYS: dict[Fault, str] = {
    Fault.DESTINATION_FULL: _AT + r"No space left.* still to come: make room|epoch file .*free space",
    Fault.DESTINATION_EIO: _AT + r"Input/output error.*mend the destination's store",
    Fault.SOURCE_EIO: _AT + r"Input/output error.*mend its image, then migrate again",
    Fault.SOURCE_SYNC: _AT + r"Input/output error.*serve it anew",
    Fault.SOURCE_STATE: r"epoch file .*free space there first",
    Fault.DESTINATION_STATE: r"epoch file .*free space there first",
    Fault.MISMATCH: rf"disk 'a' has {SIZES['a'] + 512} bytes there and {SIZES['a']} bytes at the source; delete",
    Fault.CANCELLED: r"cancelled",
    Fault.SOURCE_ENDED: r"cancelled",
}
"""What the error of a source that serves on has to say: the disk, the range, the cause and the next step."""


def arm(world: SimWorld, fault: Fault, moment: Moment, delay: int) -> None:
    """Have ``fault`` strike ``delay`` steps of the loop after the migration has got to ``moment``, once."""
    is_done = False
    world.is_prompt = not delay
    if fault is Fault.MISMATCH:
        STRIKES[fault](world)
        return

    async def later() -> None:
        for _ in range(delay):
            await trio.lowlevel.checkpoint()
        STRIKES[fault](world)

    def on_moment(now: Moment) -> None:
        nonlocal is_done
        if now is not moment or is_done:
            return
        is_done = True
        if delay:
            world.nursery.start_soon(later)
        else:
            STRIKES[fault](world)

    if fault is Fault.RIVAL and moment is Moment.SETUP:
        # Whoever comes first is the one; this one is to be the second.
        world.on_claimed = lambda: on_moment(Moment.SETUP)
        return
    world.on_moment = on_moment
