"""The vocabulary of `query-block` and its kin (qapi/block-core.json): QEMU's own mixture of hyphens and underscores.

What a raw file served by FUSE has no use for is there with the value that QEMU gives it, because clients expect it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from msgspec import UNSET, UnsetType, field

from fusemig.qmp.base import Arguments, Result, underscores


class DetectZeroes(StrEnum):
    """QAPI BlockdevDetectZeroesOptions."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


class IoStatus(StrEnum):
    """QAPI BlockDeviceIoStatus."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


class QueryBlockstats(Arguments, frozen=True, kw_only=True):
    """``query-blockstats``."""

    query_nodes: bool = False


class QueryNamedBlockNodes(Arguments, frozen=True, kw_only=True):
    """``query-named-block-nodes``."""

    flat: bool = False
    """Of no meaning: our nodes have no backing file."""


class ImageInfo(Result, frozen=True, kw_only=True, rename=underscores):
    """``image`` of a node."""

    filename: str
    virtual_size: int = field(name="virtual-size")
    actual_size: int = field(name="actual-size", default=0)
    format: str = "raw"
    dirty_flag: bool = field(name="dirty-flag", default=False)


class CacheInfo(Result, frozen=True, kw_only=True):
    """``cache`` of a node."""

    writeback: bool = True
    direct: bool = False
    no_flush: bool = False


class DirtyBitmapInfo(Result, frozen=True, kw_only=True, rename=underscores):
    """A dirty map as QEMU shows one."""

    count: int
    """Bytes that are dirty."""
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    name: str | UnsetType = UNSET


class BlockDeviceInfo(Result, frozen=True, kw_only=True, rename=underscores):
    """``inserted`` of ``query-block``; QEMU's own mixture of hyphens and underscores."""

    file: str
    ro: bool
    image: ImageInfo
    node_name: str = field(name="node-name")
    drv: str = "raw"
    backing_file_depth: int = 0
    encrypted: bool = False
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    write_threshold: int = 0
    bps: int = 0
    bps_rd: int = 0
    bps_wr: int = 0
    iops: int = 0
    iops_rd: int = 0
    iops_wr: int = 0
    cache: CacheInfo = CacheInfo()
    dirty_bitmaps: list[DirtyBitmapInfo] | UnsetType = field(name="dirty-bitmaps", default=UNSET)


class BlockInfo(Result, frozen=True, kw_only=True):
    """An element of ``query-block``: one disk."""

    device: str
    inserted: BlockDeviceInfo | UnsetType = UNSET
    """Absent while a destination does not know the disk yet."""
    type: str = "unknown"
    removable: bool = False
    locked: bool = False
    io_status: IoStatus | UnsetType = UNSET


class BlockDeviceStats(Result, frozen=True, kw_only=True, rename=underscores):
    """``stats`` of ``query-blockstats``."""

    rd_bytes: int = 0
    wr_bytes: int = 0
    unmap_bytes: int = 0
    rd_operations: int = 0
    wr_operations: int = 0
    flush_operations: int = 0
    unmap_operations: int = 0
    rd_total_time_ns: int = 0
    wr_total_time_ns: int = 0
    flush_total_time_ns: int = 0
    unmap_total_time_ns: int = 0
    wr_highest_offset: int = 0
    rd_merged: int = 0
    wr_merged: int = 0
    unmap_merged: int = 0
    failed_rd_operations: int = 0
    failed_wr_operations: int = 0
    failed_flush_operations: int = 0
    failed_unmap_operations: int = 0
    invalid_rd_operations: int = 0
    invalid_wr_operations: int = 0
    invalid_flush_operations: int = 0
    invalid_unmap_operations: int = 0
    account_invalid: bool = False
    account_failed: bool = False
    timed_stats: list[Any] = field(default_factory=list)


class BlockStats(Result, frozen=True, kw_only=True):
    """An element of ``query-blockstats``: one disk."""

    device: str
    stats: BlockDeviceStats
    node_name: str | UnsetType = UNSET
