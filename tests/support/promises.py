"""What must hold after every run of the simulation, whatever went wrong: DESIGN's promises as one function.

I1       guest_syncs: acknowledged only with the bytes on the medium; a failed one stays failed; power losses keep it
I2       guest_writes_durably: an O_DSYNC write was answered only with its bytes on the medium
I3, I4   _check_taken: at take-over every acknowledged byte is on the destination's medium
I5       the eye: never two open gates; here: never two durable owners, before and after restarts
I6       the source's image is what its guest left, whatever came of the migration
I7       the destination is not writable before take-over; a plain `serve` refuses what is incomplete
I8       the longest freeze stays within its deadline; what failed can be migrated again
I9       who may write is the same after both daemons were killed and started again
I10, I11 not of this simulation: tests/unit/test_native.py, tests/fuse/test_mount.py
I12      _check_taken: of what early readers cached at the destination, no page is stale
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusemig.core.phase import MigrationPhase as P
from fusemig.disk.tracked import Gate
from fusemig.errors import ConfigError
from fusemig.records.epoch import Ownership
from support.matrix import Outcome
from support.simhost import SimDisk
from support.simulation import SIZES

if TYPE_CHECKING:
    from support.simhost import SimHost
    from support.simulation import SimWorld

FREEZE_SLACK_S = 0.01


def outcome_of(world: SimWorld, name: str) -> Outcome:
    """Tell how a disk came out, from what both daemons that run now let it do."""
    here, there = (host.served[name].guest.gate for host in (world.source, world.destination))
    own, its = (host.durable_state(name) for host in (world.source, world.destination))
    state = f"disk '{name}': source {own} {here}, destination {its} {there}, {world.outgoing.error}"
    assert not (own in (None, Ownership.OWNER) and its is Ownership.OWNER), f"two durable owners: {state}"
    assert (here, there) != (Gate.OPEN, Gate.OPEN), f"two writers: {state}"
    assert Gate.CLOSED not in (here, there), f"a gate was left closed: {state}"
    if there is Gate.OPEN:
        assert its is Ownership.OWNER, f"written without owning it durably: {state}"
        return Outcome.COMPLETES if world.outgoing.phase is P.COMPLETED else Outcome.DESTINATION_OWNS
    if here is Gate.OPEN:
        return Outcome.SOURCE_SERVES
    # What its daemon goes by: a record that it wrote may be durable although the write was reported as failed.
    assumed = world.source.served[name].ownership
    assert assumed in (Ownership.HANDED_OFF, Ownership.RELEASED), f"nobody may write, and nobody was given it: {state}"
    return Outcome.IN_DOUBT


def outcomes_of(world: SimWorld) -> dict[str, Outcome]:
    """Tell how each disk came out."""
    return {name: outcome_of(world, name) for name in SIZES}


async def check_promises(world: SimWorld) -> dict[str, Outcome]:
    """Hold a run that is over against every promise; return how the disks came out, now and for good.

    Daemons that died are started again; then all are, and nothing may change by that.
    """
    assert not world.violations, world.violations[:3]
    assert world.source.is_dead or world.is_cut or world.outgoing.is_over
    _check_text(world)
    slack = 3600.0 if world.longest_freeze_s >= 3600 else 0.0  # a suspended host does not see its deadline
    limit = world.parameters.freeze_deadline_s + world.parameters.taken_deadline_s + FREEZE_SLACK_S + slack
    if P.COMMITTED not in world.phases:
        limit -= world.parameters.taken_deadline_s
    assert world.longest_freeze_s <= limit

    power_lost = {host for host in (world.source, world.destination) if host.had_power_loss}
    living = outcomes_of(world) if not (world.source.is_dead or world.destination.is_dead) else None
    for host in (world.source, world.destination):
        if host.is_dead:
            world.restart(host)
    first = outcomes_of(world)
    stored = {name: world.destination.durable_state(name) for name in SIZES}
    check_contents(world, first, power_lost)
    _check_plain_serve_refuses(world.destination)
    # A source that could not take `handed-off` back serves on, until it is started again.
    is_reprieved = any(world.source.durable_state(name) is Ownership.HANDED_OFF for name in SIZES)
    if living is None or is_reprieved or world.rng.random() < 0.5:
        for host in (world.source, world.destination):
            world.restart(host)
        again = outcomes_of(world)
        for name, outcome in first.items():
            _check_same_right(name, outcome, again[name], stored[name])
        first = again
    return first


def _check_text(world: SimWorld) -> None:
    """Every failure says why, and an end that was asked for is no failure."""
    error = world.outgoing.error
    if world.source.is_dead or world.is_cut or world.outgoing.phase is P.COMPLETED:
        return
    assert error is not None
    assert len(str(error)) > 20, str(error)
    assert (error.kind == "cancelled") == (world.outgoing.phase is P.CANCELLED)
    assert (error.kind == "in-doubt") == (world.outgoing.phase is P.IN_DOUBT)


def check_contents(world: SimWorld, outcomes: dict[str, Outcome], power_lost: set[SimHost]) -> None:
    """See that whoever owns a disk, or may come to own it, holds every byte that was acknowledged (I3, I4, I6)."""
    for name, outcome in outcomes.items():
        record = world.records[name]
        owner = world.destination if outcome in (Outcome.DESTINATION_OWNS, Outcome.COMPLETES) else world.source
        content = owner.stores[name].content
        if owner in power_lost:
            wrong = record.lost_after_power_loss(content)
            assert not wrong, f"disk '{name}' after a power loss: {wrong}"
        else:
            assert content == record.acknowledged, f"'{name}' is not what was acknowledged"
        if owner is world.destination and world.source not in power_lost:
            assert world.source.stores[name].content == record.acknowledged, f"the source's '{name}' was changed"


def _check_plain_serve_refuses(host: SimHost) -> None:
    """What is incomplete is not served as if it were a disk (I7)."""
    for name in SIZES:
        state = host.durable_state(name)
        try:
            served = SimDisk(host, name, is_incoming=False, is_probe=True)
        except ConfigError as exc:
            assert state in (Ownership.INCOMING, Ownership.PREPARED)
            assert "incomplete" in str(exc)  # noqa: PT017
        else:
            assert state not in (Ownership.INCOMING, Ownership.PREPARED)
            assert (served.guest.gate is Gate.OPEN) == (state in (None, Ownership.OWNER))


def _check_same_right(name: str, before: Outcome, after: Outcome, stored: Ownership | None) -> None:
    if before is Outcome.IN_DOUBT and stored is Ownership.OWNER:
        # Its write of `owner` was reported as failed and is on the disk all the same: a restart finds it.
        before = Outcome.DESTINATION_OWNS
    owns = (Outcome.DESTINATION_OWNS, Outcome.COMPLETES)
    if before in owns or after in owns:
        assert before in owns, f"'{name}' was nobody's and is the destination's after a restart"
        assert after in owns, f"'{name}' was the destination's and is not after a restart"
    # A source that could not take `handed-off` back is read-only after a restart; never the other way round.
    elif before is Outcome.IN_DOUBT:
        assert after is Outcome.IN_DOUBT, f"'{name}' was in doubt, and a restart made it writable"
