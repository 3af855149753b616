"""Credentials from files, and the names by which a peer is admitted."""

from __future__ import annotations

import os
import socket
import ssl
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
import trio
from cryptography.hazmat.primitives import serialization as s

from fusemig.daemon.daemon import Daemon
from fusemig.daemon.security import Security
from fusemig.daemon.serve_options import ServeOptions
from fusemig.errors import AuthenticationError
from fusemig.net.credentials import AccessList, Endpoint, Rule, load_credentials, names_of
from fusemig.net.transport import SocketStream, parse_uri
from support.certificates import Authority

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("endpoint", list(Endpoint))
def test_both_ends_insist_on_tls_1_3_and_on_proof(tmp_path: Path, endpoint: Endpoint) -> None:
    """There is no way to ask for less."""
    authority = Authority(tmp_path)
    directory = authority.server() if endpoint is Endpoint.SERVER else authority.client()
    context = load_credentials(directory, endpoint).context
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname is (endpoint is Endpoint.CLIENT)
    assert not context.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF
    (directory / "ca-crl.pem").write_bytes(authority.revocations())
    assert load_credentials(directory, endpoint).context.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF


def test_the_other_ends_files_do_not_do(tmp_path: Path) -> None:
    """A directory of a source is not one of a destination."""
    with pytest.raises(AuthenticationError, match=r"cannot read the certificate .*server-cert\.pem: No such file"):
        load_credentials(Authority(tmp_path).client(), Endpoint.SERVER)


def test_what_cannot_be_a_certificate_is_not_read(tmp_path: Path) -> None:
    """A directory, a FIFO (which would block), a huge file and a key of somebody else's are named, one by one."""
    authority = Authority(tmp_path)
    other = authority.server(directory="other")
    good = authority.server()
    key = good / "server-key.pem"
    key.write_bytes((other / "server-key.pem").read_bytes())
    with pytest.raises(AuthenticationError, match=f"the key in {key} does not belong to {good}/server-cert.pem"):
        load_credentials(good, Endpoint.SERVER)
    key.unlink()
    key.mkdir()
    with pytest.raises(AuthenticationError, match=f"{key} is no regular file"):
        load_credentials(good, Endpoint.SERVER)
    key.rmdir()
    os.mkfifo(key)
    with pytest.raises(AuthenticationError, match=f"{key} is no regular file"):
        load_credentials(good, Endpoint.SERVER)
    key.unlink()
    key.write_bytes(b"\0" * (2 << 20))
    with pytest.raises(AuthenticationError, match=f"{key} is larger than any private key"):
        load_credentials(good, Endpoint.SERVER)


def test_an_encrypted_key_does_not_ask_the_terminal(tmp_path: Path) -> None:
    """Nobody is there to answer."""
    directory = Authority(tmp_path).client()
    path = directory / "client-key.pem"
    key = s.load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"a password")))
    with pytest.raises(AuthenticationError, match=f"the key in {path} is encrypted"):
        load_credentials(directory, Endpoint.CLIENT)


def test_a_leaf_is_no_authority(tmp_path: Path) -> None:
    """With a leaf in ca-cert.pem nothing could ever be verified; that is said at once."""
    directory = Authority(tmp_path).client()
    (directory / "ca-cert.pem").write_bytes((directory / "client-cert.pem").read_bytes())
    with pytest.raises(AuthenticationError, match="is not that of an authority"):
        load_credentials(directory, Endpoint.CLIENT)


def test_any_damage_raises_the_one_error(tmp_path: Path) -> None:
    """Whatever a file holds, nothing else escapes."""
    directory = Authority(tmp_path).client()
    for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem"):
        whole = (directory / name).read_bytes()
        for at in range(0, len(whole) - 40, 97):
            (directory / name).write_bytes(whole[:at] + b"!" + whole[at + 30 :])
            with suppress(AuthenticationError):  # some damage is harmless, as in what stands around a certificate
                load_credentials(directory, Endpoint.CLIENT)
        (directory / name).write_bytes(whole)
    load_credentials(directory, Endpoint.CLIENT)


def test_files_are_read_anew_when_they_have_changed(tmp_path: Path) -> None:
    """What is as it was is not read again; what is being replaced is an error, and then the new one."""
    authority = Authority(tmp_path)
    directory = authority.client()
    first = load_credentials(directory, Endpoint.CLIENT)
    assert first.renewed() is first
    certificate, key = directory / "client-cert.pem", directory / "client-key.pem"
    old_key = key.read_bytes()
    authority.client()
    new_key = key.read_bytes()
    key.write_bytes(old_key)  # only the certificate has been replaced so far
    with pytest.raises(AuthenticationError, match=f"the key in {key} does not belong to {certificate}"):
        first.renewed()
    key.write_bytes(new_key)
    second = first.renewed()
    assert second.context is not first.context
    assert second.renewed() is second
    (directory / "ca-crl.pem").write_bytes(authority.revocations())
    third = second.renewed()
    assert third.context.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF
    certificate.unlink()
    with pytest.raises(AuthenticationError, match=f"cannot read the certificate {certificate}"):
        third.renewed()


