"""The command line of tools/bench."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from benchlib import chart, report
from benchlib.measure import BenchError, Row, say
from benchlib.rows_bulk import row_b1, row_b2, row_b3, row_b4
from benchlib.rows_converge import row_c1, row_c2, row_c3, row_c4
from benchlib.rows_dirty import row_d1, row_d2, row_d3
from benchlib.rows_forecast import row_f1, row_f2
from benchlib.rows_mount import row_m1, row_m2, row_m3, row_m4
from benchlib.rows_postcopy import row_p1
from benchlib.rows_scale import row_s1, row_s2
from benchlib.rows_streams import row_t4
from benchlib.rows_succession import row_u1
from benchlib.rows_thrift import row_t1, row_t2, row_t3
from benchlib.settings import Settings
from benchlib.subject import why_missing
from benchlib.versions import versions

if TYPE_CHECKING:
    from collections.abc import Callable

_ROWS: dict[str, Callable[[Settings], Row]] = {
    "M1": row_m1,
    "M2": row_m2,
    "M3": row_m3,
    "M4": row_m4,
    "B1": row_b1,
    "B2": row_b2,
    "B3": row_b3,
    "B4": row_b4,
    "D1": row_d1,
    "D2": row_d2,
    "D3": row_d3,
    "C1": row_c1,
    "C2": row_c2,
    "C3": row_c3,
    "C4": row_c4,
    "F1": row_f1,
    "F2": row_f2,
    "S1": row_s1,
    "S2": row_s2,
    "P1": row_p1,
    "U1": row_u1,
    "T1": row_t1,
    "T2": row_t2,
    "T3": row_t3,
    "T4": row_t4,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/bench", description="Measure fusemig beside its peers.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument(
        "--rounds", type=int, help="rounds of every row (default 5, with --quick 2; of long ones fewer)"
    )
    parser.add_argument("--rows", default="", metavar="M1,B1", help=f"only these rows of {','.join(_ROWS)}")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where rows on a real disk keep images")  # noqa: S108
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="where bench.md and bench.svg go")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the results to FILE, one object a line")
    parser.add_argument("--lane", action="append", help="pass --lane to `serve`; repeated: every lane is a side")
    parser.add_argument("--fusemig", metavar="COMMAND", help="the fusemig to measure (default: the one installed here)")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    installed = Path(sys.executable).with_name("fusemig")
    command = shlex.split(options.fusemig) if options.fusemig else [str(installed)]
    return Settings(
        asked_rounds=options.rounds,
        quick=options.quick,
        directory=options.dir.resolve(),
        fusemig=tuple(command),
        lanes=tuple(options.lane) if options.lane else (None,),
    )


def _chosen(parser: argparse.ArgumentParser, text: str) -> list[str]:
    keys = [key.strip().upper() for key in text.split(",") if key.strip()]
    for key in keys:
        if key not in _ROWS:
            parser.error(f"there is no row {key}: choose from {', '.join(_ROWS)}")
    return keys or list(_ROWS)


def _measure(keys: list[str], settings: Settings, rows: list[Row]) -> bool:
    """Measure the rows; False if the user interrupted, with the finished ones in ``rows``."""
    for key in keys:
        say(f"{key} ...")
        began = time.monotonic()
        try:
            row = _ROWS[key](settings)
        except BenchError as error:
            row = Row(key, "could not be measured", notes=[str(error)])
            say(f"    {error}")
        except KeyboardInterrupt:
            say(f"    interrupted in {key}: reporting the rows that are done")
            return False
        row.seconds = time.monotonic() - began
        rows.append(row)
    return True


def _interrupt(_number: int, _frame: object) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # cleaning up is bounded in time and must not be cut short
    raise KeyboardInterrupt


def main() -> int:
    """Measure and report."""
    parser = _parser()
    options = parser.parse_args()
    keys, settings = _chosen(parser, options.rows), _settings(options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    reason = why_missing(settings)
    if reason:
        say(f"fusemig itself is not measured, only its peers: {reason}")
    if not settings.directory.is_dir():
        parser.error(f"--dir {settings.directory} is no directory")
    rows: list[Row] = []
    began = time.monotonic()
    found, command = versions(), shlex.join(["tools/bench", *sys.argv[1:]])
    complete = _measure(keys, settings, rows)
    text = report.markdown(rows, found, command)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "bench.md").write_text(text)
    subtitle = f"fusemig {found['fusemig']}, kernel {found['kernel']}, {found['machine']}"
    (options.output / "bench.svg").write_text(chart.svg(rows, subtitle))
    if options.json:
        when = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        with options.json.open("a") as file:
            file.write(json.dumps(report.as_json(rows, found, command, when)) + "\n")
    say(f"{time.monotonic() - began:.0f} s; table and chart in {options.output}")
    return 0 if complete else 130


if __name__ == "__main__":
    sys.exit(main())
