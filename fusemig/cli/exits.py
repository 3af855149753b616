"""Exit codes, and errors as people see them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

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
MEANINGS: Final = {
    0: "it did what it was asked to",
    1: "failed; the text says why",
    2: "usage: something cannot be as given; nothing was started",
    3: "FUSE is unavailable",
    4: "authentication failed",
    5: "the destination refused",
    6: "cancelled; the disks are still here",
    7: "in doubt: it is not known who owns the disks; see `fusemig resolve --help`",
    8: "the two sides hold different bytes; nothing was handed over",
    9: "the guest that was to move stands still",
    130: "interrupted",
}
"""In short; docs/cli.md has more."""


def fail(message: str, kind: str = "failed") -> int:
    """Print an error for people and return its exit code."""
    print(f"fusemig: {message}", file=sys.stderr)
    return EXIT_CODES.get(kind, EXIT_CODES["failed"])


def run(function: Callable[..., Awaitable[int | None]], *args: Any) -> int:
    """Run an async command; return its exit code."""
    import trio  # not needed to answer guests (`fusemig.estate`), nor by what only prints

    try:
        return trio.run(function, *args) or 0
    except FusemigError as exc:
        return fail(str(exc), exc.kind)
    except KeyboardInterrupt:
        return 130
