"""The command line: click commands over the daemon and over its control socket.

The only place that prints. stdout is for data, stderr for people; every error is one or two lines with the next step
and no traceback, and becomes an exit code in `EXIT_CODES`.
"""

from fusemig.cli import lean  # noqa: F401  (before anything that loads structlog)
from fusemig.cli.main import main

__all__ = ["main"]
