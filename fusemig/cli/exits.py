"""Exit codes, and errors as people see them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import trio

from fusemig.errors import FusemigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

EXIT_CODES: Final = {
    "failed": 1,
    "usage": 2,
    "fuse-unavailable": 3,
    "authentication": 4,
    "refused": 5,
    "cancelled": 6,
    "in-doubt": 7,
    "mismatch": 8,
    "guest": 9,
}
"""By `FusemigError.kind`; 0 is success, 130 an interrupt that could not wait."""


def fail(message: str, kind: str = "failed") -> int:
    """Print an error for people and return its exit code."""
    print(f"fusemig: {message}", file=sys.stderr)
    return EXIT_CODES.get(kind, EXIT_CODES["failed"])


def run(function: Callable[..., Awaitable[int | None]], *args: Any) -> int:
    """Run an async command; return its exit code."""
    try:
        return trio.run(function, *args) or 0
    except FusemigError as exc:
        return fail(str(exc), exc.kind)
    except KeyboardInterrupt:
        return 130
