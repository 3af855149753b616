"""TLS between a real QEMU and a real fusemig: the same directories of credentials, both ways."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

import pytest

from fusemig.core.units import CHUNK_SIZE
from support.certificates import Authority
from support.hosts import Hosts, wait_until
from support.qemu import Drive, Qemu, disk_bytes, is_available

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.hosts import Host

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.qemu,
    pytest.mark.skipif(not is_available(), reason="needs a QEMU older than 9.1: tools/setup test"),
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no access to /dev/fuse"),
]

SIZE = 5 * CHUNK_SIZE + 1536
CONTENT = disk_bytes(SIZE, seed=1)
HOST_NAME = "disks.example"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Make fusemig hosts; all are stopped at the end, and none may have misbehaved."""
    hosts = Hosts(tmp_path)
    try:
        yield hosts
    finally:
        problems = hosts.close()
    assert not problems, problems


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Give an authority. It names hosts: QEMU 7.2 looks for a host's name where an address would stand, too."""
    return Authority(tmp_path / "pki")


def store(path: Path, content: bytes) -> Path:
    """Write an image."""
    path.write_bytes(content)
    return path


def is_owner(host: Host) -> bool:
    """Tell whether it has taken the disk over."""
    return bool(host.disk()["state"] == "owner")


def is_refused(host: Host) -> bool:
    """Tell whether it has refused a source that is not listed."""
    return "who is not on the list of who is admitted" in host.log()


def make_credentials(qemu: Qemu, directory: Path, endpoint: str, **parameters: str) -> None:
    """Give the QEMU credentials and migration parameters, as libvirt does."""
    qemu.execute(
        "object-add",
        qom_type="tls-creds-x509",
        id="tls0",
        dir=str(directory),
        endpoint=endpoint,
        verify_peer=True,
    )
    qemu.execute("migrate-set-parameters", tls_creds="tls0", **parameters)


def test_from_qemu(hosts: Hosts, authority: Authority) -> None:
    """Who is not listed fails and leaves the image alone; once listed, the disk arrives byte for byte."""
    client, server = authority.client(), authority.server(HOST_NAME)
    drives = [Drive("vda", store(hosts.directory / "vda.qemu.raw", CONTENT))]
    before = b"\xee" * SIZE
    for listed, expected in (("DNS:other", "failed"), ("DNS:source.example", "completed")):
        image = store(hosts.directory / "vda.img", before)
        there = hosts.start(
            "destination",
            {"vda": image},
            incoming="tcp:127.0.0.1:0",
            options=["--tls-creds", server, "--tls-authz", listed],
        )
        with Qemu(hosts.directory, drives=drives) as qemu:
            make_credentials(qemu, client, "client", tls_hostname=HOST_NAME)
            qemu.execute("migrate-set-parameters", downtime_limit=1, max_bandwidth=500 << 20)
            qemu.set_capabilities(return_path=True)
            qemu.start_migration(there.uri)
            assert qemu.wait_migration()["status"] == expected
        if expected == "failed":
            assert image.read_bytes() == before
            wait_until(partial(is_refused, there), "the refusal")
            there.stop()
        else:
            wait_until(partial(is_owner, there), "the take-over")
            assert image.read_bytes() == CONTENT


def test_to_qemu(hosts: Hosts, authority: Authority) -> None:
    """Every byte arrives; QEMU checks our certificate against its authority, and we its name."""
    client, server = authority.client(), authority.server(HOST_NAME)
    here = hosts.start("source", {"vda": store(hosts.directory / "a.img", CONTENT)})
    drive = Drive("vda", store(hosts.directory / "vda.qemu.raw", bytes(SIZE)))
    with Qemu(hosts.directory, drives=[drive], incoming="defer") as qemu:
        make_credentials(qemu, server, "server")
        qemu.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        where = qemu.migration()["socket-address"][0]
        done = here.migrate(
            f"tcp:127.0.0.1:{where['port']}",
            *("--wire", "qemu", "--machine", "pc-q35-7.2"),
            *("--tls-creds", client, "--tls-hostname", HOST_NAME),
        )
        assert done.exit_code == 0, done.stderr
        assert qemu.wait_migration()["status"] == "completed"
    assert drive.path.read_bytes() == CONTENT
