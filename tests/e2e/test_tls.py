"""Migrations over TLS between real daemons, and everybody who must not take part in one."""

from __future__ import annotations

import random
import select
import socket
import ssl
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Self

import pytest

from support import resilient
from support.certificates import HOST, SOURCE_IDENTITY, Authority
from support.hosts import (
    MIB,
    QmpRefusedError,
    assert_migrates,
    assert_unharmed,
    pread,
    pwrite,
    reserved_port,
    wait_until,
    write_random,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.hosts import Host, Hosts

pytestmark = pytest.mark.fuse

LISTED = ("--tls-authz", SOURCE_IDENTITY)


@pytest.fixture
def authority(place: Path) -> Authority:
    """Give an authority whose directories lie in the test's own."""
    return Authority(place / "pki")


def tls_destination(hosts: Hosts, credentials: Path, *listed: str, incoming: str = "tcp:127.0.0.1:0") -> Host:
    """Start a destination that takes ``vda`` over TLS."""
    return hosts.destination(incoming=incoming, options=["--tls-creds", credentials, *listed])


def source(hosts: Hosts, size: int = 8 * MIB) -> Host:
    """Start a source with a disk ``vda``."""
    return hosts.start("source", {"vda": write_random(hosts.directory / "source.img", size)})


def rejections(host: Host) -> int:
    """Return how many connections were never a migration."""
    count: int = host.status()["incoming"]["rejected-connections"]
    return count


def address(host: Host) -> tuple[str, int]:
    """Return where it listens."""
    return HOST, int(host.uri.rsplit(":", 1)[1])


def test_a_migration_over_tls(hosts: Hosts, authority: Authority) -> None:
    """Every byte arrives, the guest's writes meanwhile too, and both sides say that it was over TLS."""
    here, there = source(hosts, 64 * MIB), tls_destination(hosts, authority.server(), *LISTED)
    here.pause_before_switchover()
    command = here.start_migrate(there.uri, "--tls-creds", authority.client())
    here.wait_phase("pre-switchover")
    pwrite(here.file(), b"written meanwhile", 5 * MIB)
    here.proceed()
    assert command.finish().exit_code == 0
    assert here.images["vda"].read_bytes() == there.images["vda"].read_bytes()
    assert pread(there.images["vda"], 17, 5 * MIB) == b"written meanwhile"
    pwrite(there.file(), b"taken over")
    assert there.status()["incoming"]["tls"] is True
    assert f"identity=CN={SOURCE_IDENTITY.removeprefix('DNS:')}" in there.log().replace("'", "")


def test_nothing_of_the_disk_crosses_in_the_clear(hosts: Hosts, authority: Authority) -> None:
    """A tap on the way sees neither the disk nor its name; without TLS it sees both."""
    secret = b"a secret that lies on the disk, " * 16
    here = source(hosts, 2 * MIB)
    pwrite(here.file(), secret, MIB)
    there = tls_destination(hosts, authority.server(), *LISTED)
    plain = hosts.start("plain", {"vda": hosts.directory / "plain.img"}, incoming="tcp:127.0.0.1:0")
    seen = {}
    for target, options in ((plain, []), (there, ["--tls-creds", authority.client()])):
        if target is there:
            here = hosts.start("again", {"vda": write_random(hosts.directory / "again.img", 2 * MIB)})
            pwrite(here.file(), secret, MIB)
        with Tap(address(target)) as tap:
            assert here.migrate(f"tcp:{HOST}:{tap.port}", *options).exit_code == 0
        seen[target.name] = tap.seen
    assert secret in seen["plain"]
    assert b'"vda"' in seen["plain"]
    assert secret not in seen["destination"]
    # With its quotes: three letters alone stand in two MiB of ciphertext by chance once in eight runs.
    assert b'"vda"' not in seen["destination"]
    assert len(seen["destination"]) > 2 * MIB


class Tap:
    """Forwards one connection and keeps what the source sent."""

    def __init__(self, target: tuple[str, int]) -> None:
        """Forward to ``target``."""
        self._target = target
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.seen = bytearray()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._forward)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(40)
        self._listener.close()

    def _forward(self) -> None:
        self._listener.settimeout(40)
        near, _ = self._listener.accept()
        with near, socket.create_connection(self._target) as far:
            other = {near: far, far: near}
            while True:
                for one in select.select(list(other), [], [], 40)[0]:
                    data = one.recv(1 << 16)
                    if one is near:
                        self.seen += data
                    if not data:
                        return
                    other[one].sendall(data)


