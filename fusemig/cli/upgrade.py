"""``fusemig upgrade``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import trio

from fusemig.cli.output import print_json
from fusemig.control.client import open_control
from fusemig.errors import ConnectionLostError, TransportError

if TYPE_CHECKING:
    from pathlib import Path

AGREE_DEADLINE_S: Final = 60.0
SUCCESSOR_DEADLINE_S: Final = 30.0
_PAUSE_S: Final = 0.01


async def upgrade_command(socket: Path, as_json: bool) -> None:
    """Have the installed version take over, and say how long guests waited.

    Raises:
        FusemigError: it did not, and why; or the successor does not answer.
    """
    async with open_control(socket) as control:
        before: int = (await control.execute("x-fusemig-status"))["pid"]
        await control.execute("x-fusemig-upgrade", deadline_s=AGREE_DEADLINE_S)
    status = await _successor(socket, before)
    succession = status["succession"]
    result = {
        "from": succession["predecessor"],
        "to": status["version"],
        "pid": status["pid"],
        "pause-ms": round(succession["pause-ms"], 3),
    }
    if as_json:
        print_json(result)
        return
    print(
        f"fusemig: {result['from']} was succeeded by {result['to']}; guests waited {result['pause-ms']:.1f} ms",
        file=sys.stderr,
    )


async def _successor(socket: Path, before: int) -> dict[str, Any]:
    """Return the status of the daemon after the one with the process id ``before``."""
    with trio.move_on_after(SUCCESSOR_DEADLINE_S):
        while True:
            try:
                async with open_control(socket, SUCCESSOR_DEADLINE_S) as control:
                    status: dict[str, Any] = await control.execute("x-fusemig-status")
                    if status["pid"] != before and "pause-ms" in status.get("succession", {}):
                        return status
            except TransportError:
                pass  # the former one was still letting go, or this one is not serving yet
            await trio.sleep(_PAUSE_S)
    raise ConnectionLostError(
        f"the successor at '{socket}' does not answer after {SUCCESSOR_DEADLINE_S:g} s: see its log; guests wait, and"
        " nothing is lost"
    )
