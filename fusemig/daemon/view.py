"""The view: what `fusemig top` and the web page show of a daemon at one moment, made when somebody looks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fusemig.daemon.info import daemon_status, migration_parameters
from fusemig.qmp import schema
from fusemig.qmp.seeing import DiskView

if TYPE_CHECKING:
    from fusemig.daemon.daemon import Daemon
    from fusemig.daemon.served import ServedDisk


async def look(daemon: Daemon, max_cells: int) -> schema.View:
    """Return the view, with the chunks of each disk counted in ``max_cells`` cells at most."""
    disks = [await _disk(daemon, served, max_cells) for served in daemon.disks.values()]
    return schema.View(
        at=round(time.time() * 1000),
        clock=time.monotonic() * 1000,
        status=daemon_status(daemon),
        parameters=migration_parameters(daemon),
        disks=disks,
        events=daemon.events.recent,
    )


async def _disk(daemon: Daemon, served: ServedDisk, max_cells: int) -> DiskView:
    disk = served.disk
    if disk is None:
        return DiskView(name=served.name)
    is_filling = served.is_waiting or served.loan is not None
    chunks = await daemon.chunk_maps[served.name].count(
        disk, daemon.migrator.migration, max_cells, is_filling=is_filling
    )
    counters = disk.statistics()
    return DiskView(
        name=served.name,
        read_bytes=counters.read_bytes,
        written_bytes=counters.written_bytes,
        waiting_writes=disk.paced_writes,
        map=chunks,
    )
