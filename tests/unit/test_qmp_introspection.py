"""`query-qmp-schema`: the shape of QEMU's introspection, and our types beside QEMU's."""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache
from typing import Any

import msgspec
import pytest

from fusemig.qmp import introspection, objects, schema

QEMU = "qemu-system-x86_64"
MEMBERS = {
    "command": {"name", "meta-type", "arg-type", "ret-type"},
    "event": {"name", "meta-type", "arg-type"},
    "object": {"name", "meta-type", "members"},
    "array": {"name", "meta-type", "element-type"},
    "builtin": {"name", "meta-type", "json-type"},
    "enum": {"name", "meta-type", "members", "values"},
}
"""As in QEMU 7.2.22; its commands may have ``features`` and ``allow-oob`` too, its objects ``tag`` and ``variants``."""
NOT_IN_QEMU = {"query-events"}
"""Ours, besides x-fusemig-*: removed in QEMU 6.0."""
LATER = {
    "migrate.uri: optional on one side",  # 8.2: `channels` may take its place
    "migrate-incoming.uri: optional on one side",
    *(
        f"query-blockstats()[].stats.{member}: missing"  # 8.1
        for member in (
            "zone_append_bytes",
            "zone_append_operations",
            "zone_append_merged",
            "zone_append_total_time_ns",
            "failed_zone_append_operations",
            "invalid_zone_append_operations",
        )
    ),
}
"""What QEMU has since 7.2, by what `test_our_types_are_qemus` says of it: Ubuntu 24.04 has 8.2."""


@cache
def ours() -> dict[str, dict[str, Any]]:
    """Return our introspection by name."""
    infos = msgspec.to_builtins(introspection.describe(schema.COMMANDS))
    by_name = {info["name"]: info for info in infos}
    assert len(by_name) == len(infos), "a name twice"
    return by_name


def test_every_type_that_is_named_is_there() -> None:
    """A client can follow every reference."""
    for info in ours().values():
        assert info.keys() == MEMBERS[info["meta-type"]], info
        named = [info[key] for key in ("arg-type", "ret-type", "element-type") if key in info]
        if info["meta-type"] == "object":
            named += [member["type"] for member in info["members"]]
        for name in named:
            assert ours()[name]["meta-type"] not in ("command", "event")


def test_what_is_optional() -> None:
    """An argument with a default may be left out; a result with a default is always there."""
    migrate = ours()[ours()["migrate"]["arg-type"]]["members"]
    assert {"name": "uri", "type": "str"} in migrate
    assert {"name": "inc", "type": "bool", "default": None} in migrate
    status = ours()[ours()["query-status"]["ret-type"]]["members"]
    assert {"name": "singlestep", "type": "bool"} in status
    info = ours()[ours()["query-migrate"]["ret-type"]]["members"]
    assert {"name": "downtime", "type": "int", "default": None} in info


def test_only_what_is_served_is_described() -> None:
    """A server without a command does not describe it."""
    infos = introspection.describe(["stop"])
    assert [info.name for info in infos if info.meta_type == "command"] == ["stop"]


@pytest.fixture(scope="module")
def qemus() -> dict[str, dict[str, Any]]:
    """Ask a QEMU for its introspection."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    command = [QEMU, "-M", "none,accel=tcg", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write('{"execute":"qmp_capabilities"}{"execute":"query-qmp-schema","id":1}\n')
        process.stdin.flush()
        replies = (json.loads(line) for line in process.stdout)
        infos = next(reply["return"] for reply in replies if reply.get("id") == 1)
        process.communicate('{"execute":"quit"}\n', timeout=60)
    return {info["name"]: info for info in infos}


@pytest.mark.qemu
def test_our_types_are_qemus(qemus: dict[str, dict[str, Any]]) -> None:
    """What we take and give under QAPI's names, QAPI has, with the same types, down to the last member."""
    seen: set[tuple[str, str]] = set()
    wrong: list[str] = []
    kinds_of_objects = {kind.value for kind in objects.ObjectType}

    def check(mine: str, theirs: str, path: str, *, are_arguments: bool) -> None:
        if (mine, theirs) in seen:
            return
        seen.add((mine, theirs))
        my_info, their_info = ours()[mine], qemus[theirs]
        if their_info["meta-type"] == "alternate" or mine == "any":
            return
        if my_info["meta-type"] != their_info["meta-type"]:
            wrong.append(f"{path}: {my_info['meta-type']}, not {their_info['meta-type']}")
        elif my_info["meta-type"] == "builtin":
            if my_info["json-type"] != their_info["json-type"]:
                wrong.append(f"{path}: {my_info['json-type']}, not {their_info['json-type']}")
        elif my_info["meta-type"] == "array":
            check(my_info["element-type"], their_info["element-type"], f"{path}[]", are_arguments=are_arguments)
        elif my_info["meta-type"] == "enum":
            wrong.extend(f"{path}: value {value}" for value in set(my_info["values"]) - set(their_info["values"]))
        else:
            their_members = {member["name"]: member for member in their_info["members"]}
            ours_too = kinds_of_objects if path == "object-add" else None
            for variant in their_info.get("variants", []):
                if ours_too is None or variant["case"] in ours_too:  # of one kind, so optional for all kinds together
                    extra = {} if ours_too is None else {"default": None}
                    their_members |= {member["name"]: member | extra for member in qemus[variant["type"]]["members"]}
            my_members = {member["name"]: member for member in my_info["members"]}
            for name, member in my_members.items():
                if name.lower().startswith(("x-fusemig", "x_fusemig")):
                    continue
                where = f"{path}.{name}"
                if name not in their_members:
                    wrong.append(f"{where}: unknown to QEMU")
                    continue
                check(member["type"], their_members[name]["type"], where, are_arguments=are_arguments)
                if are_arguments and ("default" in member) != ("default" in their_members[name]):
                    wrong.append(f"{where}: optional on one side")
            if not are_arguments:
                always = {member["name"] for member in their_info["members"] if "default" not in member}
                wrong.extend(f"{path}.{name}: missing" for name in always - my_members.keys())

    for name, info in ours().items():
        is_own = name.startswith(("x-fusemig", "X_FUSEMIG"))
        if info["meta-type"] not in ("command", "event") or is_own or name in NOT_IN_QEMU:
            continue
        assert qemus[name]["meta-type"] == info["meta-type"], name
        if name == "query-qmp-schema":
            continue  # QEMU describes its own description as a union
        check(info["arg-type"], qemus[name]["arg-type"], name, are_arguments=info["meta-type"] == "command")
        if info["meta-type"] == "command":
            check(info["ret-type"], qemus[name]["ret-type"], f"{name}()", are_arguments=False)
    wrong = [one for one in wrong if one not in LATER]
    assert not wrong, "\n".join(wrong)
