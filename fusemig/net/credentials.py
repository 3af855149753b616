"""Credentials: who we are and who may come, from files laid out as QEMU's ``tls-creds-x509`` lays them out.

    ca-cert.pem                          who signs the peers' certificates
    ca-crl.pem                           optional: what was revoked; out of date, it admits nobody
    server-cert.pem, server-key.pem      needed to receive
    client-cert.pem, client-key.pem      needed to send

Both sides prove who they are, with TLS 1.3 and nothing older; there is no way to ask for less. What is wrong with a
file is an `AuthenticationError` that names it, when it is loaded and not when a peer calls. Files are read anew for
each connection (`Credentials.renewed`), so that a certificate can be renewed under a daemon that runs. TLS looks at one
when a connection is made, and never again: one that expires ends no connection.
"""

from __future__ import annotations

import os
import ssl
import stat
import time
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fusemig.errors import AuthenticationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

_MAX_FILE_BYTES: Final = 1 << 20
_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
_REVOCATIONS: Final = b"-----BEGIN X509 CRL-----"
_KEY: Final = b"PRIVATE KEY-----"
_SHORT_NAMES: Final = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
    "streetAddress": "STREET",
    "userId": "UID",
}
"""RFC 4514, section 3; other types keep OpenSSL's name."""


class Endpoint(StrEnum):
    """Which end of a connection credentials are for; QAPI QCryptoTLSCredsEndpoint."""

    CLIENT = "client"
    SERVER = "server"


class Credentials(NamedTuple):
    """Loaded credentials."""

    directory: Path
    endpoint: Endpoint
    context: ssl.SSLContext
    ends_at: float
    """When the certificate ends, in seconds of the Unix epoch."""
    state: tuple[tuple[int, ...], ...]
    """Differs from that of other contents of the files."""

    @property
    def certificate(self) -> Path:
        """The certificate's file."""
        return self.directory / f"{self.endpoint}-cert.pem"

    @property
    def until(self) -> str:
        """When the certificate ends, for people."""
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.ends_at))

    def renewed(self) -> Credentials:
        """Return them as the files are now, or these where nothing has changed; may sleep.

        Raises:
            AuthenticationError: as `load_credentials`.
        """
        if _state_of(self.directory, self.endpoint) == self.state:
            return self
        return load_credentials(self.directory, self.endpoint)

    def check_valid(self, now: float) -> None:
        """See that the certificate has not expired.

        Raises:
            AuthenticationError: it has, at ``now`` (seconds of the Unix epoch).
        """
        if now > self.ends_at:
            raise AuthenticationError(
                f"the certificate {self.certificate} has expired on {self.until}; renew it, which needs no restart, "
                "then migrate again (--resume goes on)"
            )


def load_credentials(directory: Path, endpoint: Endpoint) -> Credentials:
    """Load one end's files from ``directory``; may sleep.

    Raises:
        AuthenticationError: one cannot be read or used.
    """
    state = _state_of(directory, endpoint)
    authority = directory / "ca-cert.pem"
    revocations = directory / "ca-crl.pem"
    certificate = directory / f"{endpoint}-cert.pem"
    key = directory / f"{endpoint}-key.pem"
    is_server = endpoint is Endpoint.SERVER
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    if is_server:
        context.num_tickets = 0  # a session is never resumed
    _load_authority(context, authority)
    if revocations.exists():
        _load(context, revocations, _REVOCATIONS, "revocation list")
        if not context.cert_store_stats()["crl"]:
            raise AuthenticationError(f"{revocations} holds no revocation list: replace it, or remove it")
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    _load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, _CERTIFICATE, "certificate")
    _check_file(key, _KEY, "private key")
    _load_chain(context, certificate, key)
    return Credentials(directory, endpoint, context, _ends_at(certificate), state)


def load_own(directory: Path, *, is_destination: bool) -> tuple[Credentials | None, Credentials | None]:
    """Return what proves a daemon as a destination, and as a source; may sleep.

    A destination may have no client's files; what is no destination needs no server's.

    Raises:
        AuthenticationError: a file cannot be read or used.
    """
    server = load_credentials(directory, Endpoint.SERVER) if is_destination else None
    has_client = not is_destination or (directory / f"{Endpoint.CLIENT}-cert.pem").exists()
    return server, load_credentials(directory, Endpoint.CLIENT) if has_client else None


def _state_of(directory: Path, endpoint: Endpoint) -> tuple[tuple[int, ...], ...]:
    found: list[tuple[int, ...]] = []
    for name in ("ca-cert.pem", "ca-crl.pem", f"{endpoint}-cert.pem", f"{endpoint}-key.pem"):
        try:
            status = os.stat(directory / name)
        except OSError as exc:
            found.append((exc.errno or 0,))
        else:
            found.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(found)


