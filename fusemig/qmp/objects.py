"""QMP's objects, as far as the security of migrations needs them: QAPI ObjectOptions of three types."""

from __future__ import annotations

from enum import StrEnum

from msgspec import UNSET, UnsetType, field

from fusemig.qmp.base import Arguments


class ObjectType(StrEnum):
    """The QAPI ObjectTypes that there are here."""

    AUTHZ_LIST = "authz-list"
    AUTHZ_SIMPLE = "authz-simple"
    TLS_CREDS_X509 = "tls-creds-x509"


class TlsEndpoint(StrEnum):
    """QAPI QCryptoTLSCredsEndpoint."""

    CLIENT = "client"
    SERVER = "server"


class AuthzPolicy(StrEnum):
    """QAPI QAuthZListPolicy."""

    DENY = "deny"
    ALLOW = "allow"


class AuthzFormat(StrEnum):
    """QAPI QAuthZListFormat."""

    EXACT = "exact"
    GLOB = "glob"


class AuthzRule(Arguments, frozen=True, kw_only=True):
    """QAPI QAuthZListRule."""

    match: str
    policy: AuthzPolicy
    format: AuthzFormat = AuthzFormat.EXACT


class ObjectAdd(Arguments, frozen=True, kw_only=True):
    """``object-add``; which of the optional members go with a type is looked at when it is made."""

    qom_type: ObjectType
    id: str
    dir: str | UnsetType = UNSET
    """Of ``tls-creds-x509``, which needs it."""
    endpoint: TlsEndpoint = TlsEndpoint.SERVER
    """Of ``tls-creds-x509``; the default is QEMU's."""
    verify_peer: bool = True
    """Of ``tls-creds-x509``; False cannot be honoured."""
    identity: str | UnsetType = UNSET
    """Of ``authz-simple``, which needs it."""
    policy: AuthzPolicy = AuthzPolicy.DENY
    """Of ``authz-list``: what happens to those whom no rule covers."""
    rules: list[AuthzRule] = field(default_factory=list)
    """Of ``authz-list``."""


class ObjectDel(Arguments, frozen=True, kw_only=True):
    """``object-del``."""

    id: str
