"""The vocabulary: argument checking in QEMU's words, names on the wire, defaults."""

# ruff: noqa: SIM905  (a list of words is easier to compare with QEMU's)

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from fusemig.qmp import block, schema
from fusemig.qmp.base import ArgumentError
from fusemig.qmp.check import check_arguments

# Recorded from qemu-system-x86_64 7.2.22 -M none -qmp stdio.
QEMU_TEXTS: list[tuple[str, dict[str, Any], str]] = [
    ("query-status", {"x": 1}, "Parameter 'x' is unexpected"),
    ("migrate", {}, "Parameter 'uri' is missing"),
    ("migrate", {"bad": 1}, "Parameter 'uri' is missing"),
    ("migrate", {"uri": "tcp:h:1", "bad": 1}, "Parameter 'bad' is unexpected"),
    ("migrate", {"uri": 1}, "Invalid parameter type for 'uri', expected: string"),
    ("migrate", {"uri": None}, "Invalid parameter type for 'uri', expected: string"),
    ("migrate", {"uri": "tcp:h:1", "blk": 1}, "Invalid parameter type for 'blk', expected: boolean"),
    ("migrate-continue", {}, "Parameter 'state' is missing"),
    ("migrate-continue", {"state": "bad"}, "Parameter 'state' does not accept value 'bad'"),
    ("query-blockstats", {"query-nodes": 1}, "Invalid parameter type for 'query-nodes', expected: boolean"),
    ("migrate-set-parameters", {"max-bandwidth": "x"}, "Parameter 'max-bandwidth' expects uint64"),
    ("migrate-set-parameters", {"max-bandwidth": 1.5}, "Parameter 'max-bandwidth' expects uint64"),
    (
        "migrate-set-parameters",
        {"multifd-compression": "bad"},
        "Parameter 'multifd-compression' does not accept value 'bad'",
    ),
    (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "nope", "state": True}]},
        "Parameter 'capability' does not accept value 'nope'",
    ),
    (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "events"}]},
        "Parameter 'capabilities[0].state' is missing",
    ),
    (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "events", "state": True, "x": 1}]},
        "Parameter 'capabilities[0].x' is unexpected",
    ),
    (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "events", "state": 1}]},
        "Invalid parameter type for 'capabilities[0].state', expected: boolean",
    ),
    (
        "migrate-set-capabilities",
        {"capabilities": {}},
        "Invalid parameter type for 'capabilities', expected: array",
    ),
    (
        "migrate-set-capabilities",
        {"capabilities": [1]},
        "Invalid parameter type for 'capabilities[0]', expected: object",
    ),
    (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": 5, "state": True}]},
        "Invalid parameter type for 'capabilities[0].capability', expected: string",
    ),
    # QEMU writes downtime_limit and multifd_channels; the client wrote hyphens.
    (
        "migrate-set-parameters",
        {"downtime-limit": 2_000_001},
        "Parameter 'downtime-limit' expects an integer in the range of 0 to (2000 * 1000) ms",
    ),
    (
        "migrate-set-parameters",
        {"multifd-channels": 0},
        "Parameter 'multifd-channels' expects a value between 1 and 255",
    ),
    (
        "migrate",
        {"uri": "unix:/s", "x-fusemig-streams": 17},
        "Parameter 'x-fusemig-streams' expects a value between 1 and 16",
    ),
    # QEMU accepts these two.
    ("migrate-set-parameters", {"max-bandwidth": -1}, "Parameter 'max-bandwidth' expects uint64"),
    ("migrate-set-parameters", {"max-bandwidth": True}, "Parameter 'max-bandwidth' expects uint64"),
    # Ours.
    (
        "migrate",
        {"uri": "tcp:h:1", "x-fusemig-mode": "fast"},
        "Parameter 'x-fusemig-mode' does not accept value 'fast'",
    ),
    (
        "migrate",
        {"uri": "tcp:h:1", "x-fusemig-disks": ["a", 1]},
        "Invalid parameter type for 'x-fusemig-disks[1]', expected: string",
    ),
]


