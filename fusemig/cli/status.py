"""``fusemig status``, ``cancel``, ``continue`` and ``postcopy``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from fusemig.cli.output import print_json
from fusemig.cli.pacing import notes as pacing_notes
from fusemig.control.client import open_control
from fusemig.core.units import format_size

if TYPE_CHECKING:
    from pathlib import Path


async def status_command(socket: Path, as_json: bool) -> None:
    """Show what the daemon says of itself."""
    async with open_control(socket) as control:
        status = await control.execute("x-fusemig-status")
    if as_json:
        print_json(status)
        return
    for line in _describe(status):
        print(line)


def _describe(status: dict[str, Any]) -> list[str]:
    lines = [f"{status['status']}  fusemig {status['version']}  pid {status['pid']}  at {status['mountpoint']}"]
    for disk in status["disks"]:
        size = format_size(disk["size"]) if disk["size"] else "size unknown"
        notes = [disk["state"], disk["gate"]]
        if "epoch" in disk:
            notes.append(f"epoch {disk['epoch']}")
        if disk["parked-writes"]:
            notes.append(f"{disk['parked-writes']} writes parked")
        if disk["io-error"]:
            notes.append("I/O ERROR")
        lines.append(f"  {disk['name']:16} {size:>12}  {', '.join(notes)}  {disk['path']}")
        if "in-doubt" in disk:
            lines.append(f"    IN DOUBT who owns it: {disk['in-doubt']}")
    if "incoming" in status:
        incoming = status["incoming"]
        lines.append(f"  incoming at {incoming['uri']}: {incoming['status']}")
        if "error-desc" in incoming:
            lines.append(f"    last error: {incoming['error-desc']}")
    if "web" in status:
        lines.append(f"  page at {status['web']}, token for its buttons in {status['web-token']}")
    if "migration" in status:
        migration = status["migration"]
        own = migration["x-fusemig"]
        lines.append(
            f"  migration ({own['role']}): {migration['status']}, phase {own['phase']}, pass {own['pass']}, "
            + ", ".join([f"{format_size(migration['disk']['remaining'])} pending", *pacing_notes(own)])
            + (f", about {own['eta'] / 1000:.0f} s left" if "eta" in own else "")
            + (", does not converge" if own.get("converges") is False else "")
        )
        if "error-desc" in migration:
            lines.append(f"    {migration['error-desc']}")
    return lines


async def cancel_command(socket: Path) -> None:
    """Call the running migration off."""
    async with open_control(socket) as control:
        if (await control.execute("query-migrate")).get("status") in (None, "completed", "failed", "cancelled"):
            print("fusemig: no migration is running", file=sys.stderr)
            return
        await control.execute("migrate_cancel")
    print("fusemig: cancelling; the disks stay here", file=sys.stderr)


async def continue_command(socket: Path) -> None:
    """Let a migration that waits at pre-switchover go on."""
    async with open_control(socket) as control:
        await control.execute("migrate-continue", {"state": "pre-switchover"})


async def postcopy_command(socket: Path) -> None:
    """Have the running migration hand over at once; what is missing then is fetched."""
    async with open_control(socket) as control:
        await control.execute("migrate-start-postcopy")
    print("fusemig: handing over; both hosts are needed until the destination has fetched the rest", file=sys.stderr)
