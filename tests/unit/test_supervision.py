"""What a service manager hears: well-formed datagrams, a status that changes, no sign of life that is not proved."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import msgspec
import pytest
import trio

from fusemig.daemon.supervision import describe, supervise
from fusemig.notify import Notifier, open_notifier
from fusemig.qmp import schema

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STATUS = schema.DaemonStatus(
    version="1",
    pid=1,
    mountpoint="/m",
    status=schema.RunState.RUNNING,
    disks=[schema.ServedDisk(name="vda", size=512, path="/a", state="owner", gate="open")],
    totals=schema.MigrationTotals(),
)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give a manager's socket and one connected to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def heard(manager: socket.socket) -> list[str]:
    """Return what has come."""
    found = []
    while True:
        try:
            found.append(manager.recv(4096).decode())
        except BlockingIOError:
            return found


async def test_a_sign_of_life_follows_each_proof(
    ends: tuple[socket.socket, socket.socket], autojump_clock: trio.testing.MockClock
) -> None:
    """Twice in the time that is allowed; none for a proof that does not come, and again after one that does."""
    manager, channel = ends
    is_well = trio.Event()

    async def prove() -> None:
        if 10 < trio.current_time() - begin < 20:
            await trio.sleep_forever()
        is_well.set()

    begin = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervise, Notifier(channel, 4.0), lambda: STATUS, prove)
        await trio.sleep(9)
        assert heard(manager).count("WATCHDOG=1") == 5
        await trio.sleep(2)
        heard(manager)
        await trio.sleep(8)
        assert heard(manager) == []
        await trio.sleep(5)
        assert heard(manager).count("WATCHDOG=1") >= 2
        nursery.cancel_scope.cancel()


async def test_status_is_sent_when_it_changes(
    ends: tuple[socket.socket, socket.socket], autojump_clock: trio.testing.MockClock
) -> None:
    """Once, and again for something new; without a watchdog nothing else comes."""
    manager, channel = ends
    state = schema.RunState.RUNNING

    async def prove() -> None:
        raise AssertionError("nobody asked for it")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervise, Notifier(channel), lambda: msgspec.structs.replace(STATUS, status=state), prove)
        await trio.sleep(10)
        assert heard(manager) == ["STATUS=1 disk, running"]
        state = schema.RunState.PAUSED
        await trio.sleep(10)
        assert heard(manager) == ["STATUS=1 disk, paused"]
        nursery.cancel_scope.cancel()


def test_a_status_is_one_line_with_what_matters() -> None:
    """A doubt and an error are named; nothing breaks the line, which would be another assignment."""
    disk = msgspec.structs.replace(STATUS.disks[0], in_doubt="asked twice")
    migration = schema.MigrationInfo(
        status=schema.MigrationStatus.FAILED,
        disk=schema.MigrationStats(remaining=1 << 20),
        error_desc="it broke\nREADY=1",
        x_fusemig=schema.FusemigMigration(
            role=schema.Role.SOURCE,
            session="s",
            phase="in-doubt",
            mode=schema.Mode.PRECOPY,
            wire=schema.WireName.NATIVE,
            pass_=3,
        ),
    )
    line = describe(msgspec.structs.replace(STATUS, disks=[disk], migration=migration))
    assert "IN DOUBT who owns vda" in line
    assert "migration (source): in-doubt, pass 3, 1.0 MiB pending: it broke READY=1" in line


def test_the_environment_says_whom_to_tell(tmp_path: Path) -> None:
    """A path or an abstract name; the variables are taken away from our children; descriptors go along."""
    for address in (str(tmp_path / "socket"), f"@fusemig-test-{os.getpid()}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(address.replace("@", "\0"))
            environment = {
                "NOTIFY_SOCKET": address,
                "WATCHDOG_USEC": "3000000",
                "WATCHDOG_PID": str(os.getpid()),
                "OTHER": "x",
            }
            notifier = open_notifier(environment)
            assert environment == {"OTHER": "x"}
            assert notifier.watchdog_s == 3.0
            notifier.send("FDSTORE=1\nFDNAME=a", [manager.fileno()])
            data, descriptors, _, _ = socket.recv_fds(manager, 4096, 4)
            assert data == b"FDSTORE=1\nFDNAME=a"
            assert os.fstat(descriptors[0]).st_ino == os.fstat(manager.fileno()).st_ino
            os.close(descriptors[0])
            notifier.close()
            notifier.send("READY=1")
            assert not notifier.is_on


def test_nobody_to_tell_is_no_failure(tmp_path: Path) -> None:
    """No variable, a socket that is gone, a watchdog that watches another process."""
    assert not open_notifier({}).is_on
    assert not open_notifier({"NOTIFY_SOCKET": str(tmp_path / "none")}).is_on
    path = tmp_path / "socket"
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(path))
    other = open_notifier({"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"})
    assert other.is_on
    assert other.watchdog_s is None
    manager.close()
    other.send("READY=1")
    assert not other.is_on