def test_a_source_with_credentials_of_its_own(hosts: Hosts, authority: Authority) -> None:
    """What `serve` was given is used where `migrate` gives nothing, and never dropped for plain text."""
    there, plain = (
        tls_destination(hosts, authority.server(), *LISTED),
        hosts.start("plain", {"vda": hosts.directory / "plain.img"}, incoming="tcp:127.0.0.1:0"),
    )
    image = write_random(hosts.directory / "source.img", 2 * MIB)
    here = hosts.start("source", {"vda": image}, options=["--tls-creds", authority.client()])
    assert here.migrate(plain.uri).exit_code == 4
    assert here.migrate(there.uri).exit_code == 0
    assert image.read_bytes() == there.images["vda"].read_bytes()


# Who is not admitted


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ((), "is not admitted there: start that `fusemig serve` with --tls-authz 'CN=source.example,"),
        (("--tls-authz", "DNS:other.example"), "is not admitted there"),
    ],
    ids=["empty", "another"],
)
def test_a_source_that_is_not_listed(
    hosts: Hosts, authority: Authority, listed: tuple[str, ...], expected: str
) -> None:
    """Exit code 4, with the identity and the option that would admit it; that very option then does."""
    here, there = source(hosts), tls_destination(hosts, authority.server(), *listed)
    client = authority.client()
    done = here.migrate(there.uri, "--tls-creds", client)
    assert done.exit_code == 4
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    wait_until(lambda: rejections(there) == 1, "the rejection")
    assert not there.images["vda"].exists()
    assert_unharmed(here)
    there.stop()
    identity = done.stderr.split("--tls-authz '")[1].rstrip("'\n")
    again = tls_destination(hosts, authority.server(), "--tls-authz", identity)
    assert here.migrate(again.uri, "--tls-creds", client).exit_code == 0


def _wrong_authority(hosts: Hosts, _authority: Authority) -> Path:
    return Authority(hosts.directory / "other-pki").client()


def _expired(_hosts: Hosts, authority: Authority) -> Path:
    return authority.client(is_expired=True)


def _our_ca_their_certificate(hosts: Hosts, authority: Authority) -> Path:
    """Trust the right destination, and show it what a wrong authority signed."""
    path = Authority(hosts.directory / "other-pki").client()
    (path / "ca-cert.pem").write_bytes((authority.client() / "ca-cert.pem").read_bytes())
    return path


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_wrong_authority, "did not prove that it is '127.0.0.1': self-signed certificate in certificate chain"),
        (_expired, "client-cert.pem has expired on "),
        (_our_ca_their_certificate, "did not accept our certificate (tlsv1 alert unknown ca)"),
    ],
    ids=["wrong authority", "expired", "signed by another"],
)
def test_a_source_whose_certificate_is_wrong(
    hosts: Hosts, authority: Authority, make: Callable[[Hosts, Authority], Path], expected: str
) -> None:
    """Exit code 4 and the reason; nothing was created, and the right certificate is still taken."""
    here, there = source(hosts), tls_destination(hosts, authority.server(), *LISTED)
    done = here.migrate(there.uri, "--tls-creds", make(hosts, authority))
    assert (done.exit_code, expected in done.stderr) == (4, True), done.stderr
    assert done.stderr.count("\n") == 1
    assert_unharmed(here)
    assert not there.images["vda"].exists()
    wait_until(lambda: rejections(there) == 1, "the rejection")
    assert here.migrate(there.uri, "--tls-creds", authority.client(directory="good")).exit_code == 0


def test_a_destination_with_an_expired_certificate(hosts: Hosts, authority: Authority) -> None:
    """The source does not talk to it."""
    here, there = source(hosts), tls_destination(hosts, authority.server(is_expired=True), *LISTED)
    done = here.migrate(there.uri, "--tls-creds", authority.client())
    assert done.exit_code == 4
    assert "certificate has expired" in done.stderr
    assert_unharmed(here)


