"""Export: one disk as a file of the mount.

The set of exports is fixed for the life of a mount, and so are their inode numbers: the root is 1, the exports follow
from 2 in the order of the command line. A file handle is the inode number and means nothing else, so a successor
process needs no memory of who opened what. Names are keys, never joined to a path.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fusemig.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fusemig.disk.tracked import TrackedDisk

ROOT_INODE: Final = 1
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass
class Export:
    """A disk's guest side under the name that the mount shows.

    ``disk`` is None while a destination does not know its size yet; the file is then empty and refuses writes. The
    daemon sets it, and tells the mount to drop the kernel's cached attributes, when the source has said the size.
    """

    name: str
    inode: int
    disk: TrackedDisk | None
    read_only: bool = False
    """Opening for writing is refused with EROFS (``--readonly``)."""
    mtime_ns: int = field(default_factory=time.time_ns)
    """Time of the last guest write: the lanes set it, `getattr` shows it."""
    atime_ns: int = field(default_factory=time.time_ns)
    """Only utimens sets it: reads leave no trace, as under noatime."""
    changed_ns: int = 0
    """Time of the last utimens; 0: there was none."""

    def set_times(self, atime_ns: int | None, mtime_ns: int | None, now_ns: int) -> None:
        """Set what a guest sets with utimens."""
        if atime_ns is not None:
            self.atime_ns = atime_ns
        if mtime_ns is not None:
            self.mtime_ns = mtime_ns
        self.changed_ns = now_ns

    def restore_times(self, atime_ns: int, mtime_ns: int, changed_ns: int, written_ns: int) -> None:
        """Be as under a predecessor; what was written after the times were set has changed mtime.

        Args:
            atime_ns: as it was set.
            mtime_ns: as it was set, or as it was later.
            changed_ns: when they were set.
            written_ns: when the image was written last.
        """
        self.atime_ns, self.changed_ns = atime_ns, changed_ns
        self.mtime_ns = written_ns if written_ns > changed_ns else mtime_ns

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return 0 if self.disk is None else self.disk.size

    @property
    def ctime_ns(self) -> int:
        """Time of the last change of contents or times."""
        return max(self.mtime_ns, self.changed_ns)


class Exports:
    """The fixed namespace of a mount, by inode and by name."""

    def __init__(self) -> None:
        """Start without exports."""
        self._by_inode: dict[int, Export] = {}
        self._by_name: dict[str, Export] = {}
        self.on_times_set: Callable[[], None] = lambda: None
        """Called after a utimens of any of them, before it is answered."""

    def add(self, name: str, disk: TrackedDisk | None, *, read_only: bool = False) -> Export:
        """Add a disk; only before the mount is made.

        Raises:
            ConfigError: the name is malformed or taken.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(f"disk name '{name}' is not allowed: use letters, digits, '.', '_' and '-', at most 64")
        if name in self._by_name:
            raise ConfigError(f"disk name '{name}' is given twice: names are the files of one directory")
        export = Export(name, ROOT_INODE + 1 + len(self._by_inode), disk, read_only)
        self._by_inode[export.inode] = self._by_name[name] = export
        return export

    def by_inode(self, inode: int) -> Export | None:
        """Return the export with this inode number."""
        return self._by_inode.get(inode)

    def by_name(self, name: str) -> Export | None:
        """Return the export with this name."""
        return self._by_name.get(name)

    def __iter__(self) -> Iterator[Export]:
        return iter(self._by_inode.values())

    def __len__(self) -> int:
        return len(self._by_inode)
