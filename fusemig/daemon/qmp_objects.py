"""What ``object-add`` makes: credentials and lists of who is admitted, from their QMP descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import trio
from msgspec import UnsetType

from fusemig.errors import ConfigError
from fusemig.net.credentials import AccessList, Endpoint, Rule, load_credentials
from fusemig.qmp.objects import AuthzFormat, AuthzPolicy, ObjectType

if TYPE_CHECKING:
    from fusemig.net.credentials import Credentials
    from fusemig.qmp.objects import ObjectAdd


async def make_object(described: ObjectAdd) -> Credentials | AccessList:
    """Make what is described.

    Raises:
        ConfigError: the description lacks something.
        AuthenticationError: credentials cannot be loaded.
    """
    match described.qom_type:
        case ObjectType.TLS_CREDS_X509:
            if not described.verify_peer:
                raise ConfigError("Parameter 'verify-peer' must be true: both sides prove who they are; leave it out")
            return await load(_needed(described.dir, "dir"), Endpoint(described.endpoint))
        case ObjectType.AUTHZ_SIMPLE:
            return AccessList([Rule(_needed(described.identity, "identity"))])
        case ObjectType.AUTHZ_LIST:
            rules = [
                Rule(rule.match, rule.policy is AuthzPolicy.ALLOW, rule.format is AuthzFormat.GLOB)
                for rule in described.rules
            ]
            return AccessList(rules, is_admitted_otherwise=described.policy is AuthzPolicy.ALLOW)


async def load(directory: str, endpoint: Endpoint) -> Credentials:
    """Load credentials on a thread.

    Raises:
        AuthenticationError: they cannot be used.
    """
    return await trio.to_thread.run_sync(load_credentials, Path(directory), endpoint)


def _needed(value: str | UnsetType, name: str) -> str:
    if isinstance(value, UnsetType):
        raise ConfigError(f"Parameter '{name}' is missing")
    return value
