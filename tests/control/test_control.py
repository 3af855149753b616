"""The control socket: several clients, order, garbage, slow ones, shutdown; over real UNIX sockets."""

# ruff: noqa: ASYNC240  (looking at a file of a temporary directory does not block)

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import stat
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from fusemig.control import server as control
from fusemig.control.client import ControlClient, QmpError, open_control
from fusemig.control.server import Command, CommandError, DeviceNotFoundError, EventHub, serve_control
from fusemig.errors import ConfigError, ConnectError, ConnectionLostError, PeerRefusedError
from fusemig.qmp import schema

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from fusemig.control.server import Session

DEADLINE_S = 20.0
"""Only a hang meets it."""


class Daemon:
    """A small daemon: commands that succeed, fail, crash, wait."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_events_on = False
        self.events = EventHub(lambda: self.is_events_on)
        self.calls: list[str] = []
        self.may_finish = trio.Event()
        self.has_begun = trio.Event()
        self.has_finished = trio.Event()
        self.scope = trio.CancelScope()
        self.commands = {
            "query-name": Command(schema.NoArguments, lambda *_: schema.Name(name="test")),
            "query-block": Command(schema.NoArguments, self.device_not_found),
            "query-migrate": Command(schema.NoArguments, self.refused),
            "stop": Command(schema.NoArguments, self.crash),
            "cont": Command(schema.NoArguments, lambda *_: None),
            "query-status": Command(schema.NoArguments, lambda *_: object()),
            "migrate": Command(schema.Migrate, self.migrate),
            "migrate-pause": Command(schema.NoArguments, self.wait),
            "quit": Command(schema.NoArguments, self.quit),
            "x-fusemig-estimate": Command(schema.Estimate, lambda *_: {"text": "x" * 1_000_000}),
        }

    def device_not_found(self, _session: Session, _arguments: object) -> None:
        raise DeviceNotFoundError("drive0", ["vda"])

    def refused(self, _session: Session, _arguments: object) -> None:
        raise PeerRefusedError("the destination said no: give it a disk")

    async def crash(self, _session: Session, _arguments: object) -> None:
        raise ZeroDivisionError("secret")

    async def migrate(self, session: Session, arguments: schema.Migrate) -> None:
        assert session.pid == os.getpid()
        await trio.lowlevel.checkpoint()
        self.calls.append(arguments.uri)

    async def wait(self, _session: Session, _arguments: object) -> None:
        self.has_begun.set()
        await self.may_finish.wait()
        self.has_finished.set()

    def quit(self, _session: Session, _arguments: object) -> None:
        self.events.emit("SHUTDOWN", schema.ShutdownEvent())
        self.scope.cancel()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            await serve_control(self.path, self.commands, self.events, task_status=task_status)


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[Daemon]:
    """A daemon on a socket, stopped at the end."""
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            daemon = Daemon(path)
            await nursery.start(daemon.run)
            yield daemon
            nursery.cancel_scope.cancel()


class Raw:
    """A client that sends bytes and reads lines."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.buffer = b""

    async def line(self) -> dict[str, Any]:
        while b"\r\n" not in self.buffer:
            data = await self.stream.receive_some()
            if not data:
                raise EOFError
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\r\n")
        message: dict[str, Any] = json.loads(line)
        return message

    async def read_to_the_end(self) -> None:
        while True:
            await self.line()

    async def ask(self, text: str) -> dict[str, Any]:
        await self.stream.send_all(text.encode())
        return await self.line()


@asynccontextmanager
async def raw(path: Path, *, negotiate: bool = True) -> AsyncIterator[Raw]:
    """A raw client, greeted."""
    async with await trio.open_unix_socket(path) as stream:
        client = Raw(stream)
        assert "QMP" in await client.line()
        if negotiate:
            assert await client.ask('{"execute":"qmp_capabilities"}') == {"return": {}}
        yield client


@pytest.fixture
def sock() -> Iterator[Path]:
    """A path short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="fusemig-") as directory:
        yield Path(directory) / "control.sock"


async def test_negotiation(sock: Path) -> None:
    """First the capabilities, in QEMU's words, and only once."""
    async with serving(sock), raw(sock, negotiate=False) as client:
        reply = await client.ask('{"execute":"query-name"}')
        assert reply["error"]["class"] == "CommandNotFound"
        assert reply["error"]["desc"] == "Expecting capabilities negotiation with 'qmp_capabilities'"
        reply = await client.ask('{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}')
        assert reply["error"]["class"] == "GenericError"
        assert await client.ask('{"execute":"qmp_capabilities","id":1}') == {"return": {}, "id": 1}
        reply = await client.ask('{"execute":"qmp_capabilities"}')
        assert reply["error"]["class"] == "CommandNotFound"
        assert reply["error"]["desc"] == "Capabilities negotiation is already complete, command ignored"
        assert await client.ask('{"execute":"query-name"}') == {"return": {"name": "test"}}


