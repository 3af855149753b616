"""A successor answers guests before it has loaded the rest of itself, and by the same rules."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest

from support.certificates import Authority
from support.hosts import DEADLINE_S, pread, wait_until
from support.resilient import kill_daemon, n_served, start

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse

LATE = (
    *("trio", "pyfuse3", "rich", "prometheus_client", "h11", "attr", "fusemig.daemon.daemon"),
    *("fusemig.daemon.commands", "fusemig.control.server", "fusemig.migration", "fusemig.runtimes"),
    *("fusemig.wire.native", "fusemig.wire.qemu_block", "fusemig.net.tls", "fusemig.net.credentials"),
)
"""What guests must not wait for."""
EARLY = "fusemig.disk.journal"
"""Something that a successor loads at first."""
_LATE = """
import os, sys, time
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in {late!r}:
            while os.path.exists({trigger!r}):
                time.sleep(0.01)
sys.meta_path.insert(0, Finder())
from fusemig.cli import main
from fusemig.daemon.served import ServedDisk
if {is_forgetful}:
    ServedDisk.set_held = lambda self, is_held: None
del sys.argv[1:4]
main()
"""


@pytest.fixture
def trigger(place: Path) -> Path:
    """Return the path of a file that holds up whoever loads what can come later, as long as it exists."""
    return place / "trigger"


def serve_late(
    hosts: Hosts, trigger: Path, *options: str, is_forgetful: bool = False, is_too_much: bool = False
) -> Host:
    """Serve with successors that the trigger holds up; the twins forget `stop`, or load too much at first."""
    script = trigger.with_name("late.py")
    late = (*LATE, EARLY) if is_too_much else LATE
    script.write_text(_LATE.format(trigger=str(trigger), is_forgetful=is_forgetful, late=late))
    return start(hosts, *options, prefix=[sys.executable, script])


@contextmanager
def waiting(trigger: Path) -> Iterator[None]:
    """Have successors held up while the body runs."""
    trigger.touch()
    try:
        yield
    finally:
        trigger.unlink(missing_ok=True)


class Disk:
    """A file of the mount that a guest opened past the page cache, before anybody was killed."""

    def __init__(self, path: Path) -> None:
        """Open it."""
        self.fd = os.open(path, os.O_RDWR | os.O_DIRECT)

    def write(self, data: bytes, offset: int) -> int:
        """Write a block that begins with ``data``; return how much was written."""
        page = mmap.mmap(-1, 4096)
        page[: len(data)] = data
        return os.pwrite(self.fd, page, offset)

    def start_writing(self, data: bytes, offset: int) -> threading.Thread:
        """Do so in a thread, for it may wait."""
        thread = threading.Thread(target=self.write, args=(data, offset), daemon=True)
        thread.start()
        return thread

    def read(self, length: int, offset: int) -> bytes:
        """Return the beginning of a block."""
        page = mmap.mmap(-1, 4096)
        os.preadv(self.fd, [page], offset)
        return page[:length]

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)


def test_what_is_loaded_at_first_is_named() -> None:
    """Quicker, and with a name, than the guest of the next test that waits for it."""
    code = "import sys, fusemig.cli.main, fusemig.cli.serve, fusemig.succession.fdstore; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert EARLY in loaded
    assert not loaded & set(LATE)


def test_guests_are_answered_while_the_rest_is_not_loaded(hosts: Hosts, trigger: Path) -> None:
    """Data, attributes and closes of files that are open; what is asked of names waits for the rest."""
    host = serve_late(hosts, trigger, "--tls-creds", str(Authority(trigger.parent).client()))
    size = host.images["vda"].stat().st_size
    with closing(Disk(host.file())) as disk:
        with waiting(trigger):
            before = kill_daemon(host)
            assert disk.write(b"early", 4096) == 4096
            os.fdatasync(disk.fd)
            assert disk.read(5, 4096) == b"early"
            assert os.fstat(disk.fd).st_size == size  # asked for anew, because of the write
            os.close(os.dup(disk.fd))  # each close is a FLUSH, and waits for its answer
            names = threading.Thread(target=os.listdir, args=(host.mount,), daemon=True)
            names.start()
            assert n_served(host) == before
        wait_until(lambda: n_served(host) > before, "the rest of the successor")
        names.join(DEADLINE_S)
        assert not names.is_alive()
        assert disk.write(b"later", 8192) == 4096
    assert host.disk()["gate"] == "open"
    assert host.stop() == 0
    assert pread(host.images["vda"], 5, 4096) == b"early"
    assert pread(host.images["vda"], 5, 8192) == b"later"


def test_what_loads_more_than_that_is_noticed(hosts: Hosts, trigger: Path) -> None:
    """The failing twin: with a module on the list that is loaded at first, the guest waits for it."""
    host = serve_late(hosts, trigger, is_too_much=True)
    with closing(Disk(host.file())) as disk:
        with waiting(trigger):
            kill_daemon(host)
            writer = disk.start_writing(b"waits", 4096)
            writer.join(0.5)
            assert writer.is_alive()
        writer.join(DEADLINE_S)
        assert not writer.is_alive()


@pytest.mark.parametrize("is_forgetful", [False, True], ids=["", "twin"])
def test_what_was_stopped_is_stopped_from_the_first_request_on(
    hosts: Hosts, trigger: Path, *, is_forgetful: bool
) -> None:
    """A parked write is sent again before there is anybody to say `cont` to; a successor that forgot makes it."""
    host = serve_late(hosts, trigger, is_forgetful=is_forgetful)
    with closing(Disk(host.file())) as disk:
        old = disk.read(6, 4096)
        host.qmp.execute("stop")
        if not is_forgetful:
            writer = disk.start_writing(b"parked", 4096)
            wait_until(lambda: host.status()["parked-writes"], "the parked write")
        with waiting(trigger):
            before = kill_daemon(host)
            if is_forgetful:
                writer = disk.start_writing(b"parked", 4096)
                writer.join(DEADLINE_S)
                assert not writer.is_alive()
                return
            assert [disk.read(6, 4096) for _ in range(20)] == [old] * 20
            assert writer.is_alive()
        wait_until(lambda: n_served(host) > before, "the rest of the successor")
        assert disk.read(6, 4096) == old
        assert writer.is_alive()
        host.qmp.execute("cont")
        writer.join(DEADLINE_S)
        assert disk.read(6, 4096) == b"parked"


_FAILING = """
import os, sys
from fusemig.cli import main
from fusemig.errors import ConfigError
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "fusemig.daemon.metrics":  # after fusemig.daemon.inheritance
            try:
                os.unlink({trigger!r})
            except FileNotFoundError:
                return
            {failure}
async def refuse(self):
    raise ConfigError("not now")
sys.meta_path.insert(0, Finder())
del sys.argv[1:4]
main()
"""


@pytest.mark.parametrize(
    "failure",
    ["raise ConfigError('half installed')", "sys.modules['fusemig.daemon.inheritance'].Inheritance.restore = refuse"],
    ids=["loading", "restoring"],
)
def test_a_successor_that_fails_after_its_first_answer_has_one_too(hosts: Hosts, place: Path, failure: str) -> None:
    """Guests have been answered by it; it ends as if killed, the mount lives on."""
    script, trigger = place / "failing.py", place / "trigger"
    script.write_text(_FAILING.format(trigger=str(trigger), failure=failure))
    host = start(hosts, prefix=[sys.executable, script])
    with closing(Disk(host.file())) as disk:
        trigger.touch()
        before = kill_daemon(host)
        assert disk.write(b"served", 4096) == 4096
        wait_until(lambda: n_served(host) > before, "a successor")
        assert not trigger.exists()
        assert host.log().count("starting a successor") == 2
        assert disk.read(6, 4096) == b"served"
    assert host.stop() == 0
