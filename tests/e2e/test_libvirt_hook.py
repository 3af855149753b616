"""The libvirt hook, run as libvirt runs it: four arguments, the guest's XML on stdin, an exit code."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.hosts import MIB, Finished, is_mounted, write_random

if TYPE_CHECKING:
    from support.hosts import Host, Hosts

HOOK = Path(__file__).parents[2] / "tools" / "libvirt-hook" / "qemu"
XML = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name>
  <!-- the disks -->
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none'/>
      <source file='/run/there/disks/vda' index='1'><seclabel model='dac' relabel='no'/></source>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='block' device='disk'>
      <source dev='/dev/there/data'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <source file='/isos/rescue.iso'/>
      <target dev='sda' bus='sata'/>
    </disk>
  </devices>
  <qemu:commandline><qemu:arg value='-snapshot'/></qemu:commandline>
</domain>
"""


def hook(config: Path, *arguments: str, xml: str = XML) -> Finished:
    """Run the hook; the last argument of libvirt's is ``-`` for all that we are called for."""
    done = subprocess.run(
        [HOOK, *arguments, "-"],
        input=xml,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": os.environ["PATH"], "FUSEMIG_HOOK_CONFIG": str(config)},
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def write_config(path: Path, mountpoint: Path, control: Path, disks: str = "vda vdb=data", wait: str = "0.2") -> Path:
    """Write the configuration of the guest ``web``."""
    path.write_text(f"[web]\nmountpoint = {mountpoint}\ncontrol = {control}  # ours\ndisks = {disks}\nwait = {wait}\n")
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Give a configuration of which nothing runs."""
    return write_config(tmp_path / "hook.conf", Path("/run/here/disks"), tmp_path / "control")


def test_migrate_begin_rewrites_the_paths(config: Path) -> None:
    """The disks that fusemig serves get this host's paths; everything else stays as it is."""
    done = hook(config, "web", "migrate", "begin")
    assert done.exit_code == 0, done.stderr
    domain = ET.fromstring(done.stdout)  # noqa: S314  (our own)
    disks = {disk.find("target").get("dev"): disk for disk in domain.iterfind("./devices/disk")}  # type: ignore[union-attr]
    assert [disk.get("type") for disk in disks.values()] == ["file"] * 3
    sources = {name: dict(disk.find("source").attrib) for name, disk in disks.items()}  # type: ignore[union-attr]
    assert sources == {
        "vda": {"file": "/run/here/disks/vda", "index": "1"},
        "vdb": {"file": "/run/here/disks/data"},
        "sda": {"file": "/isos/rescue.iso"},
    }
    assert disks["vda"].find("source/seclabel") is not None
    assert "<!-- the disks -->" in done.stdout
    assert '<qemu:arg value="-snapshot"' in done.stdout
    # What libvirt gets is what it sent, but for the paths.
    again = hook(config, "web", "migrate", "begin", xml=done.stdout)
    assert again.stdout.strip() == done.stdout.strip()


@pytest.mark.parametrize(
    ("xml", "text"),
    [
        ("<domain", "the XML of web cannot be read"),
        (XML.replace("'vdb'", "'vdc'"), "web has no disk vdb"),
        (XML.replace("type='block'", "type='network'"), "disk vdb of web is of type 'network': fusemig's are files"),
        (XML.replace("type='raw'", "type='qcow2'"), "disk vda of web has format 'qcow2': fusemig's are raw"),
    ],
)
def test_migrate_begin_refuses_what_it_cannot_move(config: Path, xml: str, text: str) -> None:
    """A reason on stderr, nothing on stdout, and an exit code that stops libvirt."""
    done = hook(config, "web", "migrate", "begin", xml=xml)
    assert done.exit_code != 0
    assert done.stdout == ""
    assert text in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "operation",
    [("migrate", "begin"), ("prepare", "begin"), ("release", "end"), ("start", "begin"), ("stopped", "end")],
)
def test_other_guests_are_none_of_its_business(config: Path, operation: tuple[str, str]) -> None:
    """A guest without a section, and a host without a configuration: silence and success."""
    assert hook(config, "other", *operation) == (0, "", "")
    config.unlink()
    assert hook(config, "web", *operation) == (0, "", "")


