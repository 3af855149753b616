"""Has structlog loaded without rich, if this is imported first.

structlog takes rich for tracebacks on a console wherever it is installed, and that is half of what a successor would
load before it answers guests (`fusemig.estate`). Nobody here asks for such tracebacks; what draws progress loads rich
itself.
"""

from __future__ import annotations

import sys


def _load_structlog() -> None:
    if "structlog" in sys.modules or "rich" in sys.modules:
        return
    sys.modules["rich"] = None  # type: ignore[assignment]  # "not installed": Language Reference, 5.3.1
    try:
        import structlog  # noqa: F401
    finally:
        del sys.modules["rich"]


_load_structlog()
