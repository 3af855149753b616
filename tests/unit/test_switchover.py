"""The freeze of two disks in RAM, with no wire and no migration."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.fault import Fault, FaultDisk, Operation
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.errors import ConnectionLostError, DiskError, GateClosedError, MigrationError
from fusemig.migration.commit import SourceDisk
from fusemig.migration.disk_group import DiskGroup
from fusemig.migration.pacer import Pacer
from fusemig.migration.stats import MigrationParameters
from fusemig.migration.switchover import Switchover
from fusemig.records.epoch import EpochFile
from support.pair import nothing
from support.slow_sync import SlowSync

if TYPE_CHECKING:
    from pathlib import Path


class Freeze:
    """Two disks that are about to be frozen."""

    def __init__(self, directory: Path) -> None:
        self.images = [MemoryDisk(name, CHUNK_SIZE) for name in "ab"]
        self.faults = [FaultDisk(image) for image in self.images]
        self.disks = [TrackedDisk(layer, gate=Gate.OPEN) for layer in self.faults]
        lent = [SourceDisk(disk, EpochFile(directory / f"{disk.name}.fusemig"), nothing) for disk in self.disks]
        self.parameters = MigrationParameters()
        self.slow = SlowSync(self.disks[1])
        self.group = DiskGroup(lent, self.slow.offload)
        self.pacer = Pacer(
            self.parameters, lambda: self.group.tracked, lambda: 0.0, lambda _reach, _percent: None, can_mirror=True
        )
        self.switchover = Switchover(self.group, self.pacer, self.parameters)
        self.n_passes = 0

    def gates(self) -> set[Gate]:
        """Return the gates of both disks."""
        return {disk.gate for disk in self.disks}

    async def last_pass(self) -> None:
        """Send what is dirty, which is nothing."""
        assert self.gates() == {Gate.CLOSED}
        self.n_passes += 1
        await trio.sleep(0.25)


@pytest.fixture
def freeze(tmp_path: Path) -> Freeze:
    """Two disks that are about to be frozen."""
    return Freeze(tmp_path)


async def test_a_freeze_syncs_both_disks_beside_the_last_pass(
    freeze: Freeze, autojump_clock: trio.testing.MockClock
) -> None:
    """Behind closed gates; and its length is the downtime once the destination has them."""
    await freeze.group.start_tracking()
    assert freeze.switchover.frozen_s(trio.current_time()) == 0
    freeze.switchover.begin()
    with pytest.raises(GateClosedError):
        freeze.disks[0].pwrite(b"x", 0)
    await freeze.switchover.finish_sending(freeze.last_pass)
    assert freeze.n_passes == 1
    assert [image.n_flushes for image in freeze.images] == [1, 1]
    assert freeze.switchover.downtime_s is None
    freeze.switchover.note_taken()
    await trio.sleep(7)
    assert freeze.switchover.downtime_s == pytest.approx(0.25)
    assert freeze.switchover.frozen_s(trio.current_time()) == pytest.approx(0.25)


async def test_a_freeze_that_takes_too_long_ends_at_its_deadline(
    freeze: Freeze, autojump_clock: trio.testing.MockClock
) -> None:
    """With an error that says what to do."""
    await freeze.group.start_tracking()
    freeze.switchover.begin()
    began_at = trio.current_time()
    with pytest.raises(MigrationError, match="longer than the freeze deadline of 5 s"):
        await freeze.switchover.finish_sending(trio.sleep_forever)
    assert trio.current_time() - began_at == pytest.approx(5.0)
    freeze.group.thaw()
    freeze.switchover.undo()
    assert freeze.gates() == {Gate.OPEN}
    assert freeze.switchover.frozen_s(trio.current_time()) == 0


@pytest.mark.parametrize("fails", [False, True])
async def test_a_sync_that_takes_too_long_is_not_waited_for(
    freeze: Freeze, autojump_clock: trio.testing.MockClock, fails: bool
) -> None:
    """Guests go on at the deadline; that it fails afterwards is known to the disk all the same."""
    freeze.slow.is_slow = True
    if fails:
        freeze.faults[1].add(Fault(frozenset({Operation.FLUSH}), errno=errno.EIO))
    await freeze.group.start_tracking()
    freeze.switchover.begin()
    began_at = trio.current_time()
    try:
        with pytest.raises(MigrationError, match="longer than the freeze deadline of 5 s"):
            await freeze.switchover.finish_sending(freeze.last_pass)
        assert trio.current_time() - began_at == pytest.approx(5.0)
        freeze.group.thaw()
        assert freeze.gates() == {Gate.OPEN}
        freeze.disks[1].pwrite(b"x", 0)
        assert not freeze.slow.has_ended.is_set()
        freeze.group.check_stores()
    finally:
        freeze.slow.may_end.set()
    assert freeze.slow.has_ended.wait(60)
    if fails:
        with pytest.raises(MigrationError, match="so the disk is not moved"):
            freeze.group.check_stores()
        with pytest.raises(DiskError):
            freeze.disks[1].flush()
    else:
        freeze.disks[1].flush()
        freeze.group.check_stores()


async def test_a_sync_that_ends_in_time_is_waited_for(freeze: Freeze) -> None:
    """Also where the last pass ends first."""
    freeze.slow.is_slow = True
    freeze.parameters.freeze_deadline_s = 600.0

    async def last_pass() -> None:
        await trio.lowlevel.checkpoint()
        trio.lowlevel.spawn_system_task(end)

    async def end() -> None:
        freeze.slow.may_end.set()

    await freeze.group.start_tracking()
    freeze.switchover.begin()
    await freeze.switchover.finish_sending(last_pass)
    assert freeze.slow.has_ended.is_set()
    assert [image.n_flushes for image in freeze.images] == [1, 1]


async def test_the_first_failure_ends_the_freeze(freeze: Freeze, autojump_clock: trio.testing.MockClock) -> None:
    """Of the pass, or of a store, which is not to be trusted from then on."""

    async def lose() -> None:
        raise ConnectionLostError("lost")

    await freeze.group.start_tracking()
    freeze.switchover.begin()
    with pytest.raises(ConnectionLostError, match="lost"):
        await freeze.switchover.finish_sending(lose)
    freeze.faults[1].add(Fault(frozenset({Operation.FLUSH}), errno=errno.EIO))
    with pytest.raises(MigrationError, match="so the disk is not moved"):
        await freeze.switchover.finish_sending(trio.sleep_forever)
    with pytest.raises(MigrationError, match="so the disk is not moved"):
        freeze.group.check_stores()


async def test_a_disk_that_is_given_away_stays_read_only(freeze: Freeze) -> None:
    """Whoever thaws afterwards."""
    await freeze.group.start_tracking()
    freeze.group.close_gates()
    freeze.group.end_writing()
    freeze.group.thaw()
    assert freeze.gates() == {Gate.READ_ONLY}


async def test_passes_make_room_only_where_writes_wait_for_them(freeze: Freeze) -> None:
    """What the kernel pushes out waits for nothing as long as nothing is mirrored."""

    async def keep_up(_until: trio.Event) -> None:
        raise AssertionError("nothing is mirrored")

    await freeze.switchover.push_out_pages(keep_up)
    assert freeze.gates() == {Gate.OPEN}


async def test_passes_make_room_also_where_mirroring_begins_while_pages_are_pushed_out(
    freeze: Freeze, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had been given up for want of acknowledgements, and came back: nothing else sends what writes wait for."""
    has_room = trio.Event()

    async def keep_up(until: trio.Event) -> None:
        assert freeze.pacer.is_mirroring
        has_room.set()
        await until.wait()

    async def push_out() -> None:
        await trio.sleep(1)
        freeze.parameters.mirrors = True
        await has_room.wait()

    await freeze.group.start_tracking()
    monkeypatch.setattr(freeze.group, "push_out_pages", push_out)
    freeze.pacer.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(freeze.pacer.run)
        with trio.fail_after(10):
            await freeze.switchover.push_out_pages(keep_up)
        nursery.cancel_scope.cancel()
    freeze.pacer.release()