def _load_authority(context: ssl.SSLContext, path: Path) -> None:
    _load(context, path, _CERTIFICATE, "certificate")
    if not context.cert_store_stats()["x509_ca"]:
        raise AuthenticationError(
            f"the certificate in {path} is not that of an authority, which may sign others (basicConstraints CA): "
            "put the authority's there"
        )


def _load(context: ssl.SSLContext, path: Path, marker: bytes, what: str) -> None:
    _check_file(path, marker, what)
    try:
        context.load_verify_locations(path)
    except (ssl.SSLError, OSError) as exc:
        raise AuthenticationError(f"the {what} in {path} is damaged ({_reason(exc)}): replace it") from exc


def _load_chain(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    def refuse_password() -> str:
        raise AuthenticationError(
            f"the key in {key} is encrypted and nobody is there to ask: store it without password"
        )

    try:
        context.load_cert_chain(certificate, key, refuse_password)
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise AuthenticationError(f"the key in {key} does not belong to {certificate}: copy both again") from exc
        raise AuthenticationError(f"{certificate} with {key} cannot be used ({_reason(exc)}): make them anew") from exc
    except OSError as exc:
        raise AuthenticationError(f"cannot read {certificate} or {key}: {exc.strerror or exc}") from exc


def decode_certificate(path: Path) -> dict[str, Any]:
    """Return what the first certificate of a file says, as `ssl.SSLSocket.getpeercert` does.

    Raises:
        OSError: it cannot be read, or is none (`ssl.SSLError`).
    """
    found: dict[str, Any] = ssl._ssl._test_decode_cert(path)  # type: ignore[attr-defined]  # noqa: SLF001  (no public one)
    return found


def _ends_at(path: Path) -> float:
    try:
        return ssl.cert_time_to_seconds(decode_certificate(path)["notAfter"])
    except (OSError, ValueError) as exc:
        raise AuthenticationError(f"the certificate in {path} does not say until when it is valid: replace it") from exc


def _check_file(path: Path, marker: bytes, what: str) -> None:
    """See that a file is there and looks like what it should be; OpenSSL would not say which file it means."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise AuthenticationError(f"{path} is no regular file: put the {what} there")
            if status.st_size > _MAX_FILE_BYTES:
                raise AuthenticationError(f"{path} is larger than any {what}: put the {what} there")
            content = os.read(fd, _MAX_FILE_BYTES)
        finally:
            os.close(fd)
    except OSError as exc:
        raise AuthenticationError(
            f"cannot read the {what} {path}: {exc.strerror}; docs/security.md says which files --tls-creds needs"
        ) from exc
    if marker not in content:
        raise AuthenticationError(f"{path} holds no {what} in PEM: put the {what} there")


def _reason(exc: OSError) -> str:
    if isinstance(exc, ssl.SSLError) and exc.reason:
        return exc.reason.lower().replace("_", " ")
    return exc.strerror or str(exc)


class Rule(NamedTuple):
    """One line of an `AccessList`."""

    match: str
    is_admitted: bool = True
    is_glob: bool = False

    def covers(self, name: str) -> bool:
        """Tell whether it is about ``name``."""
        return fnmatchcase(name, self.match) if self.is_glob else name == self.match


class AccessList:
    """Who may connect: the first rule that covers one of a certificate's names decides."""

    def __init__(self, rules: Iterable[Rule] = (), *, is_admitted_otherwise: bool = False) -> None:
        """Keep the rules; an empty list admits nobody."""
        self.rules = tuple(rules)
        self._is_admitted_otherwise = is_admitted_otherwise

    def admits(self, names: Sequence[str]) -> bool:
        """Tell whether a peer with these names may come."""
        for rule in self.rules:
            if any(rule.covers(name) for name in names):
                return rule.is_admitted
        return self._is_admitted_otherwise


def names_of(certificate: Mapping[str, Any]) -> list[str]:
    """Return the names by which a peer may be listed, the one for people first.

    The subject's distinguished name as RFC 4514 writes it, then in the order in which it is encoded, which is how QEMU
    shows it; then the alternative names, as ``DNS:host``.

    Args:
        certificate: what `ssl.SSLSocket.getpeercert` returns.
    """
    parts = [
        "+".join(f"{_SHORT_NAMES.get(kind, kind)}={_escape(value)}" for kind, value in rdn)
        for rdn in certificate.get("subject", ())
    ]
    subjects = [",".join(reversed(parts)), ",".join(parts)] if parts else []
    others = [f"{kind}:{value}" for kind, value in certificate.get("subjectAltName", ()) if isinstance(value, str)]
    return list(dict.fromkeys(subjects + others))


def _escape(value: str) -> str:
    """Write an attribute's value so that no other name reads the same (RFC 4514, section 2.4)."""
    escaped = "".join("\\00" if one == "\0" else f"\\{one}" if one in ',+"\\<>;=' else one for one in value)
    if escaped.startswith(("#", " ")):
        escaped = f"\\{escaped}"
    if escaped.endswith(" ") and len(value) > 1:
        escaped = f"{escaped[:-1]}\\ "
    return escaped
