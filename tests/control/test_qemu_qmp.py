"""QEMU's own clients, the ``qemu.qmp`` library and ``qmp-shell``, and QEMU itself as the measure of our replies."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from fusemig.control.server import Command, EventHub, serve_control
from fusemig.qmp import schema

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

DEADLINE_S = 60.0
QEMU = "qemu-system-x86_64"


@pytest.fixture
def sock() -> Iterator[Path]:
    """A path short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="fusemig-") as directory:
        yield Path(directory) / "control.sock"


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[None]:
    """A server with a command that emits events."""
    events = EventHub(lambda: True)

    def migrate(_session: object, _arguments: schema.Migrate) -> None:
        events.emit("MIGRATION", schema.MigrationEvent(status=schema.MigrationStatus.SETUP))
        events.emit("MIGRATION_PASS", schema.MigrationPassEvent(pass_=1))
        events.emit("STOP")

    commands = {
        name: Command(declared, lambda *_: None)
        for name, declared in schema.COMMANDS.items()
        if name not in ("qmp_capabilities", "query-version", "query-commands", "query-events", "query-qmp-schema")
    }
    commands["migrate"] = Command(schema.Migrate, migrate)
    commands["query-migrate"] = Command(
        schema.NoArguments, lambda *_: schema.MigrationInfo(status=schema.MigrationStatus.ACTIVE)
    )
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve_control, path, commands, events))
            yield
            nursery.cancel_scope.cancel()


async def test_qemu_qmp_library(sock: Path) -> None:
    """Greeting, negotiation, replies, errors with our extra member, and events, through asyncio in a thread."""
    qmp = pytest.importorskip("qemu.qmp")

    async def drive() -> dict[str, Any]:
        client = qmp.QMPClient("test")
        seen: dict[str, Any] = {}
        await client.connect(str(sock))
        try:
            with client.listener() as listener:
                seen["version"] = await client.execute("query-version")
                seen["commands"] = await client.execute("query-commands")
                seen["migrate"] = await client.execute("migrate", {"uri": "tcp:h:1"})
                seen["query"] = await client.execute("query-migrate")
                seen["events"] = [(await listener.get())["event"] for _ in range(3)]
                try:
                    await client.execute("migrate", {"uri": 1})
                except qmp.ExecuteError as error:
                    seen["error"] = (error.error_class, str(error))
        finally:
            await client.disconnect()
        return seen

    async with serving(sock):
        seen = await trio.to_thread.run_sync(lambda: asyncio.run(asyncio.wait_for(drive(), DEADLINE_S / 2)))
    assert seen["version"]["package"].startswith("fusemig ")
    assert {item["name"] for item in seen["commands"]} == set(schema.COMMANDS)
    assert seen["migrate"] == {}
    assert seen["query"] == {"status": "active"}
    assert seen["events"] == ["MIGRATION", "MIGRATION_PASS", "STOP"]
    assert seen["error"] == ("GenericError", "Invalid parameter type for 'uri', expected: string")


