"""What a file of the mount is like: the attributes that either lane answers with."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from fusemig.core.units import BLOCK_SIZE
from fusemig.disk.tracked import Gate
from fusemig.fuse.abi import FileAttributes

if TYPE_CHECKING:
    from fusemig.fuse.export import Export

ATTR_TIMEOUT_S: Final = 1.0
"""How long the kernel keeps them; not at all of an image that is still incoming."""
_SECTOR_SIZE: Final = 512  # the unit of st_blocks, whatever the disk's sectors are
_READ_ONLY_MODE: Final = stat.S_IFREG | 0o400
_WRITABLE_MODE: Final = stat.S_IFREG | 0o600


@runtime_checkable
class _HasStat(Protocol):
    def stat(self) -> os.stat_result: ...


def attributes_of(export: Export) -> FileAttributes:
    """Return the attributes as they are now; may sleep.

    Raises:
        OSError: the image's store failed.
    """
    disk = export.disk
    n_sectors = -(-export.size // _SECTOR_SIZE)
    image: object = None if disk is None else disk.image
    if isinstance(image, _HasStat):
        image_stat = image.stat()
        if stat.S_ISREG(image_stat.st_mode):
            n_sectors = image_stat.st_blocks
    is_incoming = disk is None or (disk.gate is Gate.READ_ONLY and not export.read_only)
    return FileAttributes(
        inode=export.inode,
        size=export.size,
        n_sectors=n_sectors,
        atime_ns=export.atime_ns,
        mtime_ns=export.mtime_ns,
        ctime_ns=export.ctime_ns,
        mode=_READ_ONLY_MODE if export.read_only else _WRITABLE_MODE,
        n_links=1,
        uid=os.geteuid(),
        gid=os.getegid(),
        block_size=BLOCK_SIZE,
        timeout_s=0.0 if is_incoming else ATTR_TIMEOUT_S,
    )
