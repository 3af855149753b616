"""QemuRuntime: a guest that moves from one QEMU to another, which move its memory and its devices themselves.

What is asked of the two, over QMP:

                         source                                         destination
    prepare              query-status: running or paused                query-status: inmigrate; query-block: same sizes
    begin_copy           pause-before-switchover, events on; migrate    late-block-activate on; stop (no autostart)
    wait_standstill      MIGRATION pre-switchover                       still there
    load                 migrate-continue; MIGRATION completed          query-migrate completed, query-status paused
    run_there                                                           cont; query-status running
    run_here             migrate_cancel; cont unless it runs by itself  quit, if it may hold a copy of the guest

Why the destination cannot spoil a disk before it owns it: `stop` keeps it from starting the guest when the memory has
come, and late-block-activate from opening the images for writing (and locking them) before `cont`. Why the source
cannot run by itself after `load`: a QEMU whose migration has completed is in ``postmigrate`` and only leaves it by
`cont`; one whose migration fails resumes the guest unasked, which is right for as long as the disks are there.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog
import trio

from fusemig.control.client import QmpError, Server, open_control
from fusemig.errors import ConfigError, FusemigError, MigrationError, StateError
from fusemig.runtimes.move import FALL_BACK_DEADLINE_S, RUN_DEADLINE_S
from fusemig.tasks import run_beside

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fusemig.control.client import ControlClient

log = structlog.get_logger(__name__)

_POLL_S: Final = 0.01
_WATCH_S: Final = 0.2
_MUTE: Final = "QEMU serves one client per socket, so give it a -qmp socket of its own for fusemig"
_OVER: Final = frozenset({"completed", "failed", "cancelled"})
_QEMU: Final = partial(
    Server,
    if_absent="is QEMU running with -qmp unix:{path},server=on,wait=off?",
    if_mute=_MUTE,
    if_refused="run fusemig as the user of QEMU, or as root",
    if_lost="it has ended, or another client took its place",
)
SOURCE: Final = _QEMU("the QEMU at the source")
DESTINATION: Final = _QEMU("the QEMU at the destination")


@dataclass(frozen=True)
class QemuOptions:
    """Where the two QEMUs are."""

    source: Path
    """QMP socket of the QEMU that runs the guest."""
    destination: Path
    """QMP socket of the QEMU that waits for it with ``-incoming``."""
    uri: str | None = None
    """Where the memory goes to, in QEMU's words; None: where the destination says that it listens."""


class QemuRuntime:
    """The guest of one QEMU and the other QEMU that waits for it."""

    name = "qemu"
    fall_back_deadline_s = FALL_BACK_DEADLINE_S
    run_deadline_s = RUN_DEADLINE_S

    def __init__(self, options: QemuOptions) -> None:
        """Nothing is connected before `prepare`."""
        self._options = options
        self._connections = AsyncExitStack()
        self._source: ControlClient
        self._destination: ControlClient
        self._was_running = True
        self._capabilities: dict[str, bool] = {}
        """The source's, as they were before we set some."""
        self._is_begun = False
        """Whether the memory may have begun to move."""

    async def prepare(self) -> None:
        """Connect to both and compare them."""
        options = self._options
        self._source = await self._connections.enter_async_context(open_control(options.source, server=SOURCE))
        self._destination = await self._connections.enter_async_context(
            open_control(options.destination, server=DESTINATION)
        )
        await self._check_states()
        _compare_disks(await self._source.execute("query-block"), await self._destination.execute("query-block"))

    async def _check_states(self) -> None:
        state = await _run_state(self._source)
        if state not in ("running", "paused"):
            raise StateError(f"the QEMU at the source is {state}: it must be running, or paused, to be moved")
        status = (await self._source.execute("query-migrate")).get("status", "none")
        if status not in _OVER | {"none"}:
            raise StateError(f"the QEMU at the source is migrating already ({status}): cancel that first")
        self._was_running = state == "running"
        there = await _run_state(self._destination)
        if there != "inmigrate":
            raise StateError(
                f"the QEMU at the destination is {there}: start it anew with -incoming, and as the guest's own QEMU "
                "was started otherwise"
            )

    async def begin_copy(self) -> None:
        """Have the source send its memory, and see that the destination will not run what comes."""
        await self._check_states()
        found = await self._source.execute("query-migrate-capabilities")
        self._capabilities = {one["capability"]: one["state"] for one in found}
        uri = await self._uri()
        self._is_begun = True
        await _set_capabilities(self._destination, {"late-block-activate": True})
        await self._destination.execute("stop")
        await _set_capabilities(self._source, {"pause-before-switchover": True, "events": True})
        await self._source.execute("migrate", {"uri": uri})

    async def _uri(self) -> str:
        """Return where the destination listens, having it listen there if it does not yet."""
        uri = self._options.uri
        if uri is None:
            return _listening_address(await self._destination.execute("query-migrate"))
        with suppress(QmpError):  # it listens already, unless it was started with `-incoming defer`
            await self._destination.execute("migrate-incoming", {"uri": uri})
        return uri

    async def wait_standstill(self) -> None:
        """Wait for pre-switchover, where QEMU has stopped the guest, and drained and flushed its disks."""
        await run_beside(partial(self._wait_source, "pre-switchover"), self._watch_destination)

    async def _wait_source(self, wanted: str) -> None:
        """Wait until the source's migration has come to ``wanted``; any other end of it raises."""
        while True:
            event = await self._source.next_event()
            if event.name != "MIGRATION":
                continue
            status = event.data["status"]
            if status == wanted:
                return
            if status in _OVER:
                why = (await self._source.execute("query-migrate")).get("error-desc", "see QEMU's log")
                raise MigrationError(f"QEMU's own migration of the guest's memory ended as {status}: {why}")

    async def _watch_destination(self) -> None:
        """Notice when the destination goes away."""
        while True:
            await _run_state(self._destination)
            await trio.sleep(_WATCH_S)

    async def load(self) -> None:
        """Send the rest, and hear from both that it has come."""
        await self._source.execute("migrate-continue", {"state": "pre-switchover"})
        await run_beside(partial(self._wait_source, "completed"), self._watch_destination)
        while (status := (await self._destination.execute("query-migrate")).get("status", "none")) != "completed":
            if status in _OVER:
                raise MigrationError(f"the QEMU at the destination could not load the guest ({status}): see its log")
            await trio.sleep(_POLL_S)
        # It becomes "paused" a moment after it has said "completed".
        while (state := await _run_state(self._destination)) != "paused":
            if state != "inmigrate":
                raise MigrationError(
                    f"the QEMU at the destination is {state} where it should be paused: somebody else controls it too"
                )
            await trio.sleep(_POLL_S)

    async def run_there(self) -> None:
        """Have the destination open its images for writing and run the guest, if it ran before."""
        if not self._was_running:
            return
        await self._destination.execute("cont")
        if (state := await _run_state(self._destination)) != "running":
            raise MigrationError(f"the QEMU at the destination is {state} after `cont`: see its log")

    async def run_here(self) -> None:
        """End QEMU's migration, whatever has become of it, and have the guest run."""
        if not self._is_begun:
            return
        with suppress(FusemigError):  # the copy there is of no use, and must never run beside the guest
            await self._destination.execute("quit", deadline_s=1)
        # The old connection may have been left inside a request; QEMU takes one client at a time.
        await self._connections.aclose()
        async with open_control(self._options.source, server=SOURCE) as source:
            await source.execute("migrate_cancel")
            await _wait_migration_over(source)
            if self._was_running:
                await _run(source)
            await _set_capabilities(
                source, {name: self._capabilities[name] for name in ("pause-before-switchover", "events")}
            )

    async def release(self) -> None:
        """Close both connections."""
        await self._connections.aclose()


