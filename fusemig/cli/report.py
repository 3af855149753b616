"""``fusemig report``: the report of a migration, from a daemon's memory or from what it once said."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from fusemig.control_client import open_control
from fusemig.errors import ConfigError, StateError
from fusemig.pages.report import report_page
from fusemig.qmp.schema import MigrationRecord

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class ReportRequest:
    """The options of ``fusemig report``."""

    target: Path
    output: Path
    migration: str
    as_json: bool


async def report_command(request: ReportRequest) -> None:
    """Write the page, or the records.

    Raises:
        ConfigError: the target has no such migration, or cannot be read; the output cannot be written.
    """
    raw = await _records(request.target)
    chosen = [one for one in raw if _session(one).startswith(request.migration)]
    if not chosen:
        what = f"no migration {request.migration}…" if request.migration else "no migration"
        raise StateError(f"'{request.target}' remembers {what}: a daemon forgets them when it ends")
    if request.as_json:
        text = "".join(json.dumps(one) + "\n" for one in chosen)
    else:
        text = report_page(_decoded(chosen[-1], request.target)).text
    await trio.to_thread.run_sync(_write, request.output, text)


async def _records(target: Path) -> list[dict[str, Any]]:
    try:
        is_socket = stat.S_ISSOCK(os.stat(target).st_mode)
    except FileNotFoundError:
        raise ConfigError(
            f"'{target}' does not exist: name a control socket, or a file that `fusemig report SOCKET --json` wrote"
        ) from None
    if is_socket:
        async with open_control(target) as control:
            records: list[dict[str, Any]] = await control.execute("x-fusemig-query-history")
        return records
    return await trio.to_thread.run_sync(_read, target)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as exc:
        raise ConfigError(f"'{path}' cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise ConfigError(f"'{path}' is no file that `fusemig report SOCKET --json` wrote: {exc}") from exc
    for one in records:
        _decoded(one, path)
    return records


def _decoded(raw: object, where: Path) -> MigrationRecord:
    try:
        record = msgspec.convert(raw, MigrationRecord)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"'{where}' is no file that `fusemig report SOCKET --json` wrote: {exc}") from exc
    if isinstance(record.info.x_fusemig, msgspec.UnsetType):
        raise ConfigError(f"'{where}' is no file that `fusemig report SOCKET --json` wrote: it lacks x-fusemig")
    return record


def _session(raw: dict[str, Any]) -> str:
    session: str = raw["info"]["x-fusemig"]["session"]
    return session


def _write(path: Path, text: str) -> None:
    if str(path) == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"the report cannot be written to '{path}': {exc.strerror}; choose another -o") from exc
