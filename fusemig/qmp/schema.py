"""The vocabulary of the control socket: commands' arguments and results, events, capabilities.

Rules:

1. Names and types are those of QEMU 7.2's QAPI (qapi/migration.json, qapi/block-core.json, qapi/run-state.json); what
   is ours begins with ``x-fusemig-`` or lives inside a member of that name. Python names have underscores for hyphens.
2. Arguments are checked whole before a command sees them (`fusemig.qmp.check`), with QEMU's texts, in QEMU's order:
   members in the order of their declaration, then unknown ones. A member that we do not honour is not declared, so it
   is refused.
3. An optional member that is absent is `UNSET`, in results too. Sizes are bytes, times milliseconds, rates bytes/s.
4. Everything here is data. What a command does, and which value it can honour at the moment, is the daemon's.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, UnsetType, field

from fusemig.qmp import block, codec, estimate, objects, seeing
from fusemig.qmp.base import Arguments as Arguments
from fusemig.qmp.base import NoArguments as NoArguments
from fusemig.qmp.base import Result as Result
from fusemig.qmp.events import EVENTS as EVENTS
from fusemig.qmp.events import MIGRATION_EVENTS as MIGRATION_EVENTS
from fusemig.qmp.events import MigrationEvent as MigrationEvent
from fusemig.qmp.events import MigrationPassEvent as MigrationPassEvent
from fusemig.qmp.events import PacingEvent as PacingEvent
from fusemig.qmp.events import ShutdownEvent as ShutdownEvent
from fusemig.qmp.migrate import Ask as Ask
from fusemig.qmp.migrate import Estimate as Estimate
from fusemig.qmp.migrate import Migrate as Migrate
from fusemig.qmp.migrate import MigrateContinue as MigrateContinue
from fusemig.qmp.migrate import MigrateIncoming as MigrateIncoming
from fusemig.qmp.migrate import MigrateSetCapabilities as MigrateSetCapabilities
from fusemig.qmp.migrate import MigrateSetParameters as MigrateSetParameters
from fusemig.qmp.migrate import MigrationCapabilityStatus as MigrationCapabilityStatus
from fusemig.qmp.migrate import MigrationParameters as MigrationParameters
from fusemig.qmp.migrate import Resolve as Resolve
from fusemig.qmp.migration import CompressionInfo as CompressionInfo
from fusemig.qmp.migration import FusemigMigration as FusemigMigration
from fusemig.qmp.migration import GuestInfo as GuestInfo
from fusemig.qmp.migration import GuestStep as GuestStep
from fusemig.qmp.migration import MigratingDisk as MigratingDisk
from fusemig.qmp.migration import MigrationInfo as MigrationInfo
from fusemig.qmp.migration import MigrationPacing as MigrationPacing
from fusemig.qmp.migration import MigrationStats as MigrationStats
from fusemig.qmp.migration import MigrationWindow as MigrationWindow
from fusemig.qmp.migration import SocketAddress as SocketAddress
from fusemig.qmp.status import Count as Count
from fusemig.qmp.status import DaemonStatus as DaemonStatus
from fusemig.qmp.status import FrozenWithin as FrozenWithin
from fusemig.qmp.status import Incoming as Incoming
from fusemig.qmp.status import MigrationRecord as MigrationRecord
from fusemig.qmp.status import MigrationTotals as MigrationTotals
from fusemig.qmp.status import ServedDisk as ServedDisk
from fusemig.qmp.status import StatusInfo as StatusInfo
from fusemig.qmp.status import Succession as Succession
from fusemig.qmp.status import UpgradeInfo as UpgradeInfo
from fusemig.qmp.status import View as View
from fusemig.qmp.words import ALWAYS_ON_CAPABILITIES as ALWAYS_ON_CAPABILITIES
from fusemig.qmp.words import SUPPORTED_CAPABILITIES as SUPPORTED_CAPABILITIES
from fusemig.qmp.words import Compression as Compression
from fusemig.qmp.words import MigrationCapability as MigrationCapability
from fusemig.qmp.words import MigrationStatus as MigrationStatus
from fusemig.qmp.words import MirrorReach as MirrorReach
from fusemig.qmp.words import Mode as Mode
from fusemig.qmp.words import Order as Order
from fusemig.qmp.words import QmpCapability as QmpCapability
from fusemig.qmp.words import Role as Role
from fusemig.qmp.words import RunState as RunState
from fusemig.qmp.words import ShutdownCause as ShutdownCause
from fusemig.qmp.words import Side as Side
from fusemig.qmp.words import SocketAddressType as SocketAddressType
from fusemig.qmp.words import WireName as WireName


class QmpCapabilities(Arguments, frozen=True, kw_only=True):
    """``qmp_capabilities``; none is offered, so only the empty list can be honoured."""

    enable: list[QmpCapability] = field(default_factory=list)


CpuIndex = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1, description="a CPU number")]


class HumanMonitorCommand(Arguments, frozen=True, kw_only=True):
    """``human-monitor-command``: a line of QEMU's human monitor."""

    command_line: str
    cpu_index: CpuIndex | UnsetType = UNSET
    """Of no meaning; there is no CPU but number 0."""


