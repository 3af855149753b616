"""Directories of credentials for the tests: one authority, and whatever is wrong with what it signs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

if TYPE_CHECKING:
    from pathlib import Path

HOST = "127.0.0.1"
SOURCE = "source.example"
SOURCE_IDENTITY = f"DNS:{SOURCE}"


class Authority:
    """Signs certificates and writes directories with them."""

    def __init__(self, directory: Path) -> None:
        """Write directories under ``directory``."""
        self._directory = directory
        self._ca = trustme.CA()

    def server(
        self, name: str = HOST, directory: str = "server", *, is_expired: bool = False, ends: datetime | None = None
    ) -> Path:
        """Write a destination's credentials; return the directory."""
        return self._write("server", name, directory, _past() if is_expired else ends)

    def client(
        self, name: str = SOURCE, directory: str = "client", *, is_expired: bool = False, ends: datetime | None = None
    ) -> Path:
        """Write a source's credentials; return the directory."""
        return self._write("client", name, directory, _past() if is_expired else ends)

    def _write(self, endpoint: str, name: str, directory: str, ends: datetime | None) -> Path:
        path = self._directory / directory
        path.mkdir(parents=True, exist_ok=True)
        starts = None if ends is None else ends - timedelta(days=1)
        issued = self._ca.issue_cert(name, common_name=name, not_before=starts, not_after=ends)
        (path / "ca-cert.pem").write_bytes(self._ca.cert_pem.bytes())
        (path / f"{endpoint}-key.pem").write_bytes(issued.private_key_pem.bytes())
        (path / f"{endpoint}-cert.pem").write_bytes(b"".join(one.bytes() for one in issued.cert_chain_pems))
        return path

    def revocations(self, *revoked: Path) -> bytes:
        """Return a revocation list of this authority's, over these certificate files."""
        now = datetime.now(UTC)
        authority = x509.load_pem_x509_certificate(self._ca.cert_pem.bytes())
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(authority.subject)
            .last_update(now - timedelta(days=1))
            .next_update(now + timedelta(days=1))
        )
        for path in revoked:
            serial = x509.load_pem_x509_certificate(path.read_bytes()).serial_number
            one = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - timedelta(hours=1))
            builder = builder.add_revoked_certificate(one.build())
        key = load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)  # type: ignore[arg-type]


def _past() -> datetime:
    return datetime.now(UTC) - timedelta(days=1)
