"""Our codec of QEMU's block migration against a real QEMU, both ways, with nothing of the engine in between."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from fusemig.core.units import CHUNK_SIZE, n_chunks
from fusemig.wire import qemu_block, savevm
from fusemig.wire.qemu_block import BlockZero, Device, Tail
from support.qemu import DEADLINE_S, MACHINE, Destination, Drive, Qemu, QemuError, disk_bytes, is_available

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not is_available(), reason="needs a QEMU older than 9.1: tools/setup test"),
]

ODD = 5 * CHUNK_SIZE + 1536
UNHURRIED = {"downtime_limit": 1, "max_bandwidth": 500 << 20}
"""Parameters with which QEMU 7.2 to 9.0 finishes its bulk phase."""


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Listen on a unix socket."""
    with socket.create_server(str(path), family=socket.AF_UNIX) as server:
        server.settimeout(DEADLINE_S)
        yield server


def make_drives(directory: Path, contents: list[bytes]) -> tuple[list[Drive], list[Device]]:
    """Store disks; return them as QEMU and as the codec know them."""
    drives, devices = [], []
    for index, content in enumerate(contents):
        path = directory / f"disk{index}.raw"
        path.write_bytes(content)
        drives.append(Drive(f"disk{index}", path))
        devices.append(Device(f"disk{index}", len(content)))
    return drives, devices


def receive_all(qemu: Qemu, directory: Path, destination: Destination, *, incremental: bool = False) -> str:
    """Have ``qemu`` migrate to ``destination``; return the status that it reports."""
    with listening(directory / "in") as server:
        qemu.start_migration(f"unix:{directory / 'in'}", incremental=incremental)
        connection, _ = server.accept()
        with connection:
            destination.receive(connection)
    status: str = qemu.wait_migration()["status"]
    return status


@pytest.mark.parametrize("zero_blocks", [False, True])
@pytest.mark.parametrize("return_path", [False, True])
def test_from_qemu(tmp_path: Path, zero_blocks: bool, return_path: bool) -> None:
    """Two disks, one with a short last chunk, arrive byte for byte, and QEMU ends with `completed`."""
    contents = [disk_bytes(ODD, seed=1), os.urandom(3 * CHUNK_SIZE)]
    drives, devices = make_drives(tmp_path, contents)
    destination = Destination(devices)
    with Qemu(tmp_path, drives=drives) as qemu:
        qemu.set_capabilities(zero_blocks=zero_blocks, return_path=return_path)
        qemu.execute("migrate-set-parameters", **UNHURRIED)
        assert receive_all(qemu, tmp_path, destination) == "completed"
    assert destination.images == contents
    assert destination.completeness.problem() is None
    assert any(isinstance(event, BlockZero) for event in destination.events) == zero_blocks
    assert destination.drained_bytes > 10_000


def test_from_qemu_that_writes_meanwhile(tmp_path: Path) -> None:
    """A chunk that is written after it was sent comes again."""
    contents = [os.urandom(16 * CHUNK_SIZE)]
    drives, devices = make_drives(tmp_path, contents)
    destination = Destination(devices)
    with Qemu(tmp_path, drives=drives) as qemu, listening(tmp_path / "in") as server:
        qemu.execute("migrate-set-parameters", **UNHURRIED)
        qemu.start_migration(f"unix:{tmp_path / 'in'}")
        connection, _ = server.accept()
        with connection:
            destination.receive(connection, until=lambda: len(destination.chunks) >= 2)
            qemu.monitor('qemu-io disk0 "write -P 0x5a 512k 1M"')
            destination.receive(connection)
        assert qemu.wait_migration()["status"] == "completed"
    assert drives[0].path.read_bytes()[CHUNK_SIZE // 2 : CHUNK_SIZE] == b"\x5a" * (CHUNK_SIZE // 2)
    assert destination.images == [drives[0].path.read_bytes()]
    assert destination.completeness.problem() is None
    assert destination.chunks.count((0, 0)) >= 2


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-utils: tools/setup test")
def test_from_qemu_with_a_shared_base(tmp_path: Path) -> None:
    """With `inc`, only what an overlay holds comes, and with the base it makes the disk."""
    base = disk_bytes(ODD, seed=2)
    drives, devices = make_drives(tmp_path, [base])
    overlay = tmp_path / "overlay.qcow2"
    make = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(drives[0].path), "-F", "raw", str(overlay)]
    subprocess.run(make, check=True, timeout=DEADLINE_S)
    write = ["qemu-io", "-c", "write -P 7 2M 64k", str(overlay)]
    subprocess.run(write, check=True, timeout=DEADLINE_S, stdout=subprocess.DEVNULL)
    destination = Destination([device._replace(has_base=True) for device in devices], bases=[base])
    with Qemu(tmp_path, drives=[Drive("disk0", overlay, "qcow2")]) as qemu:
        qemu.execute("migrate-set-parameters", **UNHURRIED)
        assert receive_all(qemu, tmp_path, destination, incremental=True) == "completed"
    expected = bytearray(base)
    expected[2 << 20 : (2 << 20) + 65536] = b"\x07" * 65536
    assert destination.images == [expected]
    assert destination.chunks == [(0, 2 << 20)]
    assert destination.completeness.problem() is None