async def test_commands_about_itself(sock: Path) -> None:
    """The server knows its commands, its events and its version."""
    async with serving(sock) as daemon, open_control(sock) as client:
        names = [item["name"] for item in await client.execute("query-commands")]
        own = {"qmp_capabilities", "query-version", "query-commands", "query-events", "query-qmp-schema"}
        assert names == sorted(own | daemon.commands.keys())
        assert {item["name"] for item in await client.execute("query-events")} == set(schema.EVENTS)
        assert (await client.execute("query-version"))["qemu"] == {"major": 7, "minor": 2, "micro": 0}


@pytest.mark.parametrize(
    ("command", "error_class", "text", "kind"),
    [
        ("nosuch", "CommandNotFound", "The command nosuch has not been found", "failed"),
        ("query-block", "DeviceNotFound", "Device 'drive0' not found; served are: vda", "usage"),
        ("query-migrate", "GenericError", "the destination said no: give it a disk", "refused"),
        ("migrate", "GenericError", "Parameter 'uri' is missing", "usage"),
        ("stop", "GenericError", "because of a bug in fusemig", "failed"),
        ("query-status", "GenericError", "because of a bug in fusemig", "failed"),
    ],
)
async def test_errors_cost_the_client_nothing(sock: Path, command: str, error_class: str, text: str, kind: str) -> None:
    """Every failure is an error reply with class, text and kind; the next command runs."""
    async with serving(sock), open_control(sock) as client:
        with pytest.raises(QmpError) as caught:
            await client.execute(command)
        assert caught.value.error_class == error_class
        assert text in caught.value.desc
        assert "secret" not in caught.value.desc
        assert caught.value.kind == kind
        assert await client.execute("query-name") == {"name": "test"}


async def test_commands_run_in_order(sock: Path) -> None:
    """Requests of one packet are answered one by one, ids and all."""
    uris = [f"tcp:h:{n}" for n in range(100)]
    async with serving(sock) as daemon, raw(sock) as client:
        text = "".join(json.dumps({"execute": "migrate", "arguments": {"uri": uri}, "id": {"n": uri}}) for uri in uris)
        await client.stream.send_all(text.encode())
        assert [await client.line() for _ in uris] == [{"return": {}, "id": {"n": uri}} for uri in uris]
        assert daemon.calls == uris


async def test_wrong_arguments_run_nothing(sock: Path) -> None:
    """The check comes before any effect."""
    async with serving(sock) as daemon, raw(sock) as client:
        reply = await client.ask('{"execute":"migrate","arguments":{"uri":"a","bad":1},"id":null}')
        assert reply["error"]["desc"] == "Parameter 'bad' is unexpected"
        assert reply["id"] is None
        assert daemon.calls == []


async def test_several_clients_do_not_wait_for_each_other(sock: Path) -> None:
    """A command that takes long holds up only its own client."""
    async with serving(sock) as daemon, raw(sock) as first, raw(sock) as second:
        await first.stream.send_all(b'{"execute":"migrate-pause","id":1}{"execute":"query-name","id":2}')
        await daemon.has_begun.wait()
        assert await second.ask('{"execute":"query-name"}') == {"return": {"name": "test"}}
        daemon.may_finish.set()
        assert (await first.line())["id"] == 1
        assert (await first.line())["id"] == 2


async def test_events_reach_negotiated_clients_only(sock: Path) -> None:
    """An event goes to all that negotiated, with a timestamp and in order."""
    async with serving(sock) as daemon, raw(sock) as first, raw(sock) as second, raw(sock, negotiate=False) as third:
        daemon.events.emit("STOP")
        daemon.events.emit("RESUME")
        for client in (first, second):
            event = await client.line()
            assert event["event"] == "STOP"
            assert event["timestamp"].keys() == {"seconds", "microseconds"}
            assert (await client.line())["event"] == "RESUME"
        assert await third.ask('{"execute":"qmp_capabilities"}') == {"return": {}}


