"""Entries: what the kernel is told of the mount's root and files by the pyfuse3 lane, and for how long it may keep it.

Attributes are kept for a second; the kernel forgets them at every write that it sends us, so a new mtime is seen at
once. Nothing is kept about an image that is still incoming. With the write-back cache the kernel takes size and mtime
of a file it knows from itself, so an export whose size was not known is another inode generation once it is: the kernel
forgets the first one.
"""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING, Final

import pyfuse3

from fusemig.fuse.attributes import attributes_of
from fusemig.fuse.export import ROOT_INODE

if TYPE_CHECKING:
    from fusemig.fuse.export import Export

ENTRY_TIMEOUT_S: Final = 60.0
"""Names and inode numbers never change."""
_ROOT_MODE: Final = stat.S_IFDIR | 0o755


class Entries:
    """Describes what there is in one mount."""

    def __init__(self, *, has_write_back: bool) -> None:
        """The root is as old as this."""
        self._has_write_back = has_write_back
        self._made_ns = time.time_ns()

    def of_root(self) -> pyfuse3.EntryAttributes:
        """Describe the root."""
        entry = _owned_entry(ROOT_INODE, _ROOT_MODE)
        entry.st_nlink = 2
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._made_ns
        entry.attr_timeout = ENTRY_TIMEOUT_S
        return entry

    def of_file(self, export: Export) -> pyfuse3.EntryAttributes:
        """Describe the file of an export."""
        one = attributes_of(export)
        entry = _owned_entry(one.inode, one.mode)
        entry.st_nlink = one.n_links
        entry.st_size = one.size
        entry.st_blksize = one.block_size
        entry.st_blocks = one.n_sectors
        entry.st_atime_ns = one.atime_ns
        entry.st_mtime_ns = one.mtime_ns
        entry.st_ctime_ns = one.ctime_ns
        entry.attr_timeout = one.timeout_s
        if self._has_write_back:
            entry.generation = 0 if export.disk is None else 1
            if export.disk is None:
                entry.entry_timeout = 0.0
        return entry


def _owned_entry(inode: int, mode: int) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = inode
    entry.st_mode = mode
    entry.st_uid, entry.st_gid = os.geteuid(), os.getegid()
    entry.entry_timeout = ENTRY_TIMEOUT_S
    return entry