def test_early_finish_is_told_from_the_truth(tmp_path: Path) -> None:
    """In a hurry, QEMU reports success whether or not it sent everything; we say which, and exactly what is missing."""
    content = os.urandom(4096).ljust(CHUNK_SIZE, b"x") * 64
    drives, devices = make_drives(tmp_path, [content])
    destination = Destination(devices)
    with Qemu(tmp_path, drives=drives) as qemu:
        qemu.execute("migrate-set-parameters", max_bandwidth=8 << 30)
        assert receive_all(qemu, tmp_path, destination) == "completed"
    missing = [span for _, *span in destination.completeness.missing()]
    assert (destination.images != [content]) == bool(missing)
    rebuilt = bytearray(content)
    for offset, length in missing:
        rebuilt[offset : offset + length] = bytes(length)
    assert destination.images == [rebuilt]
    problem = destination.completeness.problem()
    if missing:
        offset, length = missing[0]
        assert problem is not None
        assert f"'disk0' {offset}-{offset + length - 1}" in problem
        assert qemu_block.EARLY_FINISH_COMMIT in problem
    else:
        assert problem is None


def connect_to(qemu: Qemu) -> socket.socket:
    """Connect to where an incoming QEMU listens."""
    (address,) = qemu.migration()["socket-address"]
    return socket.create_connection((address["host"], int(address["port"])), timeout=DEADLINE_S)


def send_stream(connection: socket.socket, disks: list[tuple[Device, bytes, bytes]], tail: Tail) -> None:
    """Send what a fusemig source sends: a bulk phase of the older contents, then what differs in the newer."""
    encoder = qemu_block.Encoder([device for device, _, _ in disks], tail=tail)

    def send(*buffers: bytes | memoryview) -> None:
        for buffer in buffers:
            connection.sendall(buffer)

    def send_chunk(index: int, chunk: int, content: bytes) -> None:
        offset, length = encoder.span(index, chunk)
        payload = memoryview(content)[offset : offset + length]
        if any(payload[chunk * CHUNK_SIZE - offset :]):
            send(*encoder.data(index, offset, payload))
        else:
            send(encoder.zero(index, chunk))

    send(savevm.encode_header(MACHINE), savevm.encode_start(1, qemu_block.SECTION, qemu_block.VERSION))
    send(qemu_block.END_OF_SECTION, savevm.encode_footer(1))
    completed = 0
    for index, (device, older, _) in enumerate(disks):
        for chunk in range(n_chunks(device.size)):
            send(savevm.encode_part(1), encoder.progress(completed))
            send_chunk(index, chunk, older)
            send(qemu_block.END_OF_SECTION, savevm.encode_footer(1))
            completed += encoder.span(index, chunk)[1]
    send(savevm.encode_end(1))
    for index, (device, older, newer) in enumerate(disks):
        for chunk in range(n_chunks(device.size)):
            part = slice(chunk * CHUNK_SIZE, (chunk + 1) * CHUNK_SIZE)
            if older[part] != newer[part]:
                send_chunk(index, chunk, newer)
    send(encoder.end(), savevm.encode_footer(1), savevm.encode_eof())


def changed(content: bytes) -> bytes:
    """Return a later state of a disk: its first chunk, its end and nothing else differ."""
    return os.urandom(4096) + content[4096:-700] + os.urandom(700)


def blank_drives(directory: Path, devices: list[Device]) -> list[Drive]:
    """Make disks of the right size, full of what must be overwritten."""
    return make_drives(directory, [b"\xee" * device.size for device in devices])[0]


def test_to_qemu(tmp_path: Path) -> None:
    """QEMU loads our stream, zeros, dirty chunks and a short last chunk included, and says that it is complete."""
    older = [disk_bytes(ODD, seed=3), disk_bytes(4 * CHUNK_SIZE, seed=4), disk_bytes(ODD, seed=5)]
    newer = [changed(older[0]), older[1], older[2]]
    devices = [Device(f"disk{index}", len(content)) for index, content in enumerate(older)]
    drives = blank_drives(tmp_path, devices)
    with Qemu(tmp_path, drives=drives, incoming="tcp:127.0.0.1:0") as qemu:
        with connect_to(qemu) as connection:
            send_stream(connection, list(zip(devices, older, newer, strict=True)), Tail.OVERLAPPING)
        assert qemu.wait_migration()["status"] == "completed"
        assert "Completed 100 %" in qemu.log
    assert [drive.path.read_bytes() for drive in drives] == newer


def test_qemu_does_not_load_a_padded_tail(tmp_path: Path) -> None:
    """Block.c's own form of a short last chunk is one that block.c refuses; should this change, we can drop a form."""
    content = disk_bytes(ODD, seed=6)
    devices = [Device("disk0", ODD)]
    drives = blank_drives(tmp_path, devices)
    with Qemu(tmp_path, drives=drives, incoming="tcp:127.0.0.1:0") as qemu:
        # QEMU hangs up before it has read the rest.
        with connect_to(qemu) as connection, suppress(ConnectionError):
            send_stream(connection, [(devices[0], content, content)], Tail.PADDED)
        with pytest.raises(QemuError, match="Input/output error"):
            qemu.wait_migration()


def test_qemu_refuses_another_machine(tmp_path: Path) -> None:
    """The machine type matters even when no device state follows."""
    drives = blank_drives(tmp_path, [Device("disk0", CHUNK_SIZE)])
    with Qemu(tmp_path, drives=drives, incoming="tcp:127.0.0.1:0", machine="pc-i440fx-7.2") as qemu:
        with connect_to(qemu) as connection:
            connection.sendall(savevm.encode_header(MACHINE))
        with pytest.raises(QemuError, match=r"Machine type received is 'pc-q35-7\.2' and local is 'pc-i440fx-7\.2'"):
            qemu.wait_migration()