async def test_migration_events_need_the_capability(sock: Path) -> None:
    """MIGRATION and MIGRATION_PASS are sent only while the capability is on; STOP always."""
    async with serving(sock) as daemon, raw(sock) as client:
        daemon.events.emit("MIGRATION", schema.MigrationEvent(status=schema.MigrationStatus.SETUP))
        daemon.events.emit("MIGRATION_PASS", schema.MigrationPassEvent(pass_=1))
        daemon.events.emit("STOP")
        daemon.is_events_on = True
        daemon.events.emit("MIGRATION", schema.MigrationEvent(status=schema.MigrationStatus.ACTIVE))
        daemon.events.emit("MIGRATION_PASS", schema.MigrationPassEvent(pass_=2))
        assert (await client.line())["event"] == "STOP"
        assert (await client.line())["data"] == {"status": "active"}
        assert (await client.line())["data"] == {"pass": 2}


async def test_events_of_a_command_precede_its_reply(sock: Path) -> None:
    """``quit``: SHUTDOWN, then the reply, then the end; both arrive though the server stops at once."""
    async with serving(sock), raw(sock) as client:
        shutdown = await client.ask('{"execute":"quit","id":9}')
        assert shutdown["event"] == "SHUTDOWN"
        assert shutdown["data"] == {"guest": False, "reason": "host-qmp-quit"}
        assert await client.line() == {"return": {}, "id": 9}
        with pytest.raises(EOFError):
            await client.line()


async def test_client_that_does_not_read_events_is_dropped(sock: Path) -> None:
    """Emitting never blocks; the slow one loses its connection, the others lose nothing."""
    async with serving(sock) as daemon, raw(sock) as slow, raw(sock) as quick:
        for _ in range(100 * control.OUTBOX_LINES):
            daemon.events.emit("STOP")
            assert (await quick.line())["event"] == "STOP"
        assert await quick.ask('{"execute":"query-name"}') == {"return": {"name": "test"}}
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await slow.read_to_the_end()


async def test_dropping_a_client_does_not_cancel_its_command(sock: Path) -> None:
    """What was begun is finished."""
    async with serving(sock) as daemon, raw(sock) as slow:
        await slow.stream.send_all(b'{"execute":"migrate-pause"}{"execute":"migrate","arguments":{"uri":"a"}}')
        await daemon.has_begun.wait()
        for _ in range(2 * control.OUTBOX_LINES):  # without a checkpoint: nothing can be sent in between
            daemon.events.emit("STOP")
        await trio.testing.wait_all_tasks_blocked()
        daemon.may_finish.set()
        await daemon.has_finished.wait()
        async with raw(sock) as other:
            await other.ask('{"execute":"query-name"}')
        assert daemon.calls == []


