"""``fusemig config``: look at a configuration without starting anything."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from fusemig.cli import config_file
from fusemig.errors import ConfigError
from fusemig.net.transport import parse_uri

if TYPE_CHECKING:
    from pathlib import Path

_ORIGINS: Final = {
    click.core.ParameterSource.ENVIRONMENT: "environment",
    click.core.ParameterSource.DEFAULT_MAP: "file",
    click.core.ParameterSource.DEFAULT: "default",
}
_URIS: Final = ("incoming", "metrics")


def check(path: Path, group: click.Group) -> None:
    """Raise `ConfigError` for the first thing in a file that a command would refuse."""
    values = config_file.read(path, group)
    for name, command in config_file.configured(group).items():
        ctx = click.Context(command, info_name=name)
        for key, param in config_file.in_file(command).items():
            value = values[name].get(param.name or "")
            if value is None:
                continue
            try:
                param.type_cast_value(ctx, value)
                if key in _URIS and value != "defer":
                    parse_uri(value)
            except (click.ClickException, ConfigError) as exc:
                message = exc.message if isinstance(exc, click.ClickException) else str(exc)
                raise ConfigError(f"{path}: [{name}] {key}: {message}") from exc


def effective(path: Path | None, group: click.Group) -> dict[str, dict[str, tuple[Any, str]]]:
    """Return value and origin of every parameter, by command and key; None for what is not set."""
    values = {} if path is None else config_file.read(path, group)
    found: dict[str, dict[str, tuple[Any, str]]] = {}
    for name, command in config_file.configured(group).items():
        ctx = click.Context(command, info_name=name, default_map=values.get(name, {}))
        found[name] = {}
        for param in command.params:
            key = config_file.key_of_param(param)
            if key in ("config", "help"):
                continue
            value, source = param.consume_value(ctx, {})
            is_set = isinstance(value, str | int | float | list | tuple)  # click has a value of its own for "unset"
            if isinstance(value, tuple):
                value = list(value)
            found[name][key] = (value if is_set else None, _ORIGINS[source] if is_set else "unset")
    return found


def as_toml(path: Path | None, found: dict[str, dict[str, tuple[Any, str]]]) -> str:
    """Return the effective values as a file that says the same, each line with its origin.

    Raises:
        ConfigError: a disk is not written as one.
    """
    lines = [f"# {path}" if path is not None else "# no file"]
    for name, parameters in found.items():
        lines += ["", f"[{name}]"]
        for key, (value, origin) in parameters.items():
            if (name, key) not in (("serve", "disk"), ("serve", "readonly")):
                lines.append(f"# {key} =" if value is None else _line(key, value, origin))
    read_only = found["serve"]["readonly"][0] or []
    disks, origin = found["serve"]["disk"]
    for text in disks or ():
        lines += ["", "[[disk]]"]
        table = msgspec.structs.asdict(config_file.DiskTable.of(text, read_only))
        lines += [_line(key, value, origin) for key, value in table.items() if value not in (None, False)]
    return "\n".join(lines)


def _line(key: str, value: Any, origin: str) -> str:
    # JSON's strings, numbers and lists are TOML's, too.
    return f"{f'{key} = {json.dumps(value)}':<44} # {origin}"
