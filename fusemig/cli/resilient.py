"""``fusemig serve --resilient``: this process becomes the holder, which starts ``fusemig serve`` as its child."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from fusemig.cli.exits import fail
from fusemig.succession.fdstore import HOLDER
from fusemig.succession.mount import why_not

if TYPE_CHECKING:
    from pathlib import Path


def hold(mountpoint: Path, lane: str, *, is_resilient: bool, has_standby: bool) -> None:
    """Become the holder; or return, in a child that the holder has started. Does not return where it is refused."""
    if os.environ.pop(HOLDER, "") == str(os.getppid()):
        return
    if not is_resilient:
        sys.exit(fail("--standby has the next daemon of --resilient wait: add --resilient, or leave it out", "usage"))
    if lane == "pyfuse3":
        text = "--resilient: on the pyfuse3 lane the mount ends with the daemon: leave --lane out, or --resilient"
        sys.exit(fail(text, "usage"))
    if reason := why_not():
        sys.exit(fail(f"--resilient: {reason}; serve without it, or boot Linux 6.9 or later", "fuse-unavailable"))
    interpreter = [sys.executable, *([] if sys.orig_argv[1:2] == ["-m"] else ["-P"])]
    options = ["--standby"] if has_standby else []
    daemon = [sys.executable, *sys.orig_argv[1:]]
    holder = ["-m", "fusemig.succession.holder", *options, os.path.abspath(mountpoint)]
    os.execv(sys.executable, [*interpreter, *holder, *daemon])  # noqa: S606