def test_a_destination_with_another_name(hosts: Hosts, authority: Authority) -> None:
    """The name in the URI is checked, and --tls-hostname takes its place."""
    here, there = source(hosts), tls_destination(hosts, authority.server("other.example"), *LISTED)
    client = authority.client()
    done = here.migrate(there.uri, "--tls-creds", client)
    assert done.exit_code == 4
    assert "did not prove that it is '127.0.0.1': IP address mismatch" in done.stderr
    assert "--tls-hostname" in done.stderr
    done = here.migrate(there.uri, "--tls-creds", client, "--tls-hostname", "third.example")
    assert done.exit_code == 4
    assert "did not prove that it is 'third.example': Hostname mismatch" in done.stderr
    assert_unharmed(here)
    assert here.migrate(there.uri, "--tls-creds", client, "--tls-hostname", "other.example").exit_code == 0


def test_a_revoked_source(hosts: Hosts, authority: Authority) -> None:
    """What the destination's revocation list names is not taken; a list without it is harmless."""
    here, client, server = source(hosts), authority.client(), authority.server()
    (server / "ca-crl.pem").write_bytes(authority.revocations(client / "client-cert.pem"))
    there = tls_destination(hosts, server, *LISTED)
    done = here.migrate(there.uri, "--tls-creds", client)
    assert done.exit_code == 4
    assert "did not accept our certificate (sslv3 alert certificate revoked)" in done.stderr
    assert_unharmed(here)
    there.stop()
    (server / "ca-crl.pem").write_bytes(authority.revocations(server / "server-cert.pem"))
    again = tls_destination(hosts, server, *LISTED)
    assert here.migrate(again.uri, "--tls-creds", client).exit_code == 0


def test_a_revoked_destination(hosts: Hosts, authority: Authority) -> None:
    """The source's own list counts for the destination."""
    here, client, server = source(hosts), authority.client(), authority.server()
    (client / "ca-crl.pem").write_bytes(authority.revocations(server / "server-cert.pem"))
    there = tls_destination(hosts, server, *LISTED)
    done = here.migrate(there.uri, "--tls-creds", client)
    assert done.exit_code == 4
    assert "certificate revoked" in done.stderr
    assert_unharmed(here)


# Who does not speak as we do


def test_a_plain_source_at_a_tls_port(hosts: Hosts, authority: Authority) -> None:
    """It is told what is missing; there is no way back to plain text."""
    here, there = source(hosts), tls_destination(hosts, authority.server(), *LISTED)
    done = here.migrate(there.uri)
    expected = f"fusemig: {there.uri} refused: TLS is required there: migrate with --tls-creds DIR\n"
    assert done == (4, "", expected)
    assert_unharmed(here)
    assert not there.images["vda"].exists()
    assert here.migrate(there.uri, "--tls-creds", authority.client()).exit_code == 0


def test_a_tls_source_at_a_plain_port(hosts: Hosts, authority: Authority) -> None:
    """It does not go on in plain text."""
    here, there = source(hosts), hosts.destination()
    done = here.migrate(there.uri, "--tls-creds", authority.client())
    assert done.exit_code == 4
    assert "is `fusemig serve --tls-creds DIR` running there?" in done.stderr
    assert_unharmed(here)
    assert not there.images["vda"].exists()
    assert_migrates(here, there)


def test_an_older_tls(hosts: Hosts, authority: Authority) -> None:
    """A client with a good certificate and TLS 1.2 at most is not taken; with TLS 1.3 its handshake ends."""
    there, client = tls_destination(hosts, authority.server(), *LISTED), authority.client()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(client / "ca-cert.pem")
    context.load_cert_chain(client / "client-cert.pem", client / "client-key.pem")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(address(there), 20) as plain,
        pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"),
    ):
        context.wrap_socket(plain, server_hostname=HOST)
    wait_until(lambda: rejections(there) == 1, "the rejection")
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    with socket.create_connection(address(there), 20) as plain, context.wrap_socket(plain, server_hostname=HOST) as tls:
        assert tls.version() == "TLSv1.3"


def test_a_client_without_a_certificate(hosts: Hosts, authority: Authority) -> None:
    """To know the authority is not enough, and it is told so."""
    there, client = tls_destination(hosts, authority.server(), *LISTED), authority.client()
    context = ssl.create_default_context(cafile=client / "ca-cert.pem")
    with (
        socket.create_connection(address(there), 20) as plain,
        context.wrap_socket(plain, server_hostname=HOST) as tls,
        pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"),
    ):
        tls.recv(1)
    wait_until(lambda: rejections(there) == 1, "the rejection")