async def test_qmp_shell(sock: Path) -> None:
    """The shell that QEMU's documentation tells people to use."""
    shell = Path(sys.executable).with_name("qmp-shell")
    if not shell.exists():
        pytest.skip("qmp-shell is not installed beside this Python")
    async with serving(sock):
        with trio.fail_after(DEADLINE_S / 2):
            done = await trio.run_process(
                [str(shell), "-v", str(sock)],
                stdin=b"query-migrate\nmigrate uri=tcp:h:1\nmigrate uri=tcp:h:1 bad=1\nquit\n",
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
    output = done.stdout.decode()
    assert "Connected to QEMU 7.2.0" in output, done.stderr.decode()
    assert '"status": "active"' in output
    assert "Parameter 'bad' is unexpected" in output


BAD_INPUTS = [
    '{"execute":"query-status"}',
    '{"execute":"qmp_capabilities","id":{"a":[1,null]}}',
    '{"execute":"qmp_capabilities"}',
    '{"execute":"nosuch","id":"x"}',
    '{"execute":"migrate"}',
    '{"execute":"migrate","arguments":{"uri":1}}',
    '{"execute":"migrate","arguments":{"uri":"x","bad":1}}',
    '{"execute":"migrate-continue","arguments":{"state":"bad"}}',
    '{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"events"}]}}',
    '{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"nope","state":true}]}}',
    '{"execute":"migrate-set-capabilities","arguments":{"capabilities":[1]}}',
    '{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":"x"}}',
    '{"execute":"query-status","arguments":[]}',
    '{"execute":"query-status","arguments":{"x":1}}',
    '{"execute":"query-status","extra":1,"id":5}',
    '{"execute":1}',
    '{"id":3}',
    "[]",
    "5",
    "}",
    '{"execute":"a","execute":"b"}',
]

LATER_TEXTS = {"need either 'uri' or 'channels' argument": "Parameter 'uri' is missing"}
"""What later versions say in place of 7.2's text: since 8.2 `channels` may take the place of ``uri``."""


@pytest.mark.qemu
async def test_errors_are_qemus(sock: Path) -> None:
    """The same bad input to QEMU and to us: the same class, text and id."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    command = [QEMU, "-M", "none,accel=tcg", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"]
    text = "".join(f"{line}\n" for line in BAD_INPUTS)
    expected = await trio.to_thread.run_sync(
        lambda: (
            subprocess.run(
                command, input=text + '{"execute":"quit"}\n', capture_output=True, text=True, timeout=30, check=True
            ).stdout
        )
    )
    async with serving(sock), await trio.open_unix_socket(sock) as stream:
        await stream.send_all(text.encode())
        await stream.send_eof()
        answer = b"".join([data async for data in stream])
    ours = [json.loads(line) for line in answer.splitlines()][1:]
    qemus = [json.loads(line) for line in expected.splitlines()][1 : len(ours) + 1]
    for reply in ours:
        reply.get("error", {}).pop("x-fusemig-kind", None)
    for reply in qemus:
        if "error" in reply:
            reply["error"]["desc"] = LATER_TEXTS.get(reply["error"]["desc"], reply["error"]["desc"])
    assert ours == qemus
    assert len(ours) == len(BAD_INPUTS)


GARBAGE = [
    b"garbage\n",
    b"GET / HTTP/1.1\r\n",
    b"nan ",
    b"5\n",
    b"-1 2 true null\n",
    b'"x"\n',
    b"\x00",
    b"\x1f\x00\x01",
    b"\xff",
    b"\xfe\xff",
    b"{\xff\xff",
    b"\xc3\xa9\n",
    b'{"execute":"st\xff',
    b'{"execute":"a\x01',
    b'{"execute":"a\tb\x00',
    b'[[[{"a":[\x1b',
    b'{"execute":"query-name"}}',
    b'{"execute":"query-name","id":"\xe9"}',
    b'{"execute":"query-name","id":1}{"execute":"query-name","id":2}  {"execute":"query-name"}',
    b"}{}",
    b",:]",
]
"""Each is followed by a good request."""


@pytest.mark.qemu
@pytest.mark.parametrize("cut", [10_000, 1], ids=["whole", "cut into bytes"])
async def test_garbage_is_answered_as_qemu_answers_it(sock: Path, cut: int) -> None:
    """Control bytes, 0xFF, words, half requests, several in a packet: QEMU's replies, and the next is understood."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    theirs = sock.with_name("qemu.sock")
    command = [QEMU, "-M", "none,accel=tcg", "-nodefaults", "-display", "none", "-S"]
    command += ["-qmp", f"unix:{theirs},server=on,wait=off"]

    async def converse(path: Path) -> list[list[Any]]:
        answers: list[list[Any]] = []
        async with await trio.open_unix_socket(path) as stream:
            lines = _Lines(stream)
            await lines.next()
            await stream.send_all(b'{"execute":"qmp_capabilities"}')
            await lines.next()
            for number, garbage in enumerate(GARBAGE):
                sent = garbage + b'{"execute":"query-name","id":"%d"}' % number
                for at in range(0, len(sent), cut):
                    await stream.send_all(sent[at : at + cut])
                answers.append([])
                while True:
                    reply = await lines.next()
                    reply.get("error", {}).pop("x-fusemig-kind", None)
                    if reply.get("id") == str(number):
                        break
                    answers[-1].append(reply)
        return answers

    async with serving(sock), trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(partial(trio.run_process, command, check=False))
        with trio.fail_after(DEADLINE_S / 2):
            while not theirs.exists():
                await trio.sleep(0.02)
            expected, ours = await converse(theirs), await converse(sock)
        process.terminate()
    different = [row for row in zip(GARBAGE, expected, ours, strict=True) if row[1] != row[2]]
    assert not different, "\n".join(map(str, different))


class _Lines:
    """The messages of a server."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = b""

    async def next(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = await self._stream.receive_some()
            assert data, "the server hung up"
            self._buffer += bytes(data)
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