def test_a_certificate_that_has_expired_is_named_with_its_end(tmp_path: Path) -> None:
    """From the second after its end on; it can be loaded, for a daemon that has guests is not kept from them."""
    ends = datetime(2031, 2, 3, 4, 5, 6, tzinfo=UTC)
    ours = load_credentials(Authority(tmp_path).client(ends=ends), Endpoint.CLIENT)
    ours.check_valid(ends.timestamp())
    with pytest.raises(AuthenticationError) as caught:
        ours.check_valid(ends.timestamp() + 1)
    assert f"{tmp_path}/client/client-cert.pem has expired on 2031-02-03 04:05:06 UTC; renew it" in str(caught.value)


# Who is admitted

CERTIFICATE = {
    "subject": ((("countryName", "GB"),), (("organizationName", "Home"),), (("commonName", "laptop"),)),
    "subjectAltName": (("DNS", "laptop.example.com"), ("IP Address", "192.0.2.1")),
}


def test_the_names_of_a_certificate() -> None:
    """As RFC 4514, OpenSSL and certtool write them, and the alternative names."""
    expected = ["CN=laptop,O=Home,C=GB", "C=GB,O=Home,CN=laptop", "DNS:laptop.example.com", "IP Address:192.0.2.1"]
    assert names_of(CERTIFICATE) == expected
    assert names_of({}) == []


@pytest.mark.parametrize(
    ("value", "escaped"),
    [("a,O=b", r"a\,O\=b"), ("a\0b", r"a\00b"), ("#a", r"\#a"), (" a ", r"\ a\ "), ("a\\", "a\\\\"), ("é", "é")],
)
def test_no_name_reads_like_another(value: str, escaped: str) -> None:
    """A name that holds a separator is not taken for two."""
    assert names_of({"subject": ((("commonName", value),),)}) == [f"CN={escaped}"]


def test_an_empty_list_admits_nobody() -> None:
    """Nor does a list of others; a rule is exact unless it says otherwise."""
    names = names_of(CERTIFICATE)
    assert not AccessList().admits(names)
    assert not AccessList([Rule("DNS:laptop")]).admits(names)
    assert not AccessList([Rule("DNS:*.example.com")]).admits(names)
    assert not AccessList([Rule("")]).admits([])
    assert AccessList([Rule("DNS:laptop.example.com")]).admits(names)
    assert AccessList([Rule("DNS:*.example.com", is_glob=True)]).admits(names)


def test_the_first_rule_decides() -> None:
    """As in QEMU's authz-list."""
    names = names_of(CERTIFICATE)
    rules = [Rule("CN=laptop,*", is_admitted=False, is_glob=True), Rule("DNS:laptop.example.com")]
    assert not AccessList(rules).admits(names)
    assert AccessList(reversed(rules)).admits(names)
    assert AccessList([], is_admitted_otherwise=True).admits(names)


async def test_what_cannot_be_loaded_yet_admits_nobody_and_sends_nothing_in_plain_text(tmp_path: Path) -> None:
    """Not even where --insecure or one's own host would allow that; twin: without --tls-creds it is allowed."""
    directory = Authority(tmp_path).server()
    key = directory / "server-key.pem"
    content = key.read_bytes()
    key.write_bytes(content[:100])
    security = Security(unloaded=directory, is_destination=True, is_insecure=True)
    near, far = (trio.socket.from_stdlib_socket(one) for one in socket.socketpair())
    stream = SocketStream(near, "peer")
    try:
        await security.load()
        assert security.has_server_credentials
        security.check_listen(parse_uri("tcp:0.0.0.0:0"))
        with pytest.raises(AuthenticationError, match=f"not loaded yet.*{key}"):
            await security.admit(stream)
        with pytest.raises(AuthenticationError, match="not loaded yet"):
            security.outgoing(parse_uri("unix:/nowhere"))
        assert await Security(is_insecure=True).admit(stream) is stream

        key.write_bytes(content)
        await security.load()
        await security.load_later()  # there is nothing left
        security.outgoing(parse_uri("unix:/nowhere"))
        await far.send(b"plain text")
        with pytest.raises(AuthenticationError, match="speaks no TLS"):
            await security.admit(stream)
    finally:
        await stream.aclose()
        far.close()


async def test_an_object_that_is_missing_keeps_no_successor_from_its_guests(tmp_path: Path) -> None:
    """Its port admits nobody, for the parameter names something; a first start is refused."""
    daemon = Daemon(ServeOptions(tmp_path, (), tmp_path / "control", f"unix:{tmp_path}/incoming"))
    daemon.security.tls_creds = "gone"
    near, far = (trio.socket.from_stdlib_socket(one) for one in socket.socketpair())
    stream = SocketStream(near, "peer")
    with far, pytest.raises(AuthenticationError, match="No TLS credentials with id 'gone'"):
        async with daemon.inbound.listening():
            pass
    daemon.store.mounted()
    async with daemon.inbound.listening():
        with pytest.raises(AuthenticationError, match="No TLS credentials with id 'gone'"):
            await daemon.security.admit(stream)
    await stream.aclose()