class Name(Result, frozen=True, kw_only=True):
    """An element of ``query-commands`` and ``query-events``, and ``query-name`` itself."""

    name: str | UnsetType = UNSET


class Uuid(Result, frozen=True, kw_only=True):
    """``query-uuid``."""

    uuid: str = field(name="UUID", default="00000000-0000-0000-0000-000000000000")
    """What a QEMU without ``-uuid`` says."""


COMMANDS: Final[dict[str, type[Arguments]]] = {
    "qmp_capabilities": QmpCapabilities,
    "query-version": NoArguments,
    "query-commands": NoArguments,
    "query-events": NoArguments,
    "query-qmp-schema": NoArguments,
    "query-name": NoArguments,
    "query-uuid": NoArguments,
    "query-status": NoArguments,
    "query-block": NoArguments,
    "query-blockstats": block.QueryBlockstats,
    "query-block-jobs": NoArguments,
    "query-named-block-nodes": block.QueryNamedBlockNodes,
    "query-migrate": NoArguments,
    "query-migrate-parameters": NoArguments,
    "query-migrate-capabilities": NoArguments,
    "migrate": Migrate,
    "migrate_cancel": NoArguments,
    "migrate-continue": MigrateContinue,
    "migrate-start-postcopy": NoArguments,
    "migrate-set-parameters": MigrateSetParameters,
    "migrate-set-capabilities": MigrateSetCapabilities,
    "object-add": objects.ObjectAdd,
    "object-del": objects.ObjectDel,
    "migrate-incoming": MigrateIncoming,
    "migrate-pause": NoArguments,
    "stop": NoArguments,
    "cont": NoArguments,
    "quit": NoArguments,
    "human-monitor-command": HumanMonitorCommand,
    "x-fusemig-status": NoArguments,
    "x-fusemig-estimate": Estimate,
    "x-fusemig-resolve": Resolve,
    "x-fusemig-upgrade": NoArguments,
    "x-fusemig-ask": Ask,
    "x-fusemig-query-view": seeing.QueryView,
    "x-fusemig-query-history": NoArguments,
}
"""Every command and its arguments. The server itself answers the first five."""
RESULTS: Final[dict[str, Any]] = {
    "query-version": codec.Version,
    "query-commands": list[Name],
    "query-events": list[Name],
    "query-qmp-schema": list[Any],
    "query-name": Name,
    "query-uuid": Uuid,
    "query-status": StatusInfo,
    "query-block": list[block.BlockInfo],
    "query-blockstats": list[block.BlockStats],
    "query-block-jobs": list[Any],
    "query-named-block-nodes": list[block.BlockDeviceInfo],
    "query-migrate": MigrationInfo,
    "query-migrate-parameters": MigrationParameters,
    "query-migrate-capabilities": list[MigrationCapabilityStatus],
    "human-monitor-command": str,
    "x-fusemig-status": DaemonStatus,
    "x-fusemig-upgrade": UpgradeInfo,
    "x-fusemig-estimate": estimate.EstimateInfo,
    "x-fusemig-query-view": View,
    "x-fusemig-query-history": list[MigrationRecord],
}
"""What the commands return; those that are not here return the empty object."""
