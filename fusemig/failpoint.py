"""Named points of the hand-off at which a test has a daemon killed; `docs/architecture.md` lists them.

``FUSEMIG_FAILPOINT=NAME:kill`` in the environment of ``fusemig serve``, read once at its start (`arm`): the process
kills itself when it comes to NAME. With ``NAME:kill:PATH`` only if it can remove PATH then, so that of several daemons
with one environment the first dies and its successor does not. Without the variable a point is one comparison and
nothing else.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from fusemig.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE: Final = "FUSEMIG_FAILPOINT"

NAMES: Final = frozenset(
    {
        # source
        "after-prepared-received",
        "after-one-pledged",
        "after-pledged",
        "after-commit-decided",
        "after-abort-decided",
        "after-one-handed-off",
        "after-handed-off",
        "after-commit-sent",
        "after-taken-received",
        "after-released",
        # destination
        "before-prepared",
        "after-one-prepared",
        "after-prepared",
        "after-prepared-sent",
        "after-commit-received",
        "after-one-owner",
        "after-owner",
        "after-taken-sent",
        # the coordinator of a group; `after-proposal` is also a source's
        "after-one-started",
        "after-started",
        "after-one-continued",
        "after-continued",
        "before-proposal",
        "after-proposal",
        "after-over",
        # before anything is sent
        "after-welcome",
        "before-welcome",
        # a mount that outlives its daemon
        "after-mount",
        "after-init-kept",
        "before-resend",
        "after-resend",
    }
)

_armed = ""
_trigger = ""


def arm(environment: Mapping[str, str]) -> str:
    """Take what ``environment`` asks for; return the name of the point, empty if none is asked for.

    Raises:
        ConfigError: it asks for what is not known.
    """
    global _armed, _trigger
    name, _, rest = environment.get(VARIABLE, "").partition(":")
    action, _, _trigger = rest.partition(":")
    if (name or action) and (name not in NAMES or action != "kill"):
        names = ", ".join(sorted(NAMES))
        raise ConfigError(f"{VARIABLE} is for tests: unset it, or write NAME:kill with one of {names}")
    _armed = name
    return name


def reach(name: str) -> None:
    """Die here, if that is what was asked for."""
    if name != _armed:
        return
    if _trigger:
        with suppress(FileNotFoundError):
            os.unlink(_trigger)
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        os.kill(os.getpid(), signal.SIGKILL)