async def test_client_that_does_not_read_replies_is_dropped(sock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds up nobody, and what waits for it is bounded."""
    monkeypatch.setattr(control, "SEND_DEADLINE_S", 0.1)
    async with serving(sock), raw(sock) as slow, raw(sock) as quick:
        await slow.stream.send_all(b'{"execute":"x-fusemig-estimate","arguments":{"uri":"a"}}' * 50)
        assert await quick.ask('{"execute":"query-name"}') == {"return": {"name": "test"}}
        hung_up = select.poll()
        hung_up.register(slow.stream.socket.fileno(), 0)
        while not hung_up.poll(0):  # the client has read nothing
            await trio.sleep(0.01)
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await slow.read_to_the_end()


async def test_many_commands_at_once_leave_room_for_events(sock: Path) -> None:
    """A client that pipelines far more commands than its outbox holds is not taken for a slow one."""
    n = 4 * control.OUTBOX_LINES
    async with serving(sock) as daemon, raw(sock) as client:

        async def emit() -> None:
            for _ in range(50):
                daemon.events.emit("STOP")
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stream.send_all, b'{"execute":"cont"}' * n)
            nursery.start_soon(emit)
            lines = [await client.line() for _ in range(n + 50)]
        assert sum("return" in line for line in lines) == n


async def test_disconnect_during_a_command(sock: Path) -> None:
    """The command is finished, and so is what was sent after it; the server lives."""
    async with serving(sock) as daemon:
        async with raw(sock) as client:
            migrate = b'{"execute":"migrate","arguments":{"uri":"a"}}'
            await client.stream.send_all(b'{"execute":"migrate-pause"}' + migrate * 100)
            await daemon.has_begun.wait()
        await trio.testing.wait_all_tasks_blocked()
        daemon.may_finish.set()
        await daemon.has_finished.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert daemon.calls == ["a"] * 100
        async with raw(sock) as other:
            assert await other.ask('{"execute":"query-name"}') == {"return": {"name": "test"}}


async def test_half_closed_client_gets_its_replies(sock: Path) -> None:
    """``printf ... | socat`` closes its sending side first."""
    async with serving(sock), raw(sock) as client:
        await client.stream.send_all(b'{"execute":"query-name","id":1}{"execute":"query-name","id":2}')
        await client.stream.send_eof()
        assert (await client.line())["id"] == 1
        assert (await client.line())["id"] == 2
        with pytest.raises(EOFError):
            await client.line()


async def test_garbage_is_answered(sock: Path) -> None:
    """One reply without an id, and the client goes on."""
    async with serving(sock), raw(sock) as client:
        reply = await client.ask("GET / HTTP/1.1\r\n")
        assert reply == {
            "error": {"class": "GenericError", "desc": "JSON parse error, stray 'G'"},
        }
        assert await client.ask('\u00ff\n{"execute":"query-name"}') != {"return": {"name": "test"}}
        assert await client.line() == {"return": {"name": "test"}}


async def test_huge_request_ends_the_connection(sock: Path) -> None:
    """Over the cap: an error, then the end; the others live."""
    async with serving(sock), raw(sock) as client, raw(sock) as other:
        with pytest.raises(trio.BrokenResourceError):
            await client.stream.send_all(b'{"x":"' + b"x" * 10_000_000)
        assert "longer than 1048576" in (await client.line())["error"]["desc"]
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await client.line()
        assert await other.ask('{"execute":"query-name"}') == {"return": {"name": "test"}}


async def test_too_many_clients(sock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one too many is refused, and room is made when one goes."""
    monkeypatch.setattr(control, "MAX_CLIENTS", 2)
    async with serving(sock), raw(sock) as first:
        async with raw(sock):
            with pytest.raises((EOFError, trio.BrokenResourceError)):
                async with raw(sock):
                    pass
        await trio.testing.wait_all_tasks_blocked()
        async with raw(sock) as third:
            assert await third.ask('{"execute":"query-name"}') == await first.ask('{"execute":"query-name"}')


async def test_socket_is_private_and_removed(sock: Path) -> None:
    """Mode 0600, and nothing left at the end."""
    async with serving(sock):
        status = sock.lstat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600
    assert not sock.exists()


async def test_stale_socket_is_replaced(sock: Path) -> None:
    """What a killed daemon left is no obstacle."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(sock))
    async with serving(sock), raw(sock) as client:
        assert await client.ask('{"execute":"query-name"}') == {"return": {"name": "test"}}


async def test_second_server_is_refused(sock: Path) -> None:
    """A socket in use is left alone, and the first daemon serves on."""
    async with serving(sock):
        with pytest.raises(ConnectError, match="is in use: stop the daemon there"):
            await serve_control(sock, {}, EventHub(lambda: True))
        async with raw(sock) as client:
            assert await client.ask('{"execute":"query-name"}') == {"return": {"name": "test"}}


async def test_two_servers_do_not_replace_a_stale_socket_at_once(sock: Path) -> None:
    """While another process looks at the directory, we wait."""
    directory = os.open(sock.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_control, sock, {}, EventHub(lambda: True))
            for _ in range(10):
                await trio.sleep(0.01)
                assert not sock.exists()
            nursery.cancel_scope.cancel()
    finally:
        os.close(directory)
    async with serving(sock):
        assert sock.exists()


async def test_socket_of_a_successor_is_not_removed(sock: Path) -> None:
    """Only our own file is unlinked."""
    async with serving(sock):
        sock.unlink()
        sock.touch()
    assert sock.exists()


async def test_files_that_are_no_socket_are_left_alone(sock: Path) -> None:
    """A typo in --control must not cost a file."""
    sock.write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        await serve_control(sock, {}, EventHub(lambda: True))
    assert sock.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "error"), [("x" * 108, ConfigError), ("missing/control.sock", ConnectError)], ids=["long", "missing"]
)
async def test_impossible_paths(sock: Path, name: str, error: type[Exception]) -> None:
    """The error names the path."""
    with pytest.raises(error, match="control socket"):
        await serve_control(sock.parent / name, {}, EventHub(lambda: True))


async def test_shutdown_closes_clients(sock: Path) -> None:
    """Cancelling the server ends every connection and every running command."""
    async with serving(sock) as daemon, raw(sock) as idle, raw(sock) as busy:
        await busy.stream.send_all(b'{"execute":"migrate-pause"}')
        await daemon.has_begun.wait()
        daemon.scope.cancel()
        for client in (idle, busy):
            with pytest.raises(EOFError):
                await client.line()
        assert not daemon.has_finished.is_set()


async def test_shutdown_does_not_wait_for_a_slow_client(sock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its flush has a deadline of its own."""
    monkeypatch.setattr(control, "FLUSH_DEADLINE_S", 0.05)
    monkeypatch.setattr(control, "SEND_DEADLINE_S", 1000.0)
    async with serving(sock) as daemon, raw(sock) as slow:
        await slow.stream.send_all(b'{"execute":"x-fusemig-estimate","arguments":{"uri":"a"}}' * 3)
        await trio.testing.wait_all_tasks_blocked()
        daemon.scope.cancel()
        while sock.exists():
            await trio.sleep(0.01)


_CONNECT_AS_NOBODY = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
sys.exit(0 if s.recv(100) == b"" else 1)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_is_refused(sock: Path) -> None:
    """Even where the file's mode was opened, the kernel's word on the peer's uid counts."""
    async with serving(sock):
        sock.parent.chmod(0o755)
        sock.chmod(0o666)
        done = await trio.run_process([sys.executable, "-I", "-c", _CONNECT_AS_NOBODY, str(sock)], check=False)
        assert done.returncode == 0


# The client


async def test_client_files_events_and_replies(sock: Path) -> None:
    """Events that come between a request and its reply are kept; several tasks may use one client."""
    async with serving(sock) as daemon, open_control(sock) as client:
        daemon.events.emit("STOP")
        assert await client.execute("query-name") == {"name": "test"}
        assert (await client.next_event()).name == "STOP"
        seen: list[str] = []

        async def listen() -> None:
            async for event in client.events():
                seen.append(event.name)  # noqa: PERF401  (a comprehension would show nothing before the end)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await trio.testing.wait_all_tasks_blocked()
            assert await client.execute("query-name") == {"name": "test"}
            daemon.events.emit("RESUME")
            assert await client.execute("query-name") == {"name": "test"}
            await client.execute("quit")
        assert seen == ["RESUME", "SHUTDOWN"]


async def test_a_command_that_is_called_off_at_any_step_costs_the_client_nothing(sock: Path) -> None:
    """Neither before its first byte nor while its reply is awaited: the next one is answered."""
    async with serving(sock), open_control(sock) as client:
        for n_steps in range(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.execute, "query-name")
                for _ in range(n_steps):
                    await trio.lowlevel.cancel_shielded_checkpoint()
                nursery.cancel_scope.cancel()
            assert await client.execute("query-name") == {"name": "test"}


async def test_client_errors_are_not_wrapped(sock: Path) -> None:
    """The caller catches what it raised."""
    async with serving(sock):
        with pytest.raises(KeyError):
            async with open_control(sock):
                raise KeyError


async def test_client_without_a_daemon(sock: Path) -> None:
    """The error says what to do next."""
    with pytest.raises(ConnectError, match=r"is `fusemig serve` running with --control .*control\.sock\?"):
        async with open_control(sock):
            pass
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(sock))
    with pytest.raises(ConnectError, match="is `fusemig serve` running"):
        async with open_control(sock):
            pass


