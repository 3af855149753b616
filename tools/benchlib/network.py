"""A link of a given rate or delay between two network namespaces, for one stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchlib.measure import BenchError
from benchlib.stage import run

if TYPE_CHECKING:
    from benchlib.stage import Stage

_SOURCE, _DESTINATION = "198.51.100.1", "198.51.100.2"  # TEST-NET-2, RFC 5737
_DEVICES = ("va", "vb")


@dataclass(frozen=True)
class Link:
    """A link that exists."""

    host: str
    """The destination's address."""
    source_host: str
    prefixes: tuple[tuple[str, ...], tuple[str, ...]]
    """What to put before a command to run it at the source or the destination; it shares our mounts."""
    source_namespace: str

    def sent_bytes(self) -> int:
        """Return what the source has put on the link, headers and repeats of TCP included."""
        shown = json.loads(run(["ip", "-netns", self.source_namespace, "-json", "-stats", "link", "show", "va"]))
        count: int = shown[0]["stats64"]["tx"]["bytes"]
        return count


def make_link(stage: Stage, mbit: int = 1000) -> Link:
    """Make two namespaces, a veth pair between them and a token bucket on each end; they go with the stage.

    The link carries ``mbit`` million bits a second.

    Raises:
        BenchError: the kernel or the user's rights do not allow it.
    """
    names = _make_namespaces(stage)
    _command("ip", "link", "add", "va", "netns", names[0], "type", "veth", "peer", "name", "vb", "netns", names[1])
    for name, device in zip(names, _DEVICES, strict=True):
        rate = ("tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "50ms")
        _command("tc", "-netns", name, "qdisc", "add", "dev", device, "root", *rate)
    return _set_up(names)


def make_delayed_link(stage: Stage, delay_s: float, buffer_bytes: int) -> Link:
    """Make two namespaces and between them a link that holds each packet for ``delay_s`` seconds.

    A connection's receive buffer has at most ``buffer_bytes`` at both ends.

    Raises:
        BenchError: the kernel or the user's rights do not allow it.
    """
    names, made = _make_namespaces(stage), [f"fb{os.getpid()}{end}" for end in "ab"]
    carrier = stage.start(sys.executable, "-m", "benchlib.delayed", *made, str(delay_s))
    carrier.wait_ready(lambda: all(Path(f"/sys/class/net/{name}").exists() for name in made))
    for name, device, there in zip(names, _DEVICES, made, strict=True):
        _command("ip", "link", "set", there, "netns", name, "name", device)
        _command("ip", "-netns", name, "link", "set", device, "txqueuelen", "10000")
    link = _set_up(names)
    for prefix in link.prefixes:
        _command(*prefix, "sysctl", "-q", "-w", f"net.ipv4.tcp_rmem=4096 {buffer_bytes} {buffer_bytes}")
    return link


def _make_namespaces(stage: Stage) -> list[str]:
    names = [f"fusemig-bench-{os.getpid()}-{end}" for end in "ab"]
    for name in names:
        _command("ip", "netns", "add", name)
        stage.defer(_delete, name)
    return names


def _set_up(names: list[str]) -> Link:
    for name, device, address in zip(names, _DEVICES, (_SOURCE, _DESTINATION), strict=True):
        ip = ("ip", "-netns", name)
        _command(*ip, "address", "add", f"{address}/24", "dev", device)
        _command(*ip, "link", "set", "lo", "up")
        _command(*ip, "link", "set", device, "up")
    # Not `ip netns exec`: that makes a mount namespace of its own, and we could not see the mounts made in it.
    prefixes = tuple(("nsenter", f"--net=/run/netns/{name}", "--") for name in names)
    return Link(_DESTINATION, _SOURCE, (prefixes[0], prefixes[1]), names[0])


def _command(*words: str) -> None:
    try:
        run(words)
    except BenchError as error:
        raise BenchError(f"no link of a given rate here: {error}") from error


def _delete(name: str) -> None:
    subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)
