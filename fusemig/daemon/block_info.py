"""The daemon's disks in QMP's words: `query-block` and its kin, and the disks of `x-fusemig-status`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import UNSET

from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.tracked import Gate
from fusemig.qmp import block, schema
from fusemig.records.epoch import DOUBTFUL

if TYPE_CHECKING:
    from fusemig.daemon.served import ServedDisk


def block_info(served: ServedDisk) -> block.BlockInfo:
    """Return a disk as an element of `query-block`."""
    node = block_node(served)
    if served.image is None or node is None:
        return block.BlockInfo(device=served.name)
    io_status = block.IoStatus.OK if served.io_error is None else block.IoStatus.FAILED
    return block.BlockInfo(device=served.name, io_status=io_status, inserted=node)


def block_node(served: ServedDisk) -> block.BlockDeviceInfo | None:
    """Return a disk as an element of `query-named-block-nodes`; None while its image is still to come."""
    if served.disk is None or served.image is None:
        return None
    return block.BlockDeviceInfo(
        file=str(served.path),
        ro=served.is_read_only,
        node_name=served.name,
        image=block.ImageInfo(
            filename=str(served.path),
            virtual_size=served.disk.size,
            actual_size=served.image.stat().st_blocks * 512,
        ),
        dirty_bitmaps=[
            block.DirtyBitmapInfo(
                name="x-fusemig-written",
                count=min(served.disk.written_chunks * CHUNK_SIZE, served.disk.size),
                granularity=CHUNK_SIZE,
                recording=True,
                busy=bool(served.busy),
                persistent=False,
            )
        ],
    )


def block_stats(served: ServedDisk) -> block.BlockStats:
    """Return a disk as an element of `query-blockstats`."""
    if served.disk is None:
        return block.BlockStats(device=served.name, node_name=served.name, stats=block.BlockDeviceStats())
    counters = served.disk.statistics()
    stats = block.BlockDeviceStats(
        rd_bytes=counters.read_bytes,
        rd_operations=counters.n_reads,
        wr_bytes=counters.written_bytes,
        wr_operations=counters.n_writes,
        flush_operations=counters.n_flushes,
        wr_highest_offset=counters.highest_written,
        failed_rd_operations=counters.n_failed_reads,
        failed_wr_operations=counters.n_failed_writes,
        failed_flush_operations=counters.n_failed_flushes,
    )
    return block.BlockStats(device=served.name, node_name=served.name, stats=stats)


def served_disk(served: ServedDisk) -> schema.ServedDisk:
    """Return a disk as `x-fusemig-status` shows it."""
    disk, record, loan = served.disk, served.epoch_file.record, served.loan  # which a thread may end meanwhile
    return schema.ServedDisk(
        name=served.name,
        size=0 if disk is None else disk.size,
        path=str(served.path),
        state="owner"
        if record is None and not served.is_waiting
        else "waiting"
        if record is None
        else record.state.value,
        gate=Gate.READ_ONLY.value if disk is None else disk.gate.value,
        parked_writes=0 if disk is None else disk.parked_writes,
        read_only=served.is_read_only,
        missing_bytes=0 if loan is None else loan.missing_bytes,
        waiting_requests=0 if loan is None else loan.wants.n_waiting,
        io_error=served.io_error is not None,
        dirty_bytes=0 if disk is None else min(disk.written_chunks * CHUNK_SIZE, disk.size),
        epoch=UNSET if record is None else record.epoch,
        in_doubt=(served.doubt or "its destination was not asked yet")
        if record is not None and record.state in DOUBTFUL
        else UNSET,
    )