async def test_client_of_something_else(sock: Path) -> None:
    """A server that does not greet, or greets otherwise, is told from ours in time."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(sock))
        other.listen()
        with pytest.raises(ConnectError, match="does not greet"):
            async with open_control(sock, deadline_s=0.05):
                pass


async def test_client_whose_daemon_does_not_answer(sock: Path) -> None:
    """Every command has a deadline, and a late reply is not taken for the next one's."""
    async with serving(sock) as daemon, open_control(sock) as client:
        with pytest.raises(ConnectionLostError, match=r"did not answer migrate-pause in 0\.05 s"):
            await client.execute("migrate-pause", deadline_s=0.05)
        daemon.may_finish.set()
        assert await client.execute("query-name") == {"name": "test"}


async def test_client_whose_daemon_goes_away(sock: Path) -> None:
    """A lost daemon is a ConnectionLostError, in commands and in events."""
    async with serving(sock) as daemon, open_control(sock) as client:
        assert isinstance(client, ControlClient)
        daemon.scope.cancel()
        with pytest.raises(ConnectionLostError):
            await client.next_event()
        with pytest.raises(ConnectionLostError):
            await client.execute("query-name")


def test_command_error_has_a_class() -> None:
    """GenericError unless said otherwise."""
    assert CommandError("x").error_class == "GenericError"


def test_control_imports_nothing_above_it() -> None:
    """The control socket can be used without FUSE, disks or a migration."""
    code = (
        "import sys, fusemig.control.server, fusemig.control.client; "
        "print([m for m in sys.modules if m.startswith(('pyfuse3', 'fusemig.fuse', 'fusemig.disk', 'fusemig.mig'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
