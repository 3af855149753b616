"""`fusemig doctor`: each finding on a machine that has it and on one that has not, and the command itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trustme
from cryptography import x509

from fusemig.cli import checkup
from fusemig.cli.checkup import Level, Machine
from support.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fusemig.cli.checkup import Finding


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Give a machine on which an ordinary user finds everything."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/fuse").touch()
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/fuse.conf").write_text("user_allow_other\n")
    fuse = tmp_path / "proc/sys/fs/fuse"
    fuse.mkdir(parents=True)
    (fuse / "max_pages_limit").write_text("256\n")
    (fuse / "default_request_timeout").write_text("0\n")
    (tmp_path / "bin").mkdir()
    helper = tmp_path / "bin/fusermount3"
    helper.touch()
    helper.chmod(0o4755)
    return Machine(tmp_path, 1000, "6.12.1-amd64", str(tmp_path / "bin"))


def levels(findings: Iterable[Finding]) -> dict[str, Level]:
    """Return the levels by subject, having seen that whatever is amiss says how to mend it."""
    found = list(findings)
    for finding in found:
        assert bool(finding.remedy) == (finding.level is not Level.OK), finding
    return {finding.subject: finding.level for finding in found}


def test_a_machine_with_everything_is_well(machine: Machine) -> None:
    """No warning for an ordinary user there, nor for root."""
    for one in (machine, replace(machine, uid=0)):
        assert set(levels([*checkup.fuse(one), *checkup.kernel(one)]).values()) == {Level.OK}
    assert "root adds" in next(f.text for f in checkup.fuse(machine) if f.subject == "user")


def test_what_mounting_lacks_is_found(machine: Machine) -> None:
    """No device, no helper, one that is not setuid, no user_allow_other."""
    (machine.root / "bin/fusermount3").chmod(0o755)
    (machine.root / "etc/fuse.conf").write_text("# user_allow_other\n")
    (machine.root / "dev/fuse").unlink()
    found = levels(checkup.fuse(machine))
    assert found["fuse device"] is Level.FAIL
    assert found["fuse helper"] is Level.FAIL
    assert found["allow_other"] is Level.WARN
    (machine.root / "bin/fusermount3").unlink()
    assert levels(checkup.fuse(machine))["fuse helper"] is Level.FAIL
    as_root = levels(checkup.fuse(replace(machine, uid=0)))
    assert as_root["fuse helper"] is as_root["allow_other"] is Level.OK


@pytest.mark.parametrize(
    ("release", "level"), [("6.9.0", Level.OK), ("6.8.12", Level.WARN), ("5.10.0-30", Level.WARN), ("odd", Level.WARN)]
)
def test_old_kernels_are_told_what_they_lack(machine: Machine, release: str, level: Level) -> None:
    """6.9 for a mount that outlives its daemon."""
    assert levels(checkup.kernel(replace(machine, release=release)))["kernel"] is level


def test_the_kernels_limits_are_looked_at(machine: Machine) -> None:
    """Short requests, and a timeout that would end a stopped disk's mount; a kernel without these files is fine."""
    fuse = machine.root / "proc/sys/fs/fuse"
    (fuse / "max_pages_limit").write_text("32")
    (fuse / "default_request_timeout").write_text("20")
    found = levels(checkup.kernel(machine))
    assert found["request size"] is found["request timeout"] is Level.WARN
    for name in ("max_pages_limit", "default_request_timeout"):
        (fuse / name).unlink()
    assert set(levels(checkup.kernel(machine)).values()) == {Level.OK}