async def _run_state(qemu: ControlClient) -> str:
    state: str = (await qemu.execute("query-status"))["status"]
    return state


async def _wait_migration_over(qemu: ControlClient) -> None:
    while True:
        if (await qemu.execute("query-migrate")).get("status", "none") in _OVER | {"none"}:
            return
        await trio.sleep(_POLL_S)


async def _run(qemu: ControlClient) -> None:
    """Have a QEMU run whose migration is over; one that was cancelled in time does so by itself."""
    while (state := await _run_state(qemu)) != "running":
        if state != "finish-migrate":  # it is about to decide
            await qemu.execute("cont")
        await trio.sleep(_POLL_S)


async def _set_capabilities(qemu: ControlClient, states: dict[str, bool]) -> None:
    capabilities = [{"capability": name, "state": is_on} for name, is_on in states.items()]
    await qemu.execute("migrate-set-capabilities", {"capabilities": capabilities})


def _listening_address(info: dict[str, Any]) -> str:
    """Return the address of a QEMU that waits, from its ``query-migrate`` (QAPI SocketAddress)."""
    addresses = [address for address in map(_address, info.get("socket-address", [])) if address]
    if len(addresses) != 1:
        raise ConfigError(
            "where the QEMU at the destination listens for the guest's memory is not known: give --guest-uri, such as "
            "tcp:HOST:PORT, where it was started with -incoming tcp:0:PORT or with -incoming defer"
        )
    return addresses[0]


def _address(found: dict[str, Any]) -> str:
    if found["type"] == "unix":
        return f"unix:{found['path']}"
    if found["type"] == "inet" and found["host"] not in ("0.0.0.0", "::", ""):  # noqa: S104  (compared, not bound)
        host = f"[{found['host']}]" if ":" in found["host"] else found["host"]
        return f"tcp:{host}:{found['port']}"
    return ""


def _compare_disks(ours: Iterable[dict[str, Any]], theirs: Iterable[dict[str, Any]]) -> None:
    """See that the destination has a disk of the same size for each of the guest's.

    A QEMU asks for the size of a disk when it opens it, so one that was started before the image had its size gives
    the guest an empty disk.
    """
    sizes = _sizes(theirs)
    for name, size in _sizes(ours).items():
        if name not in sizes:
            raise StateError(f"the QEMU at the destination has no disk '{name}': start it as the source's, + -incoming")
        if sizes[name] != size:
            raise StateError(
                f"disk '{name}' has {sizes[name]} bytes in the QEMU at the destination and {size} here: its image must "
                "have its size before that QEMU is started (`truncate -s SIZE IMAGE` before `fusemig serve "
                "--incoming`)"
            )


def _sizes(blocks: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Return the size of each medium of ``query-block``, by the drive's or the device's name."""
    return {
        block["device"] or block.get("qdev", ""): block["inserted"]["image"]["virtual-size"]
        for block in blocks
        if "inserted" in block
    }
