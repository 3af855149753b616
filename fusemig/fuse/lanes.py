"""Which lane serves the mount: the data lane where it can, the pyfuse3 lane where it cannot or is asked for."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import structlog

from fusemig.errors import FuseUnavailableError
from fusemig.fuse.lane_mount import DataLaneMount, open_data_lane_mount
from fusemig.fuse.mount import Mount, open_mount
from fusemig.fuse.preflight import Lane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fusemig.fuse.export import Exports
    from fusemig.fuse.lane_service import LaneService
    from fusemig.fuse.preflight import MountOptions
    from fusemig.succession.mount import KeptMount

AnyMount = Mount | DataLaneMount

log = structlog.get_logger(__name__)


@asynccontextmanager
async def open_lane(
    lane: Lane,
    mountpoint: Path,
    exports: Exports,
    options: MountOptions,
    n_threads: int | None = None,
    kept: KeptMount | None = None,
    service: LaneService | None = None,
) -> AsyncIterator[AnyMount]:
    """Mount and serve while the body runs.

    Args:
        lane: which one.
        mountpoint: an empty directory; or where a predecessor's mount is, which is adopted.
        exports: what to serve.
        options: how to mount.
        n_threads: the data lane's; None for as many as there are cores, at most 2.
        kept: has the mount outlive this process where it can, and is one to be adopted perhaps.
        service: serves that one already (`fusemig.estate`).

    Raises:
        FuseUnavailableError: it cannot be mounted here, with the cause and what to do about it.
        StateError: this process has a mount already.
    """
    async with AsyncExitStack() as stack:
        if lane is Lane.PYFUSE3:
            mount: AnyMount = await stack.enter_async_context(open_mount(mountpoint, exports, options))
        else:
            try:
                data_lane = open_data_lane_mount(
                    mountpoint, exports, options, n_threads=n_threads, kept=kept, service=service
                )
                mount = await stack.enter_async_context(data_lane)
            except FuseUnavailableError as exc:
                if lane is Lane.DATA or (kept is not None and (kept.is_demanded or kept.device is not None)):
                    raise
                log.warning("the pyfuse3 lane serves this mount, the data lane cannot", reason=str(exc))
                mount = await stack.enter_async_context(open_mount(mountpoint, exports, options))
        yield mount
