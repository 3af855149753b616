"""``fusemig.toml``: the options of commands that take them from a file too.

One table says what there is: the commands' own options. From it come the command line, the environment, the file and
the reference in docs/cli.md. Rules:

1. The command line goes before the environment (``FUSEMIG_COMMAND_OPTION``), that before the file, that before the
   default; click decides, value by value (`click.Context.default_map`).
2. The file has a table for each command, with its arguments and long options as keys; disks are ``[[disk]]``. What is
   not known is refused, with the nearest name that is.
3. Only `ConfiguredCommand`s take values from a file. What a person must decide each time, as for ``resolve``, does not.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import click
import msgspec

from fusemig.daemon.disk_spec import parse_disk
from fusemig.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

NAME: Final = "fusemig.toml"
VARIABLE: Final = "FUSEMIG_CONFIG"


class DiskTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ``[[disk]]``: what ``--disk`` and ``--readonly`` say of one."""

    name: Annotated[str, msgspec.Meta(pattern="^[^=]+$")]
    path: Annotated[str, msgspec.Meta(pattern="^(?!.*,base=).+$")]
    base: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    readonly: bool = False

    @staticmethod
    def of(option: str, read_only: Collection[str]) -> DiskTable:
        """Return the table that means the same as a value of ``--disk``; raises `ConfigError` if it is none."""
        spec = parse_disk(option, read_only)
        return DiskTable(spec.name, str(spec.path), None if spec.base is None else str(spec.base), spec.is_read_only)

    def option(self) -> str:
        """Return the value of ``--disk`` that means the same."""
        return f"{self.name}={self.path}" + ("" if self.base is None else f",base={self.base}")


