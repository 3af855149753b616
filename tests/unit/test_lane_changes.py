"""Changes of a lane that were held: where they are made again."""

from __future__ import annotations

import os
import threading
import time
from contextlib import closing
from functools import partial

from fusemig.core.units import BLOCK_SIZE
from fusemig.disk.allocation import map_size
from fusemig.disk.borrowed import BorrowedDisk, Wants, new_map
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.fuse import abi
from fusemig.fuse.export import Exports
from fusemig.fuse.lane_answers import Answers
from fusemig.fuse.lane_changes import Change, Changes
from fusemig.fuse.pool import IO_THREADS, ExportPools
from support.hosts import DEADLINE_S, wait_until

SIZE = 64 * BLOCK_SIZE


def test_held_writes_that_wait_for_another_host_stop_no_reads_when_the_gate_opens() -> None:
    """As many as the disk has threads for slow reads, each into a block whose rest the source still has."""
    image, store = MemoryDisk("d", SIZE), MemoryDisk("map", map_size(SIZE))
    borrowed = BorrowedDisk(image, new_map(store, image, [(0, IO_THREADS)], "boot"), Wants("d", 10 * DEADLINE_S))
    disk, exports = TrackedDisk(borrowed, gate=Gate.CLOSED), Exports()
    export = exports.add("d", disk)
    pools = ExportPools(export)
    reader, writer = os.pipe()
    with closing(os.fdopen(reader, "rb")) as replies, closing(os.fdopen(writer, "wb")) as device:
        changes = Changes(Answers(device.fileno()), {export.inode: pools})
        for block in range(IO_THREADS):
            write = partial(disk.pwrite, b"x", block * BLOCK_SIZE)
            changes.make(
                Change(export, disk, block + 1, os.getpid(), block * BLOCK_SIZE, 1, write, abi.reply(block + 1))
            )
        disk.write_gate.set(Gate.OPEN)
        wait_until(lambda: borrowed.wants.n_waiting == IO_THREADS, "the writes")
        has_read = threading.Event()
        pools.io.submit(has_read.set)
        try:
            assert has_read.wait(DEADLINE_S)
        finally:
            borrowed.fill(None, 0, IO_THREADS * BLOCK_SIZE)
            assert pools.close(time.monotonic() + DEADLINE_S)
        assert image.content[: 2 * BLOCK_SIZE : BLOCK_SIZE] == b"xx"
        assert len(replies.read(IO_THREADS * abi.OUT_HEADER_SIZE)) == IO_THREADS * abi.OUT_HEADER_SIZE
