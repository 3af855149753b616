"""What follows a run of the simulation: the disks are used as they came out, asked about, gone on with, and arrive.

use       guests write where they may and nowhere else, also while a fault lasts; the owner may lose power
again     while a fault lasts: whoever is dead is started again, who owns the disks is asked, a migration is tried
settle    with everything mended, what is in doubt has one owner again, by the product's own questions
arrive    what the source has goes on with `--resume`, or anew where that is refused, with a guest: it completes
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from fusemig.core.phase import MigrationPhase as P
from fusemig.disk.tracked import Gate
from fusemig.errors import DiskError, PeerRefusedError
from fusemig.records.epoch import Ownership
from support.matrix import Outcome
from support.promises import check_contents, outcomes_of

if TYPE_CHECKING:
    from support.simhost import SimHost
    from support.simulation import SimWorld

SETTLE_DEADLINE_S = 600.0
LASTING_S = 40.0
"""How long who owns the disks is asked while the fault lasts."""
N_LATER_WRITES = 15


async def go_on(world: SimWorld, outcomes: dict[str, Outcome]) -> str:
    """Lead the disks to the destination, from wherever the fault left them; tell how they got there."""
    way = []
    world.on_moment = lambda _moment: None
    world.on_claimed = lambda: None
    await _use(world, outcomes)
    if world.is_lasting:
        await _again(world)
        way.append("again")
    world.mend()
    if world.in_doubt():
        await _settle(world, SETTLE_DEADLINE_S)
        way.append("asked")
    assert not world.in_doubt(), "nobody can be found to own the disks"
    _check(world)
    if any(served.is_writable for served in world.served_here()):
        way.append(await _arrive(world))
    _check(world)
    assert set(outcomes_of(world).values()) <= {Outcome.COMPLETES, Outcome.DESTINATION_OWNS}
    await _lose_power(world)
    return ", ".join(way)


async def _use(world: SimWorld, outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        if outcome is Outcome.IN_DOUBT:
            for host in (world.source, world.destination):
                assert not await world.guest_writes(host, name, 0, b"nobody may"), f"'{name}' in doubt was written"
            continue
        host = world.source if outcome is Outcome.SOURCE_SERVES else world.destination
        _use_faulty(world, host, name)
        if not world.is_lasting and world.rng.random() < 0.5:
            await _use_and_lose_power(world, host, name, [n for n, other in outcomes.items() if other is outcome])
    assert not world.violations, world.violations[:3]


async def _use_and_lose_power(world: SimWorld, host: SimHost, name: str, owned: list[str]) -> None:
    """Write and sync, write and do not sync, and see after a power loss of what ``host`` owns what was promised."""
    host.mend()
    world.records[name].is_sync_failed = False
    assert await world.guest_writes(host, name, 4711, b"still writable")
    assert world.guest_syncs(host, name)
    assert await world.guest_writes(host, name, 512, b"not synced")
    host.die(is_power_loss=True)
    host.restart()
    for other in owned:
        wrong = world.records[other].lost_after_power_loss(host.stores[other].content)
        assert not wrong, f"disk '{other}': {wrong}"
    assert host.stores[name].content[4711:4725] == b"still writable"


async def _lose_power(world: SimWorld) -> None:
    """At last: the owner, and what it says after a restart."""
    names = list(world.records)
    await _use_and_lose_power(world, world.destination, names[0], names)
    assert not world.violations, world.violations[:3]
    assert all(served.guest.gate is Gate.OPEN for served in world.destination.served.values())


async def _again(world: SimWorld) -> None:
    """Try everything once more while the fault lasts: whatever comes of it, no promise is broken."""
    await _settle(world, LASTING_S)
    if all(served.is_writable for served in world.served_here()):
        _serve_anew_if_distrusted(world)
        world.connect(world.resume_point())
        await world.migrate()
    for host in (world.source, world.destination):
        if host.is_dead:
            had_power_loss = host.had_power_loss
            world.restart(host)
            if had_power_loss:
                _note_power_loss(world, host)
    _check(world)


def _note_power_loss(world: SimWorld, host: SimHost) -> None:
    for name, record in world.records.items():
        is_owner = host.served[name].is_writable
        if is_owner or (host is world.source and host.durable_state(name) is Ownership.HANDED_OFF):
            wrong = record.lost_after_power_loss(host.stores[name].content)
            assert not wrong, f"disk '{name}' after a power loss: {wrong}"


def _check(world: SimWorld) -> None:
    assert not world.violations, world.violations[:3]
    for host in (world.source, world.destination):
        if host.is_dead:
            world.restart(host)
    check_contents(world, outcomes_of(world), {world.source})


async def _settle(world: SimWorld, deadline_s: float) -> None:
    """Have the source's daemon ask, as it does for as long as it lives."""
    with trio.move_on_after(deadline_s):
        while world.in_doubt():
            if world.source.is_dead:
                had_power_loss = world.source.had_power_loss
                world.restart(world.source)
                if had_power_loss:
                    _note_power_loss(world, world.source)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.source.live, world.source.doubts.watch)
                while world.in_doubt() and not world.source.is_dead:
                    await trio.sleep(0.5)
                nursery.cancel_scope.cancel()
            await trio.sleep(0.5)


async def _arrive(world: SimWorld) -> str:
    """Go on with the migration until it completes."""
    _serve_anew_if_distrusted(world)
    point = world.resume_point()
    world.nursery.start_soon(world.source.live, lambda: world.guest(world.source, N_LATER_WRITES, 0.002))
    world.connect(point)
    await world.migrate()
    if isinstance(world.outgoing.error, PeerRefusedError):
        way = "anew"  # the destination never heard of the disk, or is another one
        assert "there is nothing of disk" in str(world.outgoing.error), world.outgoing.error
        world.connect()
        await world.migrate()
    else:
        way = "resumed living" if point.disks else "resumed"
    assert world.outgoing.phase is P.COMPLETED, world.outgoing.error
    assert set(outcomes_of(world).values()) == {Outcome.COMPLETES}
    return way


def _serve_anew_if_distrusted(world: SimWorld) -> None:
    """A disk whose sync failed is not migrated until it is served anew."""
    if any(record.is_sync_failed for record in world.records.values()):
        world.restart(world.source)
        for record in world.records.values():
            record.is_sync_failed = False


def _use_faulty(world: SimWorld, host: SimHost, name: str) -> None:
    """Write to a disk whose faults may still be there: the guest gets the errno."""
    if host.layers[name]._faults or host.served[name].guest.gate is not Gate.OPEN:
        try:
            host.served[name].guest.pwrite(b"x" * 512, 1024)
        except DiskError as exc:
            assert exc.errno in (5, 28), exc  # noqa: PT017
        world.records[name].note(host.stores[name].content, 1024, 512)
        world.guest_syncs(host, name)
