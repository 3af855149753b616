"""A store whose sync takes as long as the test wants, in a thread, as that of a daemon does."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import trio

from fusemig.disk.tracked import Gate
from support.pair import inline

if TYPE_CHECKING:
    from typing import Any

    from fusemig.disk.tracked import TrackedDisk


class SlowSync:
    """Runs calls inline, but for the flushes of one disk while it is frozen, once it is told to be slow."""

    def __init__(self, disk: TrackedDisk) -> None:
        self._disk = disk
        self.is_slow = False
        self.may_end = threading.Event()
        self.has_ended = threading.Event()

    async def offload(self, function: Any, *args: Any, abandon_on_cancel: bool = False) -> Any:
        """Run a call that may sleep."""
        if self.is_slow and function == self._disk.flush and self._disk.gate is Gate.CLOSED:
            return await trio.to_thread.run_sync(self._flush, abandon_on_cancel=abandon_on_cancel)
        return await inline(function, *args)

    def _flush(self) -> None:
        try:
            assert self.may_end.wait(60)
            self._disk.flush()
        finally:
            self.has_ended.set()