def search_path(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Return where the file is looked for if it is not named; the first one that exists is taken, alone."""
    home = environment.get("XDG_CONFIG_HOME") or os.path.join(environment.get("HOME", "/"), ".config")
    return [Path(home, "fusemig", NAME), Path("/etc/fusemig", NAME)]


def find(named: Path | None) -> Path | None:
    """Return the file to use: the one that is named, or the first on the search path; None if there is none."""
    if named is not None:
        return named
    # What may not be looked at is somebody else's: a program that changed its user still has the old one's $HOME.
    return next((path for path in search_path() if os.path.isfile(path)), None)


class ConfiguredCommand(click.Command):
    """A command whose options may be given in the environment and in a file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Name each option's variable after the option, and add ``--config``."""
        super().__init__(*args, **kwargs)
        for param in self.params:
            if isinstance(param, click.Option) and param.envvar is None:
                param.envvar = f"FUSEMIG_{key_of(self.name or '')}_{key_of(key_of_param(param))}".upper()
        self.params.append(
            click.Option(
                ["--config"],
                type=click.Path(path_type=Path, dir_okay=False),
                metavar="FILE",
                envvar=VARIABLE,
                is_eager=True,
                expose_value=False,
                callback=self._load,
                help=f"Take options from this file (default: fusemig/{NAME} in ~/.config, then in /etc).",
            )
        )

    def _load(self, ctx: click.Context, _param: click.Parameter, named: Path | None) -> None:
        path = None if ctx.resilient_parsing else find(named)
        if path is None:
            return
        group = ctx.parent.command if ctx.parent is not None else None
        assert isinstance(group, click.Group)
        try:
            ctx.default_map = read(path, group).get(self.name or "", {})
        except ConfigError as exc:
            raise click.ClickException(str(exc)) from exc

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; disks that are given otherwise replace those of the file with all that it says of them."""
        rest = super().parse_args(ctx, args)
        source = click.core.ParameterSource
        if (
            "read_only" in ctx.params
            and ctx.get_parameter_source("disks") is not source.DEFAULT_MAP
            and ctx.get_parameter_source("read_only") is source.DEFAULT_MAP
        ):
            ctx.params["read_only"] = ()
        return rest


def key_of(name: str) -> str:
    """Return a name as Python and the environment write it."""
    return name.replace("-", "_")


def key_of_param(param: click.Parameter) -> str:
    """Return the key that a parameter has in the file: its long option, or an argument's name."""
    if isinstance(param, click.Option):
        return max(param.opts, key=len).removeprefix("--")
    return param.name or ""


def configured(group: click.Group) -> dict[str, ConfiguredCommand]:
    """Return the commands that take options from a file, by name."""
    return {name: command for name, command in group.commands.items() if isinstance(command, ConfiguredCommand)}


def in_file(command: ConfiguredCommand) -> dict[str, click.Parameter]:
    """Return what a command's table may say: parameters by key. Disks have tables of their own."""
    others = ("config", "help", "readonly") if command.name == "serve" else ("config", "help")
    return {
        key: param
        for param in command.params
        if (key := key_of_param(param)) not in others and (command.name, key) != ("serve", "disk")
    }


def read(path: Path, group: click.Group) -> dict[str, dict[str, Any]]:
    """Return what a file says, as values of parameters by command and parameter name.

    Raises:
        ConfigError: it cannot be read, is no TOML, or says something that is not known.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}; name another file with --config") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is no TOML: {exc}") from exc
    commands = configured(group)
    schema = _schema(commands)
    try:
        document = msgspec.convert(data, schema)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{path}: {_explain(str(exc), commands)}") from exc
    values = {}
    for name, command in commands.items():
        table = getattr(document, key_of(name))
        values[name] = {
            param.name or "": value
            for key, param in in_file(command).items()
            if (value := getattr(table, key_of(key))) is not None
        }
    if document.disk:
        values["serve"]["disks"] = [disk.option() for disk in document.disk]
        values["serve"]["read_only"] = [disk.name for disk in document.disk if disk.readonly]
    return values


def _schema(commands: Mapping[str, ConfiguredCommand]) -> Any:
    """Return the type of a whole file, made from the commands' parameters."""
    tables: list[Any] = [("disk", list[DiskTable], msgspec.field(default_factory=list))]
    for name, command in commands.items():
        fields = [(key_of(key), _type_of(param) | None, None) for key, param in in_file(command).items()]
        table = _struct(name, fields)
        tables.append((key_of(name), table, msgspec.field(default_factory=table)))
    return _struct("fusemig", tables)


def _struct(name: str, fields: list[Any]) -> Any:
    return msgspec.defstruct(name, fields, rename="kebab", forbid_unknown_fields=True, frozen=True, kw_only=True)


def _type_of(param: click.Parameter) -> Any:
    """Return what TOML must have for a parameter; click looks at the value itself."""
    if isinstance(param, click.Option) and param.is_flag:
        return bool
    if isinstance(param.type, click.IntRange):
        kind: Any = Annotated[int, msgspec.Meta(ge=param.type.min, le=param.type.max)]
    elif param.type is click.FLOAT:
        kind = float
    else:
        kind = str
    return list[kind] if isinstance(param, click.Option) and param.multiple else kind


def _explain(problem: str, commands: Mapping[str, ConfiguredCommand]) -> str:
    """Return msgspec's complaint in the words of the file, with the name that may have been meant."""
    what, _, where = problem.partition(" - at `$")
    where = where.rstrip("`").removeprefix(".")
    table = where.partition(".")[0].partition("[")[0]
    place = f"[{where}]" if where else "the top level"
    unknown = re.search(r"unknown field `(.*)`", what)
    if unknown is None:
        return f"{place}: {what[0].lower()}{what[1:]}"
    if not where:
        known = ["disk", *commands]
    elif table == "disk":
        known = list(DiskTable.__struct_fields__)
    else:
        known = list(in_file(commands[table]))
    if table == "serve" and unknown[1] in ("disk", "readonly"):
        return "[serve]: a disk has a table of its own: write [[disk]] with name, path, base and readonly"
    near = difflib.get_close_matches(unknown[1], known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(sorted(known))}"
    return f"{place}: unknown key '{unknown[1]}'; {hint}"