# Strangers, while a migration runs


def test_strangers_disturb_nobody(hosts: Hosts, authority: Authority) -> None:
    """Garbage, half a handshake, a plain client and a flood of silent ones leave a running migration alone."""
    here, there = source(hosts), tls_destination(hosts, authority.server(), *LISTED)
    client = authority.client()
    here.pause_before_switchover()
    command = here.start_migrate(there.uri, "--tls-creds", client)
    here.wait_phase("pre-switchover")
    for garbage in (random.Random(1).randbytes(100_000), b"\x16\x03\x01" + bytes(5000), b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(address(there), 20) as stranger:
            try:
                stranger.sendall(garbage)
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(4096):
                    pass
            except (ConnectionResetError, BrokenPipeError):
                pass
    wait_until(lambda: rejections(there) == 3, "three rejections")
    flood = [socket.create_connection(address(there), 20) for _ in range(40)]
    try:
        for stranger in flood[::2]:
            stranger.send(b"\x16")
        wait_until(lambda: rejections(there) >= 3 + 40 - 8, "the flood's end")
        assert here.phase() == "pre-switchover"
        pwrite(here.file(), b"written meanwhile", MIB)
        with Flood(address(there)) as more:
            wait_until(lambda: more.n_connections > 10, "the second flood")
            here.proceed()
            done = command.finish()
        assert done.exit_code == 0, done.stderr
    finally:
        for stranger in flood:
            stranger.close()
    assert here.images["vda"].read_bytes() == there.images["vda"].read_bytes()
    assert here.migration()["x-fusemig"]["frozen-ms"] < 5000


class Flood:
    """Strangers who connect one after the other, say half a word, and leave; a context manager."""

    def __init__(self, target: tuple[str, int]) -> None:
        """Connect to ``target``."""
        self.n_connections = 0
        self._target = target
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(40)

    def _run(self) -> None:
        while not self._is_over.is_set():
            with suppress(OSError), socket.create_connection(self._target, 1) as stranger:
                self.n_connections += 1
                stranger.send(b"\x16\x03\x01"[: self.n_connections % 4])


def test_a_source_gets_through_a_crowd(hosts: Hosts, authority: Authority) -> None:
    """Those who wait for nothing drive out each other, and not the one who comes after them."""
    here, there = source(hosts), tls_destination(hosts, authority.server(), *LISTED)
    crowd = [socket.create_connection(address(there), 20) for _ in range(12)]
    try:
        assert here.migrate(there.uri, "--tls-creds", authority.client()).exit_code == 0
    finally:
        for stranger in crowd:
            stranger.close()
    assert rejections(there) >= 8


# Broken files


def _spoil(path: Path, content: bytes | None) -> None:
    path.unlink()
    if content is not None:
        path.write_bytes(content)


GARBAGE = b"-----BEGIN CERTIFICATE-----\nnot base64 at all!\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("ca-cert.pem", None, "cannot read the certificate {}: No such file or directory; docs/security.md says"),
        ("ca-cert.pem", b"", "{} holds no certificate in PEM"),
        ("ca-cert.pem", GARBAGE, "the certificate in {} is damaged ("),
        ("server-cert.pem", None, "cannot read the certificate {}: No such file"),
        ("server-cert.pem", GARBAGE, "the certificate in {} is damaged ("),
        ("server-key.pem", None, "cannot read the private key {}: No such file"),
        ("server-key.pem", b"\x00" * 100, "{} holds no private key in PEM"),
        ("server-key.pem", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "cannot be used ("),
        ("ca-crl.pem", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", "the revocation list in {} is dam"),
    ],
)
def test_broken_credentials(
    hosts: Hosts, authority: Authority, name: str, content: bytes | None, expected: str
) -> None:
    """One line that names the file, and exit code 4; nothing is mounted."""
    server = authority.server()
    (server / name).touch()
    _spoil(server / name, content)
    host = hosts.make(
        "refused", {"vda": hosts.directory / "b.img"}, incoming="tcp:127.0.0.1:0", options=["--tls-creds", server]
    )
    done = host.serve()
    assert done.exit_code == 4
    assert expected.format(server / name) in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_source_says_what_is_wrong_with_its_own_files(hosts: Hosts, authority: Authority) -> None:
    """A relative directory is the caller's; what is missing there is named, with exit code 4."""
    here, client = source(hosts, MIB), authority.client()
    (client / "client-key.pem").unlink()
    done = here.migrate("tcp:127.0.0.1:1", "--tls-creds", client)
    assert done.exit_code == 4
    assert f"cannot read the private key {client}/client-key.pem: No such file" in done.stderr
    assert here.phase() == "none"


