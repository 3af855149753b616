"""What a service manager hears of a daemon: one line of status, and signs of life that are proved each time.

A sign of life is sent when a name was looked up in the mount: the kernel asked, a lane read the request, the event loop
answered. The name does not exist, so no store is touched: a store that hangs is not mended by killing who serves it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import structlog
import trio
from msgspec import UnsetType

from fusemig.core.units import format_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from fusemig.notify import Notifier
    from fusemig.qmp import schema

STATUS_INTERVAL_S: Final = 2.0
_NOBODY: Final = ".fusemig-watchdog"

log = structlog.get_logger(__name__)


async def supervise(
    notifier: Notifier, status: Callable[[], schema.DaemonStatus], prove_life: Callable[[], Awaitable[None]]
) -> None:
    """Send what has changed, and signs of life at half of the time that is allowed; runs until cancelled."""
    if not notifier.is_on:
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tell_status, notifier, status)
        if notifier.watchdog_s is not None:
            nursery.start_soon(_show_life, notifier, notifier.watchdog_s / 2, prove_life)


async def _tell_status(notifier: Notifier, status: Callable[[], schema.DaemonStatus]) -> None:
    last = ""
    while True:
        line = describe(status())
        if line != last:
            notifier.send(f"STATUS={line}")
            last = line
        await trio.sleep(STATUS_INTERVAL_S)


async def _show_life(notifier: Notifier, interval_s: float, prove_life: Callable[[], Awaitable[None]]) -> None:
    while True:
        next_at = trio.current_time() + interval_s
        with trio.move_on_after(interval_s) as deadline:
            await prove_life()
        if deadline.cancelled_caught:
            log.error("the mount does not answer; the service manager is not told that all is well")
        else:
            notifier.send("WATCHDOG=1")
        await trio.sleep_until(next_at)


async def ask_mount(mountpoint: Path) -> None:
    """Return when the mount has answered; the thread is left behind if it does not."""
    await trio.to_thread.run_sync(_look_up, mountpoint / _NOBODY, abandon_on_cancel=True)


def _look_up(path: Path) -> None:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return


def describe(status: schema.DaemonStatus) -> str:
    """Return the daemon's state in one line for people."""
    n_disks = len(status.disks)
    parts = [f"{n_disks} disk{'s' * (n_disks != 1)}, {status.status.value}"]
    doubtful = [disk.name for disk in status.disks if not isinstance(disk.in_doubt, UnsetType)]
    if doubtful:
        parts.append(f"IN DOUBT who owns {', '.join(doubtful)}: see fusemig resolve --help")
    migration = status.migration
    if not isinstance(migration, UnsetType):
        own = migration.x_fusemig
        assert not isinstance(own, UnsetType)
        text = f"migration ({own.role.value}): {own.phase}"
        if own.phase not in ("completed", "failed", "cancelled") and not isinstance(migration.disk, UnsetType):
            text += f", pass {own.pass_}, {format_size(migration.disk.remaining)} pending"
        if not isinstance(migration.error_desc, UnsetType):
            text += f": {migration.error_desc}"
        parts.append(text)
    return "; ".join(parts).replace("\n", " ")
