"""fusemig in one's own trio program: serve disks, see what guests write, move them (docs/library.md).

    async with serving(ServeOptions(...)) as server:
        await server.migrate("tcp:10.0.0.2:4444")

What is exported here is meant to be used and stays as it is within a major version; everything else of the package may
change. Errors are `FusemigError`s, with `kind` as its stable name.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from fusemig.daemon.daemon import Daemon
from fusemig.daemon.disk_spec import DiskSpec
from fusemig.daemon.info import daemon_status
from fusemig.daemon.serve_options import ServeOptions
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.raw import RawDisk
from fusemig.disk.tracked import Gate, TrackedDisk
from fusemig.errors import ConfigError, FusemigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from fusemig.migration.stats import MigrationStatistics
    from fusemig.qmp.schema import DaemonStatus

__all__ = [
    "ConfigError",
    "DiskSpec",
    "FusemigError",
    "Gate",
    "MemoryDisk",
    "RawDisk",
    "ServeOptions",
    "Server",
    "TrackedDisk",
    "serving",
]


class Server:
    """Disks that are served; made by `serving`."""

    def __init__(self, daemon: Daemon) -> None:
        """Made by `serving`."""
        self._daemon = daemon

    def file(self, name: str) -> Path:
        """Return the file of the mount that guests open for a disk.

        The event loop must not touch it: it is the loop that would have to answer. Use `trio.Path`, or a thread.
        """
        return self._daemon.options.mountpoint / self._daemon.disks[name].name

    def status(self) -> DaemonStatus:
        """Return what ``fusemig status --json`` shows."""
        return daemon_status(self._daemon)

    def disk(self, name: str) -> TrackedDisk | None:
        """Return the guest's side of a disk, with its counters, gate and marks; None while it is still to come."""
        return self._daemon.disks[name].disk

    async def migrate(
        self,
        uri: str,
        disks: Sequence[str] | None = None,
        *,
        max_bandwidth: int | None = None,
        downtime_limit_s: float | None = None,
    ) -> MigrationStatistics:
        """Move disks to the destination at ``uri``; return when it has proved that it holds them and owns them.

        Args:
            uri: such as ``tcp:HOST:PORT``; TLS follows `ServeOptions`.
            disks: their names; None: all that are writable.
            max_bandwidth: bytes per second, 0 for unlimited; None leaves it as it is.
            downtime_limit_s: the longest freeze that may be expected; None leaves it as it is.

        Raises:
            FusemigError: it ended otherwise. The disks are here and writable, but with an `InDoubtError`.
            ConfigError: there is no such disk.

        Cancellation: calls it off as long as that is possible, and waits for its end, within its deadlines.
        """
        migrator = self._daemon.migrator
        for name in disks or ():
            if name not in self._daemon.disks:
                raise ConfigError(f"there is no disk '{name}'; disks are {', '.join(sorted(self._daemon.disks))}")
        if max_bandwidth is not None:
            migrator.parameters.max_bandwidth = max_bandwidth
        if downtime_limit_s is not None:
            migrator.parameters.downtime_limit_s = downtime_limit_s
        migrator.migrate(uri, disks)
        migration = migrator.migration
        assert migration is not None
        try:
            await migration.wait_over()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await migration.wind_down()
            raise
        if migration.error is not None:
            raise migration.error
        return migration.statistics()


@asynccontextmanager
async def serving(options: ServeOptions) -> AsyncIterator[Server]:
    """Serve disks while the body runs; it begins when every file can be opened.

    A process has one mount, so one such block at a time. Signals stay the program's own if ``options.heeds_signals`` is
    False: then SIGINT is KeyboardInterrupt, as in any program.

    Raises:
        FusemigError: they cannot be served, and why.

    Resource handling: when the block is left, however that was, a migration has ended, nothing is mounted or listening,
    and the images are synced and closed.
    """
    try:
        async with trio.open_nursery() as nursery:
            daemon = Daemon(options)
            nursery.start_soon(daemon.run)
            await daemon.wait_ready()
            try:
                yield Server(daemon)
            finally:
                daemon.stop("host-qmp-quit")
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None
