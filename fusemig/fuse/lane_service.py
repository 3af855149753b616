"""LaneService: the part of a data lane mount that answers guests' reads and writes; it needs no event loop.

The lane threads, and the link whose other end pyfuse3 is given later, or never. So a successor answers guests before it
has loaded pyfuse3, trio, and most of itself: `fusemig.daemon.estate` starts one, and `fusemig.fuse.lane_mount` takes it
over. Requests that the lane does not answer, those about names, wait in the link meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Final

from fusemig import failpoint
from fusemig.errors import FuseUnavailableError
from fusemig.fuse import abi
from fusemig.fuse.device import GONE
from fusemig.fuse.lane import DataLane
from fusemig.fuse.link import MetadataLink

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.fuse.export import Exports
    from fusemig.succession.mount import KeptMount

LANE_THREADS: Final = 2
"""More gain nothing: they wait for the interpreter's lock."""


class LaneService:
    """The threads that serve a mount's data."""

    def __init__(
        self, device_fd: int, exports: Exports, n_threads: int | None = None, kept: KeptMount | None = None
    ) -> None:
        """Serve nobody yet.

        Args:
            device_fd: of a mounted /dev/fuse; stays its owner's.
            exports: the fixed set of files; their disks are as guests may find them.
            n_threads: None for as many as there are cores, at most `LANE_THREADS`.
            kept: has the mount outlive this process, and is the one to be adopted if it has a device.
        """
        if n_threads is None:
            n_threads = min(LANE_THREADS, len(os.sched_getaffinity(0)))
        self.device = device_fd
        self.is_adopted = kept is not None and kept.device is not None
        self.link = MetadataLink(device_fd, None if kept is None else self._keep_init)
        self.lane = DataLane(device_fd, exports, self.link.forward, n_threads=n_threads, ended=self._lane_ended)
        self.started_s = 0.0
        """When requests about data were first taken (`time.monotonic`); 0 before."""
        self._kept = kept
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._has_ended = False
        self._on_ended: Callable[[], None] | None = None

    def start(self) -> None:
        """Take requests; of an adopted mount, have the kernel send again what nobody has answered.

        Raises:
            FuseUnavailableError: the kernel does not; nothing was taken.
        """
        if self.is_adopted:
            self._ask_again()
        self.started_s = time.monotonic()
        self.lane.start()

    def when_ended(self, call: Callable[[], None]) -> None:
        """Have ``call`` called once, from any thread, when the last lane thread has ended; at once if it has."""
        with self._lock:
            self._on_ended = call
            has_ended = self._has_ended
        if has_ended:
            call()

    def _lane_ended(self) -> None:
        with self._lock:
            self._has_ended = True
            call = self._on_ended
        if call is not None:
            call()

    def _keep_init(self, request: bytes, flags: int) -> None:
        assert self._kept is not None
        self._kept.keep_init(request, can_resend=bool(flags & abi.INIT_HAS_RESEND))
        failpoint.reach("after-init-kept")

    def _ask_again(self) -> None:
        """Adopt the mount: INIT to pyfuse3, and to us again what the kernel has no answer to."""
        assert self._kept is not None
        if self._kept.init_request:
            self.link.adopt(self._kept.init_request)
        failpoint.reach("before-resend")
        try:
            os.write(self.device, abi.resend())
        except OSError as exc:
            if exc.errno not in GONE:
                raise FuseUnavailableError(f"the kernel does not send requests again: {exc.strerror}") from exc
        failpoint.reach("after-resend")
