"""QMP scripts that a QEMU and a fusemig are put through alike, and what may differ in their answers.

A scenario talks to two servers, a source and a destination that was started with ``--incoming defer`` (``-incoming
defer``), through the `qemu.qmp` library. Its outcome is a `Transcript`: one can be recorded from a real QEMU
(`tools/capture_qmp` keeps those in ``tests/vectors/qmp``) or played live, and `differences` compares it with ours:

1. a command that fails there fails here, with the same class, and our text begins with QEMU's;
2. every member that QEMU returns is there, with the same JSON type, but for `OMITTED`; ours alone are `ADDED` or begin
   with ``x-fusemig``; what is in `SAME_VALUE` is equal;
3. the events come in the same order with the same data. MIGRATION_PASS counts looks at RAM there and passes over the
   disks here, so only the first one is compared.
"""

# ruff: noqa: SIM905  (a list of words is easier to compare with QEMU's)

from __future__ import annotations

import asyncio
import subprocess
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from qemu.qmp import ExecuteError, QMPClient, QMPError

from support.hosts import MIB, wait_until, write_random
from support.qemu import MACHINE, PROGRAM

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from qemu.qmp.events import EventListener

Side = Literal["source", "destination"]
URI: Final = "{uri}"
"""Stands for where the destination listens."""
DEADLINE_S: Final = 60.0
DISK_BYTES: Final = 4 * MIB

BOTH_TURNED_ON: Final = ("events", "return-path")


class Step(NamedTuple):
    """A command, and the event to wait for after its reply (MIGRATION with this status)."""

    side: Side
    execute: str
    arguments: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    wait_for: str = ""


def _capabilities(*names: str) -> dict[str, Any]:
    return {"capabilities": [{"capability": name, "state": True} for name in names]}


_QUERIES = (
    "query-version query-name query-uuid query-status query-block query-blockstats query-block-jobs "
    "query-named-block-nodes query-migrate query-migrate-parameters query-migrate-capabilities"
).split()
_ARRANGEMENTS = (
    Step("destination", "migrate-set-capabilities", _capabilities(*BOTH_TURNED_ON)),
    Step("source", "migrate-set-capabilities", _capabilities(*BOTH_TURNED_ON)),
    # QEMU might end too early otherwise (docs/wire-qemu.md).
    Step("source", "migrate-set-parameters", {"downtime-limit": 1, "max-bandwidth": 500 << 20}),
    Step("destination", "migrate-incoming", {"uri": URI}),
)
_MIGRATE = {"uri": URI, "blk": True}

SCENARIOS: Final[dict[str, tuple[Step, ...]]] = {
    "queries": (
        *(Step("source", name) for name in _QUERIES),
        *(Step("destination", name) for name in ("query-status", "query-migrate")),
        *(
            Step("source", "human-monitor-command", {"command-line": line})
            for line in ("info status", "info block", "info migrate", "info nosuch", "nosuch", "")
        ),
        Step("source", "human-monitor-command", {"command-line": "info status", "cpu-index": 0}),
        Step("source", "migrate_cancel"),
        Step("source", "quit"),
    ),
    "errors": (
        Step("source", "nosuch"),
        Step("source", "qmp_capabilities"),
        Step("source", "migrate"),
        Step("source", "migrate", {"uri": "tcp:127.0.0.1:1", "bad": 1}),
        Step("source", "migrate-continue", {"state": "pre-switchover"}),
        Step("source", "migrate", {"uri": "bogus:1"}),
        Step("source", "migrate-pause"),
        Step("source", "migrate-incoming", {"uri": URI}),
        Step("source", "migrate-set-capabilities", {"capabilities": [{"capability": "nope", "state": True}]}),
        Step("source", "migrate-set-parameters", {"max-bandwidth": "x"}),
        Step("source", "human-monitor-command"),
        Step("source", "human-monitor-command", {"command-line": "info status", "cpu-index": 7}),
        Step("source", "query-status", {"x": 1}),
        # QEMU sends `setup` of an incoming migration also without that.
        Step("destination", "migrate-set-capabilities", _capabilities("events")),
        Step("destination", "migrate", {"uri": "tcp:127.0.0.1:1"}),
        Step("destination", "migrate-incoming", {"uri": URI}),
        Step("destination", "migrate-incoming", {"uri": URI}),
    ),
    "stop-and-cont": (
        Step("source", "stop"),
        Step("source", "query-status"),
        Step("source", "stop"),
        Step("source", "human-monitor-command", {"command-line": "info status"}),
        Step("source", "cont"),
        Step("source", "cont"),
        Step("source", "query-status"),
        Step("source", "quit"),
    ),
    "migration": (
        *_ARRANGEMENTS,
        Step("source", "migrate", _MIGRATE, "completed"),
        Step("source", "query-migrate"),
        Step("source", "query-status"),
        Step("source", "migrate_cancel"),
        Step("source", "migrate-continue", {"state": "pre-switchover"}),
        Step("destination", "query-status"),
        Step("destination", "query-migrate"),
        Step("destination", "stop"),
        Step("destination", "cont"),
        Step("destination", "quit"),
        Step("source", "quit"),
    ),
    "migration-of-stopped-disks": (
        *_ARRANGEMENTS,
        Step("destination", "stop"),
        Step("destination", "query-status"),
        Step("source", "stop"),
        Step("source", "migrate", _MIGRATE, "completed"),
        Step("source", "query-status"),
        Step("destination", "query-status"),
        Step("destination", "cont"),
        Step("destination", "query-status"),
    ),
    "cancelled": (
        *_ARRANGEMENTS,
        Step("source", "migrate-set-parameters", {"max-bandwidth": 100 << 10}),
        Step("source", "migrate", _MIGRATE, "active"),
        Step("source", "query-migrate"),
        Step("source", "migrate", _MIGRATE),
        Step("source", "migrate-set-capabilities", _capabilities("events")),
        Step("source", "migrate_cancel", {}, "cancelled"),
        Step("source", "query-migrate"),
        Step("source", "query-status"),
    ),
    "failed": (
        Step("source", "migrate-set-capabilities", _capabilities("events")),
        Step("source", "migrate", {"uri": "unix:/nonexistent/socket", "blk": True}, "failed"),
        Step("source", "query-migrate"),
        Step("source", "query-status"),
    ),
}


