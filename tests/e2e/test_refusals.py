"""What cannot be done is refused before anything has happened, with the cause and the next step."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from fusemig.wire.native import FrameType
from support.hosts import MIB, assert_migrates, assert_unharmed, pread, wait_until, write_random
from support.proxy import Fault, FaultProxy

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Hosts

pytestmark = pytest.mark.fuse


def test_a_disk_that_is_not_awaited(hosts: Hosts, place: Path) -> None:
    """Exit code 5; the text names what is awaited."""
    source = hosts.start("source", {"vda": write_random(place / "a.img", 2 * MIB)})
    destination = hosts.destination("vdb", "vdc")
    expected = f"fusemig: {destination.uri} refused: disk 'vda' is not awaited there; awaited are: vdb, vdc\n"
    assert source.migrate(destination.uri) == (5, "", expected)
    assert_unharmed(source)
    assert not destination.images["vdb"].exists()
    wait_until(lambda: destination.status()["incoming"]["rejected-connections"] == 1, "the rejection")


def test_one_unknown_disk_of_a_group_refuses_the_group(hosts: Hosts, place: Path) -> None:
    """All or none: the disk that was awaited is not touched either."""
    disks = {name: write_random(place / f"{name}.img", MIB) for name in ("vda", "vdb")}
    source = hosts.start("source", disks)
    destination = hosts.destination("vda")
    expected = f"fusemig: {destination.uri} refused: disk 'vdb' is not awaited there; awaited are: vda\n"
    assert source.migrate(destination.uri) == (5, "", expected)
    assert_unharmed(source)
    assert not destination.images["vda"].exists()
    assert source.migrate(destination.uri, "--disk", "vda").exit_code == 0


def test_a_size_that_does_not_match(hosts: Hosts, place: Path) -> None:
    """Exit code 5; both sizes are in the text, and the image at the destination is as it was."""
    source = hosts.start("source", {"vda": write_random(place / "a.img", 2 * MIB)})
    other = write_random(place / "b.img", 2 * MIB + 512, seed=2)
    before = other.read_bytes()
    destination = hosts.start("destination", {"vda": other}, incoming="tcp:127.0.0.1:0")
    expected = (
        f"fusemig: {destination.uri} refused: disk 'vda' has 2097664 bytes there and 2097152 bytes at the source; "
        "delete the image there, or make it the same size\n"
    )
    assert source.migrate(destination.uri) == (5, "", expected)
    assert_unharmed(source, destination)
    assert other.read_bytes() == before


def test_an_owned_disk_is_not_overwritten(hosts: Hosts) -> None:
    """Once a destination owns a disk, a second source for it is refused."""
    source, destination = hosts.pair(2 * MIB)
    assert source.migrate(destination.uri).exit_code == 0
    other = hosts.start("other", {"vda": write_random(hosts.directory / "other.img", 2 * MIB, seed=2)})
    expected = (
        f"fusemig: {destination.uri} refused: disk 'vda' is owned there and would be overwritten; "
        "serve another image with --incoming\n"
    )
    assert other.migrate(destination.uri) == (5, "", expected)
    assert_unharmed(other)
    assert destination.images["vda"].read_bytes() == source.images["vda"].read_bytes()


def test_a_second_source_is_refused_while_the_first_one_sends(hosts: Hosts) -> None:
    """The running migration does not notice."""
    source, destination = hosts.pair(8 * MIB)
    source.migrate_to_pause(destination.uri)
    other = hosts.start("other", {"vda": write_random(hosts.directory / "other.img", 8 * MIB, seed=2)})
    refused = other.migrate(destination.uri)
    assert refused.stderr.startswith(
        f"fusemig: {destination.uri} refused: disk 'vda' is busy: it is being received from tcp:127.0.0.1:"
    )
    assert refused.exit_code == 5
    source.proceed()
    source.wait_phase("completed")
    assert destination.images["vda"].read_bytes() == source.images["vda"].read_bytes()


def test_nobody_listens(hosts: Hosts, place: Path) -> None:
    """Exit code 1; the text names the command that is missing there."""
    source = hosts.start("source", {"vda": write_random(place / "a.img", 2 * MIB)})
    with socket.socket() as reserved:  # bound and not listening: the port is nobody else's meanwhile
        reserved.bind(("127.0.0.1", 0))
        uri = f"tcp:127.0.0.1:{reserved.getsockname()[1]}"
        done = source.migrate(uri)
    assert done.stderr.startswith(f"fusemig: cannot connect to {uri}: ")
    assert "Connection refused; is" in done.stderr
    assert done.stderr.endswith(f"; is `fusemig serve --incoming {uri}` running there?\n")
    assert done.stderr.count("\n") == 1
    assert done.exit_code == 1
    assert_unharmed(source)


def test_a_uri_that_is_none(hosts: Hosts, place: Path) -> None:
    """Exit code 2, before anything is started."""
    source = hosts.start("source", {"vda": write_random(place / "a.img", MIB)})
    for uri, expected in (
        ("tcp:127.0.0.1", "'tcp:127.0.0.1' is not a migration URI: write tcp:HOST:PORT or unix:PATH"),
        ("exec:cat", "'exec:' is not supported: use tcp:HOST:PORT or unix:PATH"),
    ):
        text = f"fusemig: Parameter 'uri' expects a valid migration protocol: {expected}\n"
        assert source.migrate(uri) == (2, "", text)
    assert source.phase() == "none"


def test_what_is_not_built_yet_is_refused(hosts: Hosts, place: Path) -> None:
    """An option that cannot be honoured is never silently accepted."""
    source = hosts.start("source", {"vda": write_random(place / "a.img", MIB)})
    for options in (
        ["--resume", "--wire", "qemu"],
        ["--incremental", "--wire", "qemu"],
        ["--compress", "zstd", "--wire", "qemu"],
        ["--streams", "2", "--wire", "qemu"],
    ):
        done = source.migrate("tcp:127.0.0.1:1", *options)
        assert done.exit_code != 0
        assert "leave it out" in done.stderr or "leave them out" in done.stderr
    assert source.phase() == "none"


def test_garbage_on_the_port_disturbs_nobody(hosts: Hosts) -> None:
    """Random bytes, an HTTP request, a silent and a vanishing client are rejected while a migration runs."""
    source, destination = hosts.pair(8 * MIB)
    uri = destination.uri
    source.migrate_to_pause(uri)
    address = ("127.0.0.1", int(uri.rsplit(":", 1)[1]))
    silent = socket.create_connection(address)
    try:
        for garbage in (random.Random(1).randbytes(100_000), b"GET / HTTP/1.1\r\nHost: disk\r\n\r\n", b"FUSEM"):
            with socket.create_connection(address, 10) as stranger:
                try:
                    stranger.sendall(garbage)
                    stranger.shutdown(socket.SHUT_WR)
                    while stranger.recv(4096):
                        pass
                except OSError:
                    pass  # closed with our garbage unread
        wait_until(lambda: destination.status()["incoming"]["rejected-connections"] >= 3, "three rejections")
        assert source.phase() == "pre-switchover"
        source.proceed()
        source.wait_phase("completed")
        assert destination.images["vda"].read_bytes() == source.images["vda"].read_bytes()
        assert destination.disk()["state"] == "owner"
    finally:
        silent.close()
    wait_until(lambda: destination.status()["incoming"]["rejected-connections"] == 4, "the fourth rejection")


def test_a_corrupt_hello_is_rejected(hosts: Hosts) -> None:
    """A spoiled handshake is a rejected connection and a failed migration, and nothing was created."""
    source, destination = hosts.pair(2 * MIB)
    with FaultProxy(destination.uri) as proxy:
        proxy.arm(FrameType.HELLO, Fault.FLIP)
        done = source.migrate(proxy.uri)
        assert done.exit_code == 1
        assert done.stderr == f"fusemig: {proxy.uri} closed the connection\n"
    assert_unharmed(source)
    assert not destination.images["vda"].exists()
    wait_until(lambda: destination.status()["incoming"]["rejected-connections"] == 1, "the rejection")
    assert_migrates(source, destination)


# Serving


@pytest.mark.qemu
def test_an_image_that_qemu_has_open_is_not_served(hosts: Hosts, place: Path) -> None:
    """Exit code 2 while a QEMU program holds the image; served once it is gone."""
    image = write_random(place / "a.img", MIB)
    expected = (
        f"fusemig: image {image} of disk 'vda' is in use by another process (a running QEMU or fusemig); "
        "stop it first\n"
    )
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            holder.stdin.write("read 0 512\n")
            holder.stdin.flush()
            while "512/512" not in holder.stdout.readline():
                assert holder.poll() is None
            assert hosts.make("refused", {"vda": image}).serve() == (2, "", expected)
        finally:
            holder.kill()
    hosts.start("served", {"vda": image})


@pytest.mark.qemu
def test_an_image_that_is_served_is_not_opened_by_qemu(hosts: Hosts, place: Path) -> None:
    """The lock works the other way round too."""
    image = write_random(place / "a.img", MIB)
    source = hosts.start("source", {"vda": image})
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 512", image], check=False, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert "lock" in done.stderr
    assert pread(source.file(), MIB) == write_random(place / "same.img", MIB).read_bytes()


def test_an_image_is_served_once(hosts: Hosts, place: Path) -> None:
    """A second daemon is refused with exit code 2; the first goes on."""
    image = write_random(place / "a.img", MIB)
    first = hosts.start("first", {"vda": image})
    expected = (
        f"fusemig: image {image} of disk 'vda' is in use by another process (a running QEMU or fusemig); "
        "stop it first\n"
    )
    assert hosts.make("second", {"vda": image}).serve() == (2, "", expected)
    assert_unharmed(first)


def test_a_mount_that_a_killed_daemon_left_is_told_from_one_that_lives(hosts: Hosts, place: Path) -> None:
    """Also where the kernel still knows the attributes of its root: what to do about it is another thing."""
    host = hosts.start("host", {"vda": write_random(place / "a.img", MIB)})
    host.mount.stat()
    os.kill(host.pid, signal.SIGKILL)
    assert host.wait() == -signal.SIGKILL
    done = host.serve()
    assert done.exit_code == 3
    assert done.stderr.endswith(f"a dead mount is left there: unmount it (fusermount3 -u -z {host.mount})\n")
    host.kill()
    assert_unharmed(host.start())


def test_an_incomplete_image_is_not_served(hosts: Hosts) -> None:
    """After a migration that did not end, the text says so and what to do; --incoming receives it again."""
    source, destination = hosts.pair(8 * MIB)
    with FaultProxy(destination.uri) as proxy:
        proxy.arm(FrameType.DATA, Fault.CUT, nth=3)
        assert source.migrate(proxy.uri).exit_code == 1
    wait_until(lambda: "error-desc" in destination.status()["incoming"], "the destination's notice")
    assert destination.stop() == 0
    image = destination.images["vda"]
    done = hosts.make("refused", {"vda": image}).serve()
    assert done.exit_code == 2
    head = f"fusemig: image {image} of disk 'vda' is incomplete: a migration from tcp:127.0.0.1:"
    tail = f" did not end; serve it with --incoming to receive it again, or delete the image and {image}.fusemig\n"
    assert done.stderr.startswith(head)
    assert done.stderr.endswith(tail)
    again = hosts.start("again", {"vda": image}, incoming="tcp:127.0.0.1:0")
    assert_unharmed(source, again)
    assert_migrates(source, again)


def test_two_listeners_on_one_port(hosts: Hosts, place: Path) -> None:
    """The second is refused and leaves no mount behind."""
    first = hosts.destination()
    uri = first.uri
    done = hosts.make("second", {"vda": place / "b.img"}, incoming=uri).serve()
    assert done.stderr.startswith(f"fusemig: cannot listen at {uri}: ")
    assert done.stderr.endswith("; choose another address\n")
    assert done.exit_code == 1