# As QEMU is told it


def make_credentials(host: Host, name: str, directory: Path, endpoint: str) -> None:
    """Make a ``tls-creds-x509`` object, as libvirt does, and name it in the migration parameters."""
    host.qmp.execute(
        "object-add",
        {"qom-type": "tls-creds-x509", "id": name, "dir": str(directory), "endpoint": endpoint, "verify-peer": True},
    )
    host.qmp.execute("migrate-set-parameters", {"tls-creds": name})


def test_tls_through_qmp(hosts: Hosts, authority: Authority) -> None:
    """Objects and parameters as in QEMU, on both sides, with `--incoming defer`; empty parameters end it."""
    here, there = source(hosts), hosts.destination(incoming="defer")
    wait_until(lambda: "serving" in there.log(), "the end of the start")
    make_credentials(there, "tls0", authority.server("other.example"), "server")
    rules = [{"match": "CN=source.*", "policy": "allow", "format": "glob"}]
    there.qmp.execute("object-add", {"qom-type": "authz-list", "id": "who", "rules": rules})
    there.qmp.execute("migrate-incoming", {"uri": "tcp:0.0.0.0:0"})
    uri = there.uri.replace("0.0.0.0", HOST)  # noqa: S104
    make_credentials(here, "tls0", authority.client(), "client")
    parameters = here.qmp.execute("query-migrate-parameters")
    assert [parameters[name] for name in ("tls-creds", "tls-hostname", "tls-authz")] == ["tls0", "", ""]
    for hostname, authz, expected in (
        ("", "", "did not prove that it is '127.0.0.1'"),
        ("other.example", "", "is not admitted there"),
        ("other.example", "nothing", "is not admitted there"),
    ):
        here.qmp.execute("migrate-set-parameters", {"tls-hostname": hostname})
        there.qmp.execute("migrate-set-parameters", {"tls-authz": authz})
        done = here.migrate(uri)
        assert (done.exit_code, expected in done.stderr) == (4, True), done.stderr
    with pytest.raises(QmpRefusedError, match="object 'tls0' is in use, can not be deleted"):
        here.qmp.execute("object-del", {"id": "tls0"})
    here.qmp.execute("migrate-set-parameters", {"tls-creds": ""})
    here.qmp.execute("object-del", {"id": "tls0"})
    assert here.migrate(uri).stderr.endswith("TLS is required there: migrate with --tls-creds DIR\n")
    make_credentials(here, "tls1", authority.client(), "client")
    there.qmp.execute("migrate-set-parameters", {"tls-authz": "who"})
    assert here.migrate(uri).exit_code == 0
    assert here.images["vda"].read_bytes() == there.images["vda"].read_bytes()


def test_objects_that_cannot_be(hosts: Hosts, authority: Authority) -> None:
    """What an object lacks, what it cannot have, and the wrong end of it are refused, with the reason."""
    here = source(hosts, MIB)
    server = str(authority.server())
    for arguments, expected in (
        ({"qom-type": "tls-creds-x509", "id": "a"}, "Parameter 'dir' is missing"),
        ({"qom-type": "authz-simple", "id": "a"}, "Parameter 'identity' is missing"),
        ({"qom-type": "tls-creds-psk", "id": "a"}, "Parameter 'qom-type' does not accept value 'tls-creds-psk'"),
        ({"qom-type": "tls-creds-x509", "id": "a", "dir": server, "verify-peer": False}, "'verify-peer' must be true"),
        ({"qom-type": "tls-creds-x509", "id": "a", "dir": server, "priority": "NORMAL"}, "'priority' is unexpected"),
        ({"qom-type": "tls-creds-x509", "id": "a", "dir": "/nowhere"}, "cannot read the certificate /nowhere/ca-cert"),
    ):
        with pytest.raises(QmpRefusedError, match=expected):
            here.qmp.execute("object-add", arguments)
    with pytest.raises(QmpRefusedError, match="object 'a' not found"):
        here.qmp.execute("object-del", {"id": "a"})
    make_credentials(here, "a", authority.server(), "server")
    with pytest.raises(QmpRefusedError, match="attempt to add duplicate property 'a' to object"):
        make_credentials(here, "a", authority.server(), "server")
    done = here.migrate("tcp:127.0.0.1:1")
    assert done.exit_code == 4
    assert "Expected TLS credentials for a client endpoint" in done.stderr
    here.qmp.execute("migrate-set-parameters", {"tls-creds": "b"})
    assert "No TLS credentials with id 'b'" in here.migrate("tcp:127.0.0.1:1").stderr
    assert here.phase() == "none"