class Transcript(NamedTuple):
    """What was said, without times."""

    steps: list[dict[str, Any]]
    """``side``, ``execute``, ``arguments``; then ``return`` or ``error``."""
    events: dict[str, list[dict[str, Any]]]
    """For each side in order: ``event`` and ``data``."""


async def play(steps: Sequence[Step], sockets: Mapping[Side, Path], uri: str) -> Transcript:
    """Put two servers through a scenario."""
    clients: dict[Side, QMPClient] = {side: QMPClient(side) for side in sockets}
    transcript = Transcript([], {side: [] for side in sockets})
    try:
        for side, client in clients.items():
            await client.connect(str(sockets[side]))
        with clients["source"].listener() as source, clients["destination"].listener() as destination:
            listeners: dict[Side, EventListener] = {"source": source, "destination": destination}
            for step in steps:
                arguments = {key: uri if value == URI else value for key, value in step.arguments.items()}
                said: dict[str, Any] = {"side": step.side, "execute": step.execute, "arguments": step.arguments}
                try:
                    said["return"] = await clients[step.side].execute(step.execute, arguments)
                except ExecuteError as error:
                    said["error"] = {"class": error.error_class, "desc": str(error)}
                transcript.steps.append(said)
                if step.execute == "quit" and "return" in said:
                    # Before anything else is sent: what cannot be sent ends the connection, with all that is unread.
                    await _wait_for_event("SHUTDOWN", listeners[step.side], transcript.events[step.side])
                if step.wait_for:
                    await _wait_for(step.wait_for, listeners[step.side], transcript.events[step.side])
                    if (there := _END_THERE.get(step.wait_for)) is not None:
                        await _wait_for(there, listeners["destination"], transcript.events["destination"])
                    await _wait_for_run_state(clients[step.side])
            for side, client in clients.items():
                # What came before this reply has been heard of by then. A server that has quit, or a QEMU that lost its
                # source, has said all.
                with suppress(QMPError):
                    await client.execute("query-status")
                while not listeners[side].empty():
                    transcript.events[side].append(_plain(await listeners[side].get()))
    finally:
        for client in clients.values():
            with suppress(OSError, EOFError):  # the server has gone
                await client.disconnect()
    return transcript


_END_THERE: Final = {"completed": "completed", "cancelled": "failed"}
"""How a migration that got under way ends at the destination, by its end at the source."""


async def _wait_for(status: str, listener: EventListener, heard: list[dict[str, Any]]) -> None:
    while (await _next_event(listener, heard)) != {"event": "MIGRATION", "data": {"status": status}}:
        pass


async def _wait_for_event(name: str, listener: EventListener, heard: list[dict[str, Any]]) -> None:
    while (await _next_event(listener, heard))["event"] != name:
        pass


async def _next_event(listener: EventListener, heard: list[dict[str, Any]]) -> dict[str, Any]:
    event = _plain(await asyncio.wait_for(listener.get(), DEADLINE_S))
    heard.append(event)
    return event


