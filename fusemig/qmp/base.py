"""What every declaration of the vocabulary is made of."""

from __future__ import annotations

import msgspec

from fusemig.errors import ConfigError


class ArgumentError(ConfigError):
    """A command's arguments do not fit its declaration; nothing was done."""


class Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Base of all commands' arguments."""


class NoArguments(Arguments, frozen=True, kw_only=True):
    """For the commands that take none."""


class Result(msgspec.Struct, frozen=True, rename="kebab"):
    """Base of what commands return."""


def underscores(name: str) -> str:
    """Name the members of QAPI's older structs, which keep their underscores."""
    return name