@pytest.mark.parametrize(("command", "arguments", "text"), QEMU_TEXTS)
def test_refusals_are_in_qemus_words(command: str, arguments: dict[str, Any], text: str) -> None:
    """Scripts match on these texts."""
    with pytest.raises(ArgumentError, match=f"^{re.escape(text)}$"):
        check_arguments(schema.COMMANDS[command], arguments)


def test_migrate_defaults() -> None:
    """A bare ``migrate`` moves every disk, precopy, on the native wire."""
    migrate = check_arguments(schema.Migrate, {"uri": "tcp:h:1"})
    assert migrate.uri == "tcp:h:1"
    assert migrate.blk is UNSET
    assert not migrate.inc
    assert not migrate.resume
    assert migrate.x_fusemig_disks is UNSET
    assert migrate.x_fusemig_mode is schema.Mode.PRECOPY
    assert migrate.x_fusemig_wire is schema.WireName.NATIVE
    assert migrate.x_fusemig_compress is UNSET


def test_migrate_takes_our_arguments() -> None:
    """The additions have hyphens and a prefix."""
    migrate = check_arguments(
        schema.Migrate,
        {
            "uri": "unix:/s",
            "x-fusemig-disks": ["a"],
            "x-fusemig-mode": "mirror",
            "x-fusemig-wire": "qemu",
            "x-fusemig-compress": "zstd:3",
            "x-fusemig-streams": 16,
        },
    )
    assert migrate.x_fusemig_disks == ["a"]
    assert migrate.x_fusemig_mode == "mirror"
    assert migrate.x_fusemig_wire == "qemu"
    assert migrate.x_fusemig_compress == "zstd:3"
    assert migrate.x_fusemig_streams == 16


def test_parameters_not_given_are_unset() -> None:
    """0 and absent differ: 0 lifts the limit, absent leaves it."""
    given_ = check_arguments(schema.MigrateSetParameters, {"max-bandwidth": 0, "downtime-limit": 2_000_000})
    assert given_.max_bandwidth == 0
    assert given_.downtime_limit == 2_000_000
    assert given_.multifd_channels is UNSET


def test_default_parameters() -> None:
    """Unlimited, where QEMU has 128 MiB/s; 300 ms as in QEMU."""
    parameters = msgspec.to_builtins(schema.MigrationParameters())
    assert parameters["max-bandwidth"] == 0
    assert parameters["downtime-limit"] == 300


def test_capability_names_are_qemus() -> None:
    """The list of QEMU 7.2, in its order; ours is a part of it."""
    assert [str(name) for name in schema.MigrationCapability] == (
        "xbzrle rdma-pin-all auto-converge zero-blocks compress events postcopy-ram x-colo release-ram block "
        "return-path pause-before-switchover multifd dirty-bitmaps postcopy-blocktime late-block-activate "
        "x-ignore-shared validate-uuid background-snapshot zero-copy-send postcopy-preempt"
    ).split()
    assert schema.ALWAYS_ON_CAPABILITIES < schema.SUPPORTED_CAPABILITIES


def test_query_migrate_before_the_first_is_empty() -> None:
    """As in QEMU."""
    assert msgspec.to_builtins(schema.MigrationInfo()) == {}