async def _wait_for_run_state(client: QMPClient) -> None:
    """QEMU says that a migration has ended before its own run state follows: the next question would be a race."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            status = await client.execute("query-status")
            if not isinstance(status, dict) or status["status"] != "finish-migrate":
                return
            await asyncio.sleep(0.01)


def _plain(event: Mapping[str, Any]) -> dict[str, Any]:
    assert event["timestamp"].keys() == {"seconds", "microseconds"}
    return {key: event[key] for key in ("event", "data") if key in event}


@contextmanager
def qemu_pair(directory: Path) -> Iterator[dict[Side, Path]]:
    """Run two QEMUs with a disk ``vda`` each; give their QMP sockets."""
    processes, sockets = [], {}
    sides: tuple[Side, ...] = ("source", "destination")
    try:
        for side in sides:
            image = write_random(directory / f"{side}.raw", DISK_BYTES)
            sockets[side] = directory / f"{side}.qmp"
            command = qemu_command(side, image.name, sockets[side].name)
            with (directory / f"{side}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(command, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                )
        wait_until(lambda: all(path.exists() for path in sockets.values()), "the sockets of two QEMUs")
        yield sockets
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait(DEADLINE_S)


def qemu_command(side: Side, image: str, socket: str) -> list[str]:
    """Return how a QEMU is started: running, with nothing but a disk."""
    command = [PROGRAM, "-M", f"{MACHINE},accel=tcg", "-m", "1", "-nodefaults", "-display", "none"]
    command += ["-drive", f"if=none,id=vda,file={image},format=raw", "-device", "virtio-blk-pci,drive=vda"]
    command += ["-qmp", f"unix:{socket},server=on,wait=off"]
    return [*command, "-incoming", "defer"] if side == "destination" else command


# Comparing

OMITTED: Final[dict[str, frozenset[str]]] = {
    # A guest's device, and the layer below a node: neither is known here.
    "query-block": frozenset({"qdev"}),
    "query-blockstats": frozenset({"qdev", "parent"}),
    # About RAM and CPUs. Setting one is refused: it is not declared.
    "query-migrate-parameters": frozenset(
        "cpu-throttle-tailslow xbzrle-cache-size cpu-throttle-initial announce-max decompress-threads compress-threads "
        "compress-level announce-initial compress-wait-thread announce-rounds announce-step multifd-zlib-level "
        "max-cpu-throttle max-postcopy-bandwidth throttle-trigger-threshold x-checkpoint-delay "
        "cpu-throttle-increment".split()
    ),
}
"""Members that QEMU 7.2 returns and we do not, at any depth of a command's result; docs/qemu.md says why."""

ADDED: Final[dict[str, frozenset[str]]] = {
    "query-name": frozenset({"name"}),
    "query-block": frozenset({"dirty-bitmaps"}),
    "query-named-block-nodes": frozenset({"dirty-bitmaps"}),
    # QEMU leaves `disk` out at the end, and `ram` on the receiving side.
    "query-migrate": frozenset({"disk", "ram", "downtime", "error-desc", "setup-time", "total-time"}),
}
"""Members of QAPI that we return where QEMU does not."""

SAME_VALUE: Final = frozenset(
    "status running singlestep type locked removable io-status drv format device capability UUID ro".split()
)


def differences(qemu: Transcript, ours: Transcript) -> list[str]:
    """Return where we differ from a QEMU more than we may; empty if nowhere."""
    found = []
    for theirs, mine in zip(qemu.steps, ours.steps, strict=True):
        what = f"{mine['side']} {mine['execute']} {mine['arguments']}"
        if ("error" in theirs) != ("error" in mine):
            found.append(f"{what}: {theirs} there, {mine} here")
        elif "error" in theirs:
            their_error, my_error = theirs["error"], mine["error"]
            if their_error["class"] != my_error["class"] or not my_error["desc"].startswith(their_error["desc"]):
                found.append(f"{what}: {their_error} there, {my_error} here")
        else:
            found += [f"{what}: {text}" for text in _compare(mine["execute"], theirs["return"], mine["return"])]
    for side in ("source", "destination"):
        their_events, my_events = _comparable(qemu.events[side]), _comparable(ours.events[side])
        if their_events != my_events:
            found.append(f"events of the {side}: {their_events} there, {my_events} here")
    return found


def _comparable(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] != "MIGRATION_PASS" or event["data"]["pass"] == 1]


def _compare(command: str, theirs: Any, mine: Any, path: str = "") -> Iterator[str]:
    if _kind(theirs) != _kind(mine):
        yield f"{path or 'result'} is {theirs!r} there and {mine!r} here"
    elif isinstance(theirs, dict):
        for name in theirs.keys() - mine.keys() - OMITTED.get(command, frozenset()):
            yield f"{path}.{name} is missing here"
        for name in mine.keys() - theirs.keys() - ADDED.get(command, frozenset()):
            if not name.startswith("x-fusemig"):
                yield f"{path}.{name} is not there in QEMU"
        for name in theirs.keys() & mine.keys():
            if name in SAME_VALUE and theirs[name] != mine[name]:
                yield f"{path}.{name} is {theirs[name]!r} there and {mine[name]!r} here"
            yield from _compare(command, theirs[name], mine[name], f"{path}.{name}")
    elif isinstance(theirs, list):
        if bool(theirs) != bool(mine):
            yield f"{path or 'result'} has {len(theirs)} elements there and {len(mine)} here"
        for their_element, my_element in zip(theirs, mine, strict=False):
            yield from _compare(command, their_element, my_element, f"{path}[]")


def _kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(type(value))
    return "number" if isinstance(value, int | float) else str(type(value))
