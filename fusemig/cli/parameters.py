"""What values of options mean, and the argument that most commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from fusemig.core.units import parse_duration, parse_size
from fusemig.errors import ConfigError


class Rate(click.ParamType[int]):
    """Bytes per second, such as 100M."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Take what `parse_size` reads."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ConfigError as exc:
            self.fail(str(exc), param, ctx)


class Time(click.ParamType[float]):
    """Seconds, written as 300ms or 2s."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Take what `parse_duration` reads."""
        if isinstance(value, float):
            return value
        try:
            return parse_duration(value)
        except ConfigError as exc:
            self.fail(str(exc), param, ctx)


class Mountpoint(click.ParamType[Path]):
    """A path that is not looked at: if it is a mount to be taken over, nobody answers there yet (click.Path stats)."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Take anything."""
        return Path(value)


SOCKET: Final = click.argument("socket", type=click.Path(path_type=Path))