@pytest.mark.parametrize(
    "operation", [("start", "begin"), ("started", "begin"), ("stopped", "end"), ("reconnect", "begin")]
)
def test_other_operations_are_let_through(config: Path, operation: tuple[str, str]) -> None:
    """Nothing is done and nothing refused."""
    assert hook(config, "web", *operation) == (0, "", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[web]\ncontrol = /c\ndisks = vda\n", "section [web] lacks 'mountpoint'"),
        ("[web]\nmountpoint = /m\ncontrol = /c\ndisks =\n", "section [web] names no disk"),
        ("[web]\nmountpoint = /m\ncontrol = /c\ndisks = vda=../x\n", "'vda=../x' is no name of a disk"),
        ("[web]\nmountpoint = /m\ncontrol = /c\ndisks = vda\nwait = long\n", "wait is in seconds"),
        ("mountpoint = /m\n", "File contains no section headers"),
    ],
)
def test_a_wrong_configuration_stops_the_operation(config: Path, text: str, expected: str) -> None:
    """Rather than a guest that starts with the wrong disk."""
    config.write_text(text)
    done = hook(config, "web", "prepare", "begin")
    assert done.exit_code != 0
    assert expected in done.stderr


def test_wrong_arguments(config: Path) -> None:
    """Whoever runs it by hand is told who does."""
    done = hook(config, "web")
    assert done.exit_code != 0
    assert "libvirt calls it" in done.stderr


@pytest.mark.fuse
def test_prepare_waits_for_the_mount(hosts: Hosts, place: Path) -> None:
    """A start goes on as soon as the disks can be opened, and is stopped if they never can."""
    host = hosts.make("host", {"vda": write_random(place / "a.img", MIB)})
    config = write_config(place / "hook.conf", host.mount, host.control, "vda")
    done = hook(config, "web", "prepare", "begin")
    assert done.exit_code != 0
    assert f"nothing is mounted at {host.mount}: is `fusemig serve` running?" in done.stderr
    write_config(config, host.mount, host.control, "vda", "60")
    starting = threading.Timer(0.5, host.start)
    starting.start()
    try:
        assert hook(config, "web", "prepare", "begin") == (0, "", "")
    finally:
        starting.join()
    assert is_mounted(host.mount)


@pytest.mark.fuse
def test_prepare_wants_disks_with_a_size(hosts: Hosts, place: Path) -> None:
    """At a destination whose image is still to come, and for a disk that is not served."""
    host = hosts.destination()
    config = write_config(place / "hook.conf", host.mount, host.control, "vda vdb")
    done = hook(config, "web", "prepare", "begin")
    assert done.exit_code != 0
    assert "vda has no size yet: start the migration of the disks first" in done.stderr
    assert "vdb: No such file or directory" in done.stderr


def config_of(host: Host, place: Path) -> Path:
    """Write a configuration for a host with one disk."""
    return write_config(place / f"{host.name}.conf", host.mount, host.control, "vda")


@pytest.mark.fuse
def test_release_stops_serving(hosts: Hosts, place: Path) -> None:
    """The daemon quits in order; a second call, with none running, is no error."""
    host = hosts.start("host", {"vda": write_random(place / "a.img", MIB)})
    config = config_of(host, place)
    assert hook(config, "web", "release", "end") == (0, "", "")
    assert host.wait() == 0
    assert not is_mounted(host.mount)
    assert hook(config, "web", "release", "end") == (0, "", "")


@pytest.mark.fuse
def test_release_does_not_end_a_migration(hosts: Hosts, place: Path) -> None:
    """Neither at the source nor at the destination; when it is over, the source's daemon may go."""
    source, destination = hosts.pair(4 * MIB)
    source.migrate_to_pause(destination.uri)
    for host in source, destination:
        done = hook(config_of(host, place), "web", "release", "end")
        assert done.exit_code == 0
        assert "the disks of web are on the move" in done.stderr
    source.proceed()
    source.wait_phase("completed")
    assert hook(config_of(source, place), "web", "release", "end") == (0, "", "")
    assert source.wait() == 0
    assert destination.disk()["state"] == "owner"


def test_release_says_if_the_daemon_does_not_answer(tmp_path: Path) -> None:
    """Something else at the socket is an error, not a success."""
    control = tmp_path / "control"
    config = write_config(tmp_path / "hook.conf", tmp_path, control, "vda")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(control))
        other.listen()
        answering = threading.Thread(target=lambda: other.accept()[0].close(), daemon=True)
        answering.start()
        done = hook(config, "web", "release", "end")
    assert done.exit_code != 0
    assert f"`fusemig serve` at {control} does not answer" in done.stderr