# Without TLS


@pytest.mark.parametrize("uri", ["tcp:0.0.0.0:0", "tcp:[::]:0", "tcp:192.0.2.1:4444"])
def test_plain_text_is_not_taken_from_the_network(hosts: Hosts, place: Path, uri: str) -> None:
    """Exit code 2 and the three ways on, from the command line and through QMP."""
    done = hosts.make("refused", {"vda": place / "b.img"}, incoming=uri).serve()
    expected = (
        f"fusemig: {uri} would take disks in plain text from anybody on the network: add --tls-creds DIR, listen at "
        "tcp:127.0.0.1:PORT or unix:PATH, or say --insecure\n"
    )
    assert done == (2, "", expected)
    deferred = hosts.destination(incoming="defer")
    with pytest.raises(QmpRefusedError, match="would take disks in plain text from anybody"):
        deferred.qmp.execute("migrate-incoming", {"uri": uri})


def test_plain_text_does_not_go_to_the_network(hosts: Hosts) -> None:
    """Exit code 2, before anything is connected."""
    here = source(hosts, MIB)
    done = here.migrate("tcp:192.0.2.1:4444")
    assert done.exit_code == 2
    assert "in plain text that anybody there can read and change: add --tls-creds DIR" in done.stderr
    assert here.phase() == "none"
    assert_unharmed(here)


