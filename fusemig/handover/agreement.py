"""Before an upgrade: the running daemon and the one that is to succeed it agree that the latter can.

    daemon ── state document ──> candidate      another interpreter, perhaps of another version, that waits warm
           <── version, or why not ──           it has really read the document

Nothing is given up before the answer. The candidate does not compare numbers but reads: so it refuses what it cannot
read, whichever of the two is older, and the daemon refuses a candidate that says so, ends, or says nothing in time.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

import msgspec

from fusemig import __version__
from fusemig.errors import StateError
from fusemig.handover.state import MAX_DOCUMENT, decode_state

if TYPE_CHECKING:
    from collections.abc import MutableMapping

VARIABLE: Final = "FUSEMIG_UPGRADE"
"""In the environment of a candidate: the number of the socket on which it is asked."""
ASK_DEADLINE_S: Final = 10.0
"""How long a candidate waits for the question."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a candidate says."""

    version: str
    """Its own."""
    refusal: str = ""
    """Why it cannot succeed; empty if it can."""


def decode_answer(data: bytes) -> Answer:
    """Read an answer.

    Raises:
        StateError: it is none; nothing at all where the candidate has ended.
    """
    if not data:
        raise StateError("the installed fusemig ended before it answered: run `fusemig --version` to see why")
    try:
        return msgspec.json.decode(data, type=Answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise StateError(f"the installed fusemig gave an answer that cannot be read ({exc})") from exc


def answer(environment: MutableMapping[str, str]) -> bool:
    """Answer, if we are a candidate; return whether to go on. Blocks for up to `ASK_DEADLINE_S`."""
    descriptor = environment.pop(VARIABLE, "")
    if not descriptor:
        return True
    with socket.socket(fileno=int(descriptor)) as channel:
        channel.settimeout(ASK_DEADLINE_S)
        try:
            refusal = _why_not(channel.recv(MAX_DOCUMENT + 1))
            channel.send(msgspec.json.encode(Answer(version=__version__, refusal=refusal)), socket.MSG_NOSIGNAL)
        except OSError:
            return False  # the daemon has given us up
    return not refusal


def _why_not(document: bytes) -> str:
    try:
        decode_state(document)
    except StateError as exc:
        return str(exc)
    return ""
