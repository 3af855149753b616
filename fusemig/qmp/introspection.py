"""What `query-qmp-schema` returns: our own declarations in the shape of QEMU's introspection (qapi/introspect.json).

Everything is derived from `schema.COMMANDS`, `schema.RESULTS` and `schema.EVENTS`, so it cannot differ from what the
server takes and gives. As in QEMU, types have numbers for names, "0" is the empty object, an array of T is "[T]", and
a member with ``default`` may be left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from fusemig.qmp import schema
from fusemig.qmp.base import Arguments, Result

if TYPE_CHECKING:
    from collections.abc import Iterable
    from enum import Enum

EMPTY: Final = "0"


class Member(Result, frozen=True, kw_only=True):
    """SchemaInfoObjectMember."""

    name: str
    type: str
    default: UnsetType | None = UNSET
    """There, and null, if the member is optional."""


class EnumMember(Result, frozen=True, kw_only=True):
    """SchemaInfoEnumMember."""

    name: str


class SchemaInfo(Result, frozen=True, kw_only=True):
    """SchemaInfo; which members are there depends on ``meta-type``."""

    name: str
    meta_type: str
    json_type: str | UnsetType = UNSET
    element_type: str | UnsetType = UNSET
    members: list[Member] | list[EnumMember] | UnsetType = UNSET
    values: list[str] | UnsetType = UNSET
    arg_type: str | UnsetType = UNSET
    ret_type: str | UnsetType = UNSET


_BUILTINS: Final[dict[type, tuple[str, str]]] = {
    msgspec.inspect.StrType: ("str", "string"),
    msgspec.inspect.IntType: ("int", "int"),
    msgspec.inspect.FloatType: ("number", "number"),
    msgspec.inspect.BoolType: ("bool", "boolean"),
    msgspec.inspect.NoneType: ("null", "null"),
    msgspec.inspect.AnyType: ("any", "value"),
}


def describe(commands: Iterable[str]) -> list[SchemaInfo]:
    """Return the introspection of these commands, of every event, and of every type that they name."""
    types = _Types()
    described = []
    for name in sorted(commands):
        result = schema.RESULTS.get(name)
        described.append(
            SchemaInfo(
                name=name,
                meta_type="command",
                arg_type=types.name_of(schema.COMMANDS[name]),
                ret_type=EMPTY if result is None else types.name_of(result),
            )
        )
    for name, data in schema.EVENTS.items():
        arg_type = EMPTY if data is None else types.name_of(data)
        described.append(SchemaInfo(name=name, meta_type="event", arg_type=arg_type))
    return described + types.described


class _Types:
    """Names types and collects their descriptions, each once."""

    def __init__(self) -> None:
        self.described = [SchemaInfo(name=EMPTY, meta_type="object", members=[])]
        self._names: dict[object, str] = {}

    def name_of(self, declared: Any) -> str:
        """Return a type's name."""
        return self._name(msgspec.inspect.type_info(declared))

    def _name(self, info: msgspec.inspect.Type) -> str:
        match info:
            case msgspec.inspect.Metadata(type=inner):
                return self._name(inner)
            case msgspec.inspect.ListType(item_type=item):
                element = self._name(item)
                return self._once(
                    f"[{element}]", SchemaInfo(name=f"[{element}]", meta_type="array", element_type=element)
                )
            case msgspec.inspect.EnumType(cls=cls):
                return self._enum(cls)
            case msgspec.inspect.StructType(cls=cls, fields=fields):
                return self._struct(cls, fields)
            case _ if type(info) in _BUILTINS:
                name, json_type = _BUILTINS[type(info)]
                return self._once(name, SchemaInfo(name=name, meta_type="builtin", json_type=json_type))
        raise AssertionError(f"no introspection for {info}: write one")

    def _once(self, name: str, info: SchemaInfo) -> str:
        if name not in self._names:
            self._names[name] = name
            self.described.append(info)
        return name

    def _number(self, cls: type) -> str:
        self._names[cls] = str(1 + sum(isinstance(key, type) for key in self._names))
        return self._names[cls]

    def _enum(self, cls: type[Enum]) -> str:
        if cls not in self._names:
            values = [str(member.value) for member in cls]
            members = [EnumMember(name=value) for value in values]
            self.described.append(SchemaInfo(name=self._number(cls), meta_type="enum", members=members, values=values))
        return self._names[cls]

    def _struct(self, cls: type, fields: tuple[msgspec.inspect.Field, ...]) -> str:
        if not fields:
            return EMPTY
        if cls not in self._names:
            name = self._number(cls)  # first: a type may contain itself
            members = [
                Member(
                    name=one.encode_name,
                    type=self._name(one.type),
                    default=None if _is_optional(cls, one) else UNSET,
                )
                for one in fields
            ]
            self.described.append(SchemaInfo(name=name, meta_type="object", members=members))
        return self._names[cls]


def _is_optional(cls: type, member: msgspec.inspect.Field) -> bool:
    """Tell whether a member may be left out: of arguments what has a default, of results what may be unset."""
    if issubclass(cls, Arguments):
        return not member.required
    has_value = member.default is not msgspec.NODEFAULT or member.default_factory is not msgspec.NODEFAULT
    return not member.required and not has_value
