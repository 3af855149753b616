"""What every line of the log says of the migration in which it was written.

A block of code declares its fields with `log_fields`; they are asked for when a line is written, by the task itself,
its children, and the threads that they use, so that a phase is the present one also in a task that began before it.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, MutableMapping
    from typing import Any

_fields: ContextVar[Callable[[], Mapping[str, object]] | None] = ContextVar("log fields", default=None)


@contextmanager
def log_fields(fields: Callable[[], Mapping[str, object]]) -> Iterator[None]:
    """Have lines that are written in the block carry ``fields``; one that is given with a line goes before."""
    token = _fields.set(fields)
    try:
        yield
    finally:
        _fields.reset(token)


def add_log_fields(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add them to a line (a structlog processor)."""
    fields = _fields.get()
    if fields is not None:
        for name, value in fields().items():
            event.setdefault(name, value)
    return event
