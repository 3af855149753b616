"""Pages that the kernel lost: every sync of one file fails."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pytest


@contextmanager
def lost_pages(monkeypatch: pytest.MonkeyPatch, path: Path) -> Iterator[None]:
    """Have every sync of a file fail."""
    sync, lost = os.fdatasync, path.stat()

    def fail(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), lost):
            raise OSError(errno.EIO, "lost pages")
        sync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        yield
