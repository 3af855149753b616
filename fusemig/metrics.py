"""Metrics for Prometheus, made from what `x-fusemig-status` and `query-blockstats` say at the moment of a scrape.

Nothing is counted for them alone, so they cannot tell another story than `fusemig status`, and a guest's request pays
nothing for them. `docs/metrics.md` lists them; names and units follow Prometheus' rules
(prometheus.io/docs/practices/naming), with seconds and bytes as units.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Final

from msgspec import UnsetType
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from fusemig.disk.tracked import Gate
from fusemig.epoch import Ownership
from fusemig.http_server import Answer
from fusemig.qmp import schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prometheus_client.core import (
        Metric,
    )

    from fusemig.http_server import Request
    from fusemig.qmp import block

    Samples = Sequence[tuple[dict[str, str], float]]

PATH: Final = "/metrics"
DISK_STATES: Final = ("waiting", *(state.value for state in Ownership))
OUTCOMES: Final = {
    "source": ("completed", "failed", "cancelled", "in-doubt"),
    "destination": ("completed", "failed", "cancelled"),
}
REJECTION_REASONS: Final = ("failed", "authentication", "refused", "displaced")
_STATUSES: Final = tuple(status.value for status in schema.MigrationStatus)


class Metrics(Collector):
    """The page that Prometheus reads."""

    def __init__(self, status: Callable[[], schema.DaemonStatus], blocks: Callable[[], list[block.BlockStats]]) -> None:
        """Ask these at each scrape."""
        self._status = status
        self._blocks = blocks
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def page(self, request: Request) -> Answer:
        """Return the page in the format that the client prefers: Prometheus' text, or OpenMetrics."""
        encoder, content_type = choose_encoder(request.headers.get("accept", ""))
        return Answer(encoder(self._registry), content_type)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        status = self._status()
        yield _info("fusemig_build", "What runs.", version=status.version, python=platform.python_version())
        yield from _disks(status.disks)
        yield from _requests(self._blocks())
        bugs = status.handler_errors
        yield _plain("fusemig_handler_errors_total", "Requests answered EIO by a bug; see the log.", [({}, bugs)])
        yield from _totals(status.totals)
        if not isinstance(status.incoming, UnsetType):
            counted = _counts(status.incoming.rejected_by_reason, REJECTION_REASONS)
            reasons = [({"reason": what}, count) for what, count in counted.items()]
            yield _plain("fusemig_rejected_connections_total", "Connections that became no migration.", reasons)
        if not isinstance(status.migration, UnsetType):
            yield from _migration(status.migration)


def _plain(name: str, documentation: str, samples: Samples) -> Metric:
    """Return a counter if the name ends in ``_total``, else a gauge; every sample has the same labels."""
    labels = tuple(samples[0][0]) if samples else ()
    family = (
        CounterMetricFamily(name, documentation, labels=labels)
        if name.endswith("_total")
        else GaugeMetricFamily(name, documentation, labels=labels)
    )
    for values, value in samples:
        family.add_metric([values[label] for label in labels], value)
    return family


def _counts(counted: list[schema.Count], known: tuple[str, ...]) -> dict[str, int]:
    """Return what was counted; what may be counted later is there from the start, so that rates begin at 0."""
    return dict.fromkeys(known, 0) | {one.what: one.count for one in counted}


def _info(name: str, documentation: str, **values: str) -> Metric:
    return InfoMetricFamily(name, documentation, value=values)


def _one_of(label: str, names: tuple[str, ...], present: str, **labels: str) -> Samples:
    """Return a sample for each value that a label may have: 1 for the present one, 0 for the others."""
    return [({**labels, label: name}, float(name == present)) for name in names]


def _disks(disks: list[schema.ServedDisk]) -> Iterator[Metric]:
    gates = tuple(gate.value for gate in Gate)
    states = [sample for disk in disks for sample in _one_of("state", DISK_STATES, disk.state, disk=disk.name)]
    positions = [sample for disk in disks for sample in _one_of("gate", gates, disk.gate, disk=disk.name)]
    each = [({"disk": disk.name}, disk) for disk in disks]
    yield _plain("fusemig_disk_size_bytes", "Size; 0 before it is known.", [(at, disk.size) for at, disk in each])
    yield _plain("fusemig_disk_state", "1 for the state by its epoch file.", states)
    yield _plain("fusemig_disk_gate", "1 for what happens to a guest's write.", positions)
    yield _plain(
        "fusemig_disk_failed", "1 after a failed flush; every later one fails.", [(at, d.io_error) for at, d in each]
    )
    yield _plain(
        "fusemig_disk_missing_bytes",
        "What is still at the source (post-copy).",
        [(at, disk.missing_bytes) for at, disk in each],
    )
    yield _plain(
        "fusemig_parked_requests", "Writes that wait for the gate.", [(at, disk.parked_writes) for at, disk in each]
    )