def test_query_migrate_members() -> None:
    """QEMU's members under QEMU's names, ours under x-fusemig."""
    info = schema.MigrationInfo(
        status=schema.MigrationStatus.ACTIVE,
        disk=schema.MigrationStats(transferred=1, remaining=2, total=3),
        ram=schema.MigrationStats(),
        total_time=1,
        setup_time=2,
        expected_downtime=300,
        x_fusemig=schema.FusemigMigration(
            role=schema.Role.SOURCE,
            session="0123abcd",
            phase="bulk",
            mode=schema.Mode.PRECOPY,
            wire=schema.WireName.NATIVE,
            pass_=1,
            disks=[schema.MigratingDisk(name="d", size=512)],
        ),
    )
    built = msgspec.to_builtins(info)
    # The members of QEMU 7.2.22's answer while a block migration is active.
    assert built.keys() == {"status", "disk", "ram", "total-time", "setup-time", "expected-downtime", "x-fusemig"}
    assert built["disk"].keys() == set(
        "total postcopy-requests dirty-sync-count multifd-bytes pages-per-second downtime-bytes page-size remaining "
        "postcopy-bytes mbps transferred dirty-sync-missed-zero-copy precopy-bytes duplicate dirty-pages-rate skipped "
        "normal-bytes normal".split()
    )
    assert built["x-fusemig"]["pass"] == 1
    assert built["x-fusemig"]["window"].keys() == {"submitted", "read-done", "in-flight", "transferred"}
    assert "digest" not in built["x-fusemig"]["disks"][0]


def test_query_block_members_are_qemus() -> None:
    """Hyphens and underscores are mixed exactly as QEMU 7.2.22 mixes them."""
    image = block.ImageInfo(filename="d.img", virtual_size=512)
    inserted = block.BlockDeviceInfo(file="d.img", ro=False, image=image, node_name="n")
    built = msgspec.to_builtins(block.BlockInfo(device="d", inserted=inserted))
    assert built.keys() == {"device", "locked", "removable", "inserted", "type"}
    assert built["inserted"].keys() == set(
        "iops_rd detect_zeroes image iops_wr ro node-name backing_file_depth drv iops bps_wr write_threshold encrypted "
        "bps bps_rd cache file".split()
    )
    assert built["inserted"]["image"].keys() == set("virtual-size filename format actual-size dirty-flag".split())
    assert built["inserted"]["cache"] == {"no-flush": False, "direct": False, "writeback": True}


def test_query_blockstats_members_are_qemus() -> None:
    """As recorded from QEMU 7.2.22."""
    built = msgspec.to_builtins(block.BlockStats(device="d", stats=block.BlockDeviceStats(), node_name="n"))
    assert built.keys() == {"device", "stats", "node-name"}
    assert built["stats"].keys() == set(
        "unmap_operations unmap_merged flush_total_time_ns wr_highest_offset wr_total_time_ns failed_wr_operations "
        "failed_rd_operations wr_merged wr_bytes timed_stats failed_unmap_operations failed_flush_operations "
        "account_invalid rd_total_time_ns invalid_unmap_operations flush_operations wr_operations unmap_bytes "
        "rd_merged rd_bytes unmap_total_time_ns invalid_flush_operations account_failed rd_operations "
        "invalid_wr_operations invalid_rd_operations".split()
    )


@pytest.mark.parametrize("declared", list(dict.fromkeys(schema.COMMANDS.values())))
def test_every_declaration_can_be_checked(declared: type[schema.Arguments]) -> None:
    """No member has a type that the checker does not know, and each refuses a wrong one."""
    for member in msgspec.structs.fields(declared):
        with pytest.raises(ArgumentError):
            check_arguments(declared, {member.encode_name: {"no": "such"}})
    with pytest.raises(ArgumentError):
        check_arguments(declared, {"x-no-such": 1})


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
MEMBER = st.sampled_from(
    sorted({member.encode_name for args in schema.COMMANDS.values() for member in msgspec.structs.fields(args)})
)


@given(st.sampled_from(sorted(schema.COMMANDS)), st.dictionaries(MEMBER | st.text(max_size=4), VALUE, max_size=3))
def test_checking_agrees_with_msgspec(command: str, arguments: dict[str, Any]) -> None:
    """What the checker lets through converts; what it refuses, msgspec refuses too."""
    declared = schema.COMMANDS[command]
    try:
        check_arguments(declared, arguments)
    except ArgumentError:
        # The one liberty of msgspec's: it takes 3.0 for an integer.
        if not any(isinstance(value, float) for value in arguments.values()):
            with pytest.raises(msgspec.ValidationError):
                msgspec.convert(arguments, declared)
