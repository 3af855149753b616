"""Logs: structlog on stderr, for people, for the journal, or as JSON lines (docs/logs.md)."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Final

import structlog

from fusemig.log_context import add_log_fields

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""syslog's, which the journal takes from a prefix (sd-daemon(3))."""


def set_up_logs(log_format: str = "console", level: str = "info") -> None:
    """Send logs of at least ``level`` to stderr as ``console`` or ``json``."""
    processors: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        add_log_fields,
        structlog.processors.add_log_level,
    ]
    if log_format == "json":
        processors += [
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    elif _is_journal(os.environ, sys.stderr.fileno()):
        processors += [structlog.processors.format_exc_info, render_for_journal]
    else:
        processors += [
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty() and "NO_COLOR" not in os.environ),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Forward()], level=max(LEVELS[level], logging.WARNING), force=True)


def render_for_journal(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
    """Return a line with its priority in front; the journal adds the time itself (a structlog renderer)."""
    level = event.pop("level", "info")
    text, trace = event.pop("event"), event.pop("exception", "")
    pairs = "".join(f" {name}={value!r}" for name, value in sorted(event.items()))
    prefix = f"<{_PRIORITIES.get(level, 6)}>"
    return "\n".join(prefix + line for line in f"{text}{pairs}\n{trace}".rstrip("\n").split("\n"))


def _is_journal(environment: Mapping[str, str], descriptor: int) -> bool:
    """Tell whether a descriptor leads to the journal: systemd names the device and inode of the one that does."""
    status = os.fstat(descriptor)
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class _Forward(logging.Handler):
    """Takes what libraries say to `logging` to where everything else is said."""

    def emit(self, record: logging.LogRecord) -> None:
        exc_info = record.exc_info or None
        structlog.get_logger().log(record.levelno, record.getMessage(), logger=record.name, exc_info=exc_info)
