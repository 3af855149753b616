"""What both ends do between passes of the native wire, with no disks and a destination that the test plays."""

from __future__ import annotations

import trio
import trio.testing

from fusemig.migration.disk_group import DiskGroup
from fusemig.migration.link import BufferPool, NativeLink
from fusemig.migration.meter import Meter
from fusemig.migration.native_passes import NativePasses
from fusemig.migration.pacer import Pacer
from fusemig.migration.stats import MigrationParameters
from fusemig.wire import native
from support.pair import inline
from support.streams import memory_connection


async def test_each_sync_waits_for_the_destination(autojump_clock: trio.testing.MockClock) -> None:
    """Not only the first."""
    here, there = memory_connection()
    pool, parameters, disks = BufferPool(), MigrationParameters(), DiskGroup([], inline)
    pacer = Pacer(parameters, list, lambda: 0.0, lambda _reach, _percent: None, can_mirror=True)
    passes = NativePasses(
        NativeLink(here, native.Decoder(native.FROM_DESTINATION, preface=False), pool),
        disks,
        pool,
        None,
        parameters,
        Meter(),
        pacer,
        inline,
        lambda: 0,
        lambda: native.Progress(1, 0, 0),
        lambda: None,
        is_journaled=False,
    )
    peer = NativeLink(there, native.Decoder(native.FROM_SOURCE, preface=False), pool)

    async def answer_each_after_a_second() -> None:
        while True:
            await peer.expect(native.Sync, 60.0)
            await trio.sleep(1)
            await peer.send_message(native.Synced())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(passes.receive)
        nursery.start_soon(answer_each_after_a_second)
        for number in (1, 2, 3):
            await passes.sync()
            assert trio.current_time() >= number
        nursery.cancel_scope.cancel()
