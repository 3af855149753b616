"""Metrics: well-formed by Prometheus' rules in every state, and the same figures as the status that they are from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from fusemig.daemon.daemon import Daemon
from fusemig.daemon.metrics import Metrics
from fusemig.daemon.security import check_address
from fusemig.daemon.serve_options import ServeOptions
from fusemig.errors import ConfigError, FusemigError
from fusemig.net.http_server import Request
from fusemig.net.listener import listening
from fusemig.net.transport import parse_uri
from fusemig.qmp import block, schema
from support.promlint import problems, value

if TYPE_CHECKING:
    from pathlib import Path


def make_status(**members: Any) -> schema.DaemonStatus:
    """Return the status of a daemon with one disk."""
    disk = schema.ServedDisk(name="vda", size=1 << 30, path="/vda.img", state="owner", gate="open", parked_writes=3)
    defaults: dict[str, Any] = {
        "version": "1.2",
        "pid": 1,
        "mountpoint": "/mnt",
        "status": schema.RunState.RUNNING,
        "disks": [disk],
        "totals": schema.MigrationTotals(),
    }
    return schema.DaemonStatus(**defaults | members)


def make_page(status: schema.DaemonStatus, accept: str = "") -> str:
    stats = block.BlockDeviceStats(rd_bytes=10, wr_bytes=20, rd_operations=1, wr_operations=2, failed_wr_operations=1)
    answer = Metrics(lambda: status, lambda: [block.BlockStats(device="vda", stats=stats)]).page(
        Request("/metrics", {}, {"accept": accept})
    )
    return answer.body.decode()


MOVING = schema.MigrationInfo(
    status=schema.MigrationStatus.ACTIVE,
    disk=schema.MigrationStats(transferred=1000, remaining=77),
    expected_downtime=250,
    x_fusemig=schema.FusemigMigration(
        role=schema.Role.SOURCE,
        session="s",
        phase="dirty",
        mode=schema.Mode.PRECOPY,
        wire=schema.WireName.NATIVE,
        disks=[schema.MigratingDisk(name="vda", size=1 << 30, dirty_chunks=5, in_flight_chunks=2)],
        bandwidth=100,
        dirty_rate=10,
    ),
)
TOTALS = schema.MigrationTotals(
    outgoing=[schema.Count(what="completed", count=2), schema.Count(what="failed", count=1)],
    incoming=[schema.Count(what="completed", count=4)],
    passes=9,
    n_frozen=3,
    frozen_ms=60.0,
    frozen_within=[
        schema.FrozenWithin(limit_ms=10.0, count=1),
        schema.FrozenWithin(limit_ms=25.0, count=2),
    ],
)
INCOMING = schema.Incoming(
    uri="tcp:127.0.0.1:1",
    status=schema.MigrationStatus.NONE,
    rejected_connections=2,
    rejected_by_reason=[schema.Count(what="authentication", count=2)],
)


@pytest.mark.parametrize(
    "status",
    [
        make_status(),
        make_status(disks=[]),
        make_status(migration=MOVING, totals=TOTALS, incoming=INCOMING),
        make_status(migration=msgspec.structs.replace(MOVING, disk=msgspec.UNSET)),
    ],
    ids=["idle", "no disk", "everything", "over"],
)
def test_every_page_keeps_the_naming_rules(status: schema.DaemonStatus) -> None:
    """`promtool check metrics` would be silent."""
    assert problems(make_page(status)) == []


def test_the_lint_sees_what_it_is_for() -> None:
    """The twin: each rule finds a page that breaks it."""
    for text, complaint in (
        ("# TYPE a_ms gauge\n# HELP a_ms x\na_ms 1\n", "use the base unit"),
        ("# TYPE a gauge\na 1\n", "no help text"),
        ("# HELP a_total x\n# TYPE a_total gauge\na_total 1\n", "only a counter's"),
        ("# HELP a_count x\n# TYPE a_count gauge\na_count 1\n", "reserved"),
        ("# HELP aB x\n# TYPE aB gauge\naB 1\n", "snake_case"),
        ('# HELP a x\n# TYPE a gauge\na{b="1"} 1\na{b="1"} 2\n', "twice"),
    ):
        assert any(complaint in problem for problem in problems(text)), text


def test_figures_are_those_of_the_status() -> None:
    """Names as documented; milliseconds have become seconds."""
    page = make_page(make_status(migration=MOVING, totals=TOTALS, incoming=INCOMING))
    for name, labels, expected in (
        ("fusemig_disk_read_bytes_total", {"disk": "vda"}, 10),
        ("fusemig_disk_written_bytes_total", {"disk": "vda"}, 20),
        ("fusemig_disk_ops_total", {"disk": "vda", "op": "write"}, 2),
        ("fusemig_io_errors_total", {"disk": "vda", "op": "write"}, 1),
        ("fusemig_disk_state", {"disk": "vda", "state": "owner"}, 1),
        ("fusemig_disk_state", {"disk": "vda", "state": "handed-off"}, 0),
        ("fusemig_disk_gate", {"disk": "vda", "gate": "open"}, 1),
        ("fusemig_parked_requests", {"disk": "vda"}, 3),
        ("fusemig_dirty_chunks", {"disk": "vda"}, 5),
        ("fusemig_migration_state", {"role": "source", "state": "active"}, 1),
        ("fusemig_migration_state", {"role": "source", "state": "completed"}, 0),
        ("fusemig_migration_sent_bytes", {}, 1000),
        ("fusemig_migration_remaining_bytes", {}, 77),
        ("fusemig_migration_expected_downtime_seconds", {}, 0.25),
        ("fusemig_migration_passes_total", {}, 9),
        ("fusemig_migrations_total", {"role": "source", "outcome": "failed"}, 1),
        ("fusemig_migrations_total", {"role": "destination", "outcome": "completed"}, 4),
        ("fusemig_freeze_seconds_bucket", {"le": "0.025"}, 2),
        ("fusemig_freeze_seconds_bucket", {"le": "+Inf"}, 3),
        ("fusemig_freeze_seconds_sum", {}, 0.06),
        ("fusemig_rejected_connections_total", {"reason": "authentication"}, 2),
    ):
        assert value(page, name, **labels) == expected, (name, labels)
    assert 'fusemig_build_info{python="' in page


def test_openmetrics_is_spoken_to_who_prefers_it() -> None:
    """The format follows the Accept header, as newer Prometheus servers ask."""
    assert make_page(make_status(), "application/openmetrics-text; version=1.0.0").endswith("# EOF\n")
    assert "# EOF" not in make_page(make_status(), "text/plain")


def test_metrics_stay_on_this_host_unless_told_otherwise() -> None:
    """A port for the whole network is refused with the way out."""
    check_address("--metrics", parse_uri("tcp:127.0.0.1:9199"), is_insecure=False)
    check_address("--metrics", parse_uri("unix:/run/metrics"), is_insecure=False)
    check_address("--metrics", parse_uri("tcp:0.0.0.0:9199"), is_insecure=True)
    with pytest.raises(ConfigError, match="--metrics-insecure"):
        check_address("--metrics", parse_uri("tcp:0.0.0.0:9199"), is_insecure=False)


@pytest.mark.parametrize("option", ["metrics", "web"])
@pytest.mark.parametrize("address", ["taken", "tcp:0.0.0.0:0"])
async def test_an_address_that_cannot_be_had_keeps_no_successor_from_its_guests(
    tmp_path: Path, option: str, address: str
) -> None:
    """Somebody took the port meanwhile, or the file with the options was changed; a first start is refused."""
    async with listening(parse_uri("tcp:127.0.0.1:0")) as other:
        uri = str(other.uri) if address == "taken" else address
        is_web = option == "web"
        where = {True: uri, False: None}
        options = ServeOptions(tmp_path, (), tmp_path / "control", metrics=where[not is_web], web=where[is_web])
        daemon = Daemon(options)
        serve = daemon._serve_web if is_web else daemon._serve_metrics
        with pytest.raises(FusemigError):
            await serve(uri)
        daemon.store.mounted()
        await serve(uri)
        assert (daemon.metrics, daemon.web) == (None, None)