def _requests(blocks: list[block.BlockStats]) -> Iterator[Metric]:
    each = [({"disk": one.device}, one.stats) for one in blocks]
    operations, errors = [], []
    for at, stats in each:
        for op, n_done, n_failed in (
            ("read", stats.rd_operations, stats.failed_rd_operations),
            ("write", stats.wr_operations, stats.failed_wr_operations),
            ("flush", stats.flush_operations, stats.failed_flush_operations),
        ):
            operations.append(({**at, "op": op}, n_done))
            errors.append(({**at, "op": op}, n_failed))
    yield _plain("fusemig_disk_read_bytes_total", "Guests read.", [(at, stats.rd_bytes) for at, stats in each])
    yield _plain("fusemig_disk_written_bytes_total", "Guests wrote.", [(at, stats.wr_bytes) for at, stats in each])
    yield _plain("fusemig_disk_ops_total", "Guests' requests, as they reach the daemon.", operations)
    yield _plain("fusemig_io_errors_total", "Guests' requests that the store failed.", errors)


def _totals(totals: schema.MigrationTotals) -> Iterator[Metric]:
    outcomes = [
        ({"role": role, "outcome": what}, count)
        for role, counted in (("source", totals.outgoing), ("destination", totals.incoming))
        for what, count in _counts(counted, OUTCOMES[role]).items()
    ]
    yield _plain("fusemig_migrations_total", "Migrations that have ended, by the phase in which.", outcomes)
    yield _plain("fusemig_migration_passes_total", "Passes of outgoing migrations.", [({}, totals.passes)])
    buckets = [(str(bucket.limit_ms / 1000), bucket.count) for bucket in totals.frozen_within]
    yield HistogramMetricFamily(
        "fusemig_freeze_seconds",
        "How long outgoing migrations froze their guests.",
        buckets=[*buckets, ("+Inf", totals.n_frozen)],
        sum_value=totals.frozen_ms / 1000,
    )


def _migration(info: schema.MigrationInfo) -> Iterator[Metric]:
    """Yield what is known of the last migration; what is unset is left out."""
    own = info.x_fusemig
    assert not isinstance(own, UnsetType)
    yield _plain(
        "fusemig_migration_state",
        "1 for the status of the last migration, in QMP's words.",
        _one_of("state", _STATUSES, str(info.status), role=own.role.value),
    )
    if not isinstance(info.disk, UnsetType):
        sent, remaining = info.disk.transferred, info.disk.remaining
        yield _plain("fusemig_migration_sent_bytes", "On the wire, in this migration.", [({}, sent)])
        yield _plain("fusemig_migration_remaining_bytes", "Still to be sent.", [({}, remaining)])
    if own.role is not schema.Role.SOURCE:
        return
    each = [({"disk": disk.name}, disk) for disk in own.disks]
    dirty = [(at, disk.dirty_chunks) for at, disk in each]
    in_flight = [(at, disk.in_flight_chunks) for at, disk in each]
    yield _plain("fusemig_dirty_chunks", "Chunks of 1 MiB with something to be sent.", dirty)
    yield _plain("fusemig_in_flight_chunks", "Chunks taken for sending and not acknowledged.", in_flight)
    yield _plain("fusemig_migration_bandwidth_bytes", "Acknowledged lately, per second.", [({}, own.bandwidth)])
    yield _plain("fusemig_migration_dirty_rate_bytes", "Dirtied lately, per second.", [({}, own.dirty_rate)])
    yield _plain("fusemig_migration_reconnects", "Lost connections that were made again.", [({}, own.reconnects)])
    for name, documentation, milliseconds in (
        ("fusemig_migration_expected_downtime_seconds", "Freeze to be expected now.", info.expected_downtime),
        ("fusemig_migration_downtime_seconds", "From closing the gate to the take-over.", info.downtime),
    ):
        if not isinstance(milliseconds, UnsetType):
            yield _plain(name, documentation, [({}, milliseconds / 1000)])
