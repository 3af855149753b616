"""The checking of a command's arguments against their declaration, with QEMU's texts and in QEMU's order."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import msgspec

from fusemig.qmp.base import ArgumentError, Arguments

ArgumentsT = TypeVar("ArgumentsT", bound=Arguments)


def check_arguments(declared: type[ArgumentsT], arguments: dict[str, Any]) -> ArgumentsT:
    """Return a client's arguments in their declared type.

    Raises:
        ArgumentError: they do not fit; the text is QEMU's.
    """
    _check(_type_info(declared), arguments, "")
    return msgspec.convert(arguments, declared)


@cache
def _type_info(declared: type[Arguments]) -> msgspec.inspect.Type:
    return msgspec.inspect.type_info(declared)


def _check(declared: msgspec.inspect.Type, value: Any, path: str) -> None:
    """Check a value against its declaration; `msgspec.convert` would find the same errors, in other words."""
    match declared:
        case msgspec.inspect.Metadata(type=msgspec.inspect.IntType(ge=low, le=high), extra_json_schema=schema):
            assert low is not None
            assert high is not None
            assert schema is not None
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ArgumentError(f"Parameter '{path}' expects {schema['description']}")
        case msgspec.inspect.StrType():
            _expect(isinstance(value, str), path, "string")
        case msgspec.inspect.BoolType():
            _expect(isinstance(value, bool), path, "boolean")
        case msgspec.inspect.EnumType(cls=cls):
            _expect(isinstance(value, str), path, "string")
            if value not in [member.value for member in cls]:
                raise ArgumentError(f"Parameter '{path.rpartition('.')[2]}' does not accept value '{value}'")
        case msgspec.inspect.ListType(item_type=item_type):
            _expect(isinstance(value, list), path, "array")
            for index, item in enumerate(value):
                _check(item_type, item, f"{path}[{index}]")
        case msgspec.inspect.StructType(fields=fields):
            _expect(isinstance(value, dict), path, "object")
            _check_members(fields, value, f"{path}." if path else "")
        case _:
            raise AssertionError(f"no check for {declared}: write one")


def _check_members(fields: tuple[msgspec.inspect.Field, ...], value: dict[str, Any], prefix: str) -> None:
    for member in fields:
        if member.encode_name in value:
            _check(member.type, value[member.encode_name], prefix + member.encode_name)
        elif member.required:
            raise ArgumentError(f"Parameter '{prefix}{member.encode_name}' is missing")
    known = {member.encode_name for member in fields}
    for name in value:
        if name not in known:
            raise ArgumentError(f"Parameter '{prefix}{name}' is unexpected")


def _expect(is_right: bool, path: str, expected: str) -> None:
    if not is_right:
        raise ArgumentError(f"Invalid parameter type for '{path}', expected: {expected}")