def test_space_is_what_a_sparse_image_may_still_take(tmp_path: Path) -> None:
    """Enough, too little, no directory, no image yet, a device."""
    image = tmp_path / "vda.img"
    assert levels(checkup.space("vda", image)) == {"space of vda": Level.OK}
    with image.open("wb") as file:
        file.truncate(1 << 20)
    assert levels(checkup.space("vda", image)) == {"space of vda": Level.OK}
    assert levels(checkup.space("vda", image, 1 << 60)) == {"space of vda": Level.WARN}
    assert levels(checkup.space("vda", tmp_path / "none" / "a")) == {"space of vda": Level.FAIL}
    image.unlink()
    image.symlink_to("/dev/null")
    assert "device" in next(iter(checkup.space("vda", image))).text
    assert set(levels(checkup.state_directory(tmp_path)).values()) <= {Level.OK, Level.WARN}
    assert list(levels(checkup.state_directory(tmp_path / "none")).values()) == [Level.FAIL]


def test_credentials_are_read_as_the_daemon_reads_them(tmp_path: Path) -> None:
    """Good ones, loose keys, a lost key, no directory; and each date that is near or over."""
    authority = Authority(tmp_path)
    directory = authority.server("host.example")
    key = directory / "server-key.pem"
    key.chmod(0o600)
    now = time.time()
    found = list(checkup.credentials(directory, now))
    assert set(levels(found).values()) == {Level.OK}
    assert any("DNS:host.example, until " in finding.text for finding in found)
    certificate = x509.load_pem_x509_certificate((directory / "server-cert.pem").read_bytes())
    ends = certificate.not_valid_after_utc.timestamp()
    subject = f"TLS server in {directory}"
    assert levels(checkup.credentials(directory, ends - 86400))[subject] is Level.WARN
    assert levels(checkup.credentials(directory, ends + 1))[subject] is Level.FAIL
    begins = certificate.not_valid_before_utc.timestamp()
    assert levels(checkup.credentials(directory, begins - 1))[subject] is Level.FAIL
    key.chmod(0o644)
    assert Level.WARN in [f.level for f in checkup.credentials(directory, now) if f.subject == subject]
    key.unlink()
    assert levels(checkup.credentials(directory, now))[subject] is Level.FAIL
    assert levels(checkup.credentials(tmp_path / "none", now))[f"TLS in {tmp_path}/none"] is Level.FAIL


def test_a_servers_certificate_must_name_a_host(tmp_path: Path) -> None:
    """Sources check nothing else, so one without is of no use."""
    ca = trustme.CA()
    directory = Authority(tmp_path).server()
    issued = ca.issue_cert("someone@host.example", common_name="host.example")
    (directory / "ca-cert.pem").write_bytes(ca.cert_pem.bytes())
    (directory / "server-cert.pem").write_bytes(issued.cert_chain_pems[0].bytes())
    (directory / "server-key.pem").write_bytes(issued.private_key_pem.bytes())
    (directory / "server-key.pem").chmod(0o600)
    assert levels(checkup.credentials(directory, time.time()))[f"TLS server in {directory}"] is Level.FAIL


def doctor(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(
        [sys.executable, "-m", "fusemig", "doctor", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"XDG_CONFIG_HOME": "/nonexistent"},
    )


def test_json_is_an_object_a_line_and_the_exit_code_tells_a_failure(tmp_path: Path) -> None:
    """A peer that is not there and a daemon that does not run: both found, exit code 1, nothing on stderr."""
    done = doctor(tmp_path / "none", "--peer", f"unix:{tmp_path}/peer", "--json")
    findings = {line["subject"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert (done.returncode, done.stderr) == (1, "")
    assert findings[f"peer unix:{tmp_path}/peer"]["level"] == "fail"
    assert "fusemig serve --incoming" in findings[f"peer unix:{tmp_path}/peer"]["remedy"]
    assert findings["daemon"]["level"] == "fail"
    assert set(findings["daemon"]) == {"subject", "level", "text", "remedy"}


def test_a_peer_that_answers_is_well(tmp_path: Path) -> None:
    """Nothing is asked of it but to take the connection."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "peer"))
        listener.listen()
        done = doctor("--peer", f"unix:{tmp_path}/peer")
    assert f"ok    peer unix:{tmp_path}/peer: answers within" in done.stdout