def own_address() -> str:
    """Return an address of this machine that is not loopback's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it asks which address would be used
        except OSError:
            pytest.skip("this machine has no address but loopback")
        own: str = probe.getsockname()[0]
        return own


def test_insecure_is_what_it_says(hosts: Hosts) -> None:
    """With --insecure on both sides plain text goes through any address; each side needs it for itself."""
    here, there = source(hosts), hosts.destination(incoming="tcp:0.0.0.0:0", options=["--insecure"])
    uri = f"tcp:{own_address()}:{address(there)[1]}"
    assert here.migrate(uri).exit_code == 2
    assert here.migrate(uri, "--insecure").exit_code == 0
    assert here.images["vda"].read_bytes() == there.images["vda"].read_bytes()


def test_tls_over_a_unix_socket(hosts: Hosts, authority: Authority, place: Path) -> None:
    """There is no host in such a URI: the name to check must be given."""
    uri = f"unix:{place / 'incoming'}"
    here = source(hosts)
    there = tls_destination(hosts, authority.server("there.example"), *LISTED, incoming=uri)
    client = authority.client()
    done = here.migrate(uri, "--tls-creds", client)
    assert done == (2, "", f"fusemig: {uri} names no host to check the certificate against: add --tls-hostname NAME\n")
    assert here.migrate(uri, "--tls-creds", client, "--tls-hostname", "there.example").exit_code == 0
    assert here.images["vda"].read_bytes() == there.images["vda"].read_bytes()


def test_options_that_contradict_each_other(hosts: Hosts, authority: Authority, place: Path) -> None:
    """Exit code 2: nothing that was asked for is silently left out."""
    server = authority.server()
    for options, incoming, expected in (
        (["--tls-authz", "DNS:x"], "tcp:127.0.0.1:0", "add --tls-creds DIR"),
        (["--tls-authz", "DNS:x", "--tls-creds", server], None, "and --incoming URI"),
        (["--tls-creds", server, "--insecure"], "tcp:127.0.0.1:0", "leave one of them out"),
    ):
        done = hosts.make("refused", {"vda": place / "b.img"}, incoming=incoming, options=options).serve()
        assert (done.exit_code, expected in done.stderr) == (2, True), done.stderr


# After a crash


def test_both_sides_restart_and_settle_it_over_tls(hosts: Hosts, authority: Authority) -> None:
    """A restarted source that is in doubt asks a restarted destination as the migration did: its files, its name."""
    client, server = authority.client(), authority.server("elsewhere.example")
    image, copy = write_random(hosts.directory / "a.img", 4 * MIB), hosts.directory / "b.img"
    uri = f"unix:{hosts.directory}/incoming"
    taking = {"incoming": uri, "options": ["--tls-creds", server, *LISTED]}
    here = hosts.start("source", {"vda": image})
    there = hosts.start("destination", {"vda": copy}, failpoint="after-commit-received:kill", **taking)
    done = here.migrate(uri, "--tls-creds", client, "--tls-hostname", "elsewhere.example")
    assert done.exit_code == 7, done.stderr
    there.wait_killed()
    here.stop()
    there = hosts.start("again", {"vda": copy}, **taking)
    # Without the files it cannot ask, says so, and nobody becomes the owner.
    away = client.rename(client.with_name("away"))
    without = hosts.start("without", {"vda": image})
    wait_until(lambda: f"{client}" in without.log(), "the missing files")
    assert without.disk()["state"] == "handed-off"
    assert str(client / "ca-cert.pem") in without.disk()["in-doubt"]
    without.stop()
    away.rename(client)
    asking = hosts.start("asking", {"vda": image})
    wait_until(lambda: asking.disk()["state"] == "released", "the answer")
    pwrite(there.file(), b"taken over")
    with pytest.raises(OSError, match="Read-only"):
        pwrite(asking.file(), b"x")


def test_both_sides_restart_and_settle_it_in_plain_text(hosts: Hosts) -> None:
    """Who was allowed plain text for one migration asks about it so after a restart, and sends nothing else."""
    with reserved_port() as port:
        restart_in_plain_text(hosts, f"tcp:{own_address()}:{port}")


def restart_in_plain_text(hosts: Hosts, uri: str) -> None:
    """Do so, with a destination that listens at ``uri``."""
    image, copy = write_random(hosts.directory / "a.img", MIB), hosts.directory / "b.img"
    taking = {"incoming": uri, "options": ["--insecure"]}
    here = hosts.start("source", {"vda": image})
    there = hosts.start("destination", {"vda": copy}, failpoint="after-commit-received:kill", **taking)
    assert here.migrate(uri, "--insecure").exit_code == 7
    there.wait_killed()
    here.stop()
    there = hosts.start("again", {"vda": copy}, **taking)
    asking = hosts.start("asking", {"vda": image, "other": write_random(hosts.directory / "other.img", MIB)})
    wait_until(lambda: asking.disk()["state"] == "released", "the answer")
    pwrite(there.file(), b"taken over")
    refused = asking.migrate(uri, "--disk", "other")
    assert refused.exit_code == 2
    assert "in plain text" in refused.stderr


def test_credentials_that_are_missing_keep_no_successor_from_its_guests(hosts: Hosts, authority: Authority) -> None:
    """It serves its disks and refuses migrations, until the files are there again; a first start is refused."""
    credentials = authority.client()
    here = resilient.start(hosts, "--tls-creds", str(credentials))
    certificate = credentials / "client-cert.pem"
    content = certificate.read_bytes()
    certificate.write_bytes(content[:100])
    resilient.kill_and_wait(here)
    pwrite(here.file(), b"written", 4096)
    done = here.migrate("tcp:127.0.0.1:1")
    assert (done.exit_code, "are not loaded yet" in done.stderr) == (4, True)
    certificate.write_bytes(content)
    wait_until(lambda: "credentials loaded" in here.log(), "the credentials")
    assert "are not loaded yet" not in here.migrate("tcp:127.0.0.1:1").stderr
    certificate.unlink()
    image = write_random(hosts.directory / "first.img", MIB)
    first = hosts.make("first", {"vda": image}, options=["--tls-creds", credentials])
    first.launch()
    assert (first.wait(), "cannot read the certificate" in first.log()) == (4, True)
