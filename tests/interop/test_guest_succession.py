"""A Linux guest under TCG whose disk's daemon is killed and upgraded under it: it runs on, and loses nothing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from fusemig.cli.demo_records import read_console
from support.guest import Guest, fill, is_made, read_records
from support.heirs import ResilientHost
from support.hosts import Hosts
from support.qemu import is_available

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.qemu,
    pytest.mark.nightly,
    pytest.mark.skipif(not is_available(), reason="needs a QEMU older than 9.1: tools/setup test"),
    pytest.mark.skipif(not is_made(), reason="needs a guest's kernel: tools/setup test"),
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no access to /dev/fuse"),
]

SIZE = 64 << 20
N_ROUNDS = 5


@pytest.fixture
def host(tmp_path: Path) -> Iterator[ResilientHost]:
    """Give a host whose disk the guest can be told from."""
    image = tmp_path / "vda.img"
    fill(image, SIZE)
    hosts = Hosts(tmp_path)
    made = ResilientHost("host", tmp_path / "host", {"vda": image})
    hosts.adopt(made)
    made.start()
    yield made
    assert not hosts.close()


def test_a_guest_runs_on_across_kills_and_upgrades(host: ResilientHost, tmp_path: Path) -> None:
    """It never boots again, writes on after each, and every record that it reported durable is there, whole."""
    guest = Guest(tmp_path / "guest", host.file())
    try:
        guest.wait_writing()
        for _ in range(N_ROUNDS):
            host.kill_daemon()
            host.wait_for_successor()
            guest.wait_writing(100)
            done = host.command("upgrade")
            assert done.exit_code == 0, done.stderr
            guest.wait_writing(100)
        assert guest.run_state() == "running"
        guest.execute("stop")
        account = read_console(guest.console)
        assert account.is_one_guest
        records = read_records(host.images["vda"], account.boots[0])
        assert not records.torn
        assert not records.missing(account.numbers)
        assert host.n_daemons() == 2 * N_ROUNDS + 1
    finally:
        guest.close()
