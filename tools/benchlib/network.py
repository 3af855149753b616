"""A link of 1 Gbit/s between two network namespaces, for one stage."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchlib.measure import BenchError
from benchlib.stage import run

if TYPE_CHECKING:
    from benchlib.stage import Stage

_SOURCE, _DESTINATION = "198.51.100.1", "198.51.100.2"  # TEST-NET-2, RFC 5737


@dataclass(frozen=True)
class Link:
    """A link that exists."""

    host: str
    """The destination's address."""
    source_host: str
    prefixes: tuple[tuple[str, ...], tuple[str, ...]]
    """What to put before a command to run it at the source or the destination; it shares our mounts."""


def make_link(stage: Stage) -> Link:
    """Make two namespaces, a veth pair between them and a token bucket on each end; they go with the stage.

    Raises:
        BenchError: the kernel or the user's rights do not allow it.
    """
    names = [f"fusemig-bench-{os.getpid()}-{end}" for end in "ab"]
    for name in names:
        _command("ip", "netns", "add", name)
        stage.defer(_delete, name)
    _command("ip", "link", "add", "va", "netns", names[0], "type", "veth", "peer", "name", "vb", "netns", names[1])
    for name, device, address in zip(names, ("va", "vb"), (_SOURCE, _DESTINATION), strict=True):
        ip = ("ip", "-netns", name)
        _command(*ip, "address", "add", f"{address}/24", "dev", device)
        _command(*ip, "link", "set", "lo", "up")
        _command(*ip, "link", "set", device, "up")
        rate = ("tbf", "rate", "1gbit", "burst", "256kb", "latency", "50ms")
        _command("tc", "-netns", name, "qdisc", "add", "dev", device, "root", *rate)
    # Not `ip netns exec`: that makes a mount namespace of its own, and we could not see the mounts made in it.
    prefixes = tuple(("nsenter", f"--net=/run/netns/{name}", "--") for name in names)
    return Link(_DESTINATION, _SOURCE, (prefixes[0], prefixes[1]))


def _command(*words: str) -> None:
    try:
        run(words)
    except BenchError as error:
        raise BenchError(f"no link of 1 Gbit/s here: {error}") from error


def _delete(name: str) -> None:
    subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)
