"""A link between two network namespaces, which can be cut, restored and made deaf in one direction."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from support.loops import run

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESSES = ("198.51.100.1", "198.51.100.2")  # TEST-NET-2, RFC 5737
_DEVICES = ("va", "vb")
_NOBODY = "02:00:00:00:00:99"


class Link:
    """Two hosts' ends of a link; made by `link`."""

    def __init__(self, names: tuple[str, str]) -> None:
        self._names = names
        self.address = ADDRESSES[1]
        """The destination's."""
        # Not `ip netns exec`: that makes a mount namespace of its own, and nobody would see the mounts made in it.
        self.prefixes = tuple(("nsenter", f"--net=/run/netns/{name}", "--") for name in names)

    def _ip(self, end: int, *words: str) -> None:
        run("ip", "-netns", self._names[end], *words)

    def cut(self) -> None:
        """Let nothing through, and tell nobody."""
        self._ip(0, "link", "set", _DEVICES[0], "down")

    def restore(self) -> None:
        """Mend a cut."""
        self._ip(0, "link", "set", _DEVICES[0], "up")

    def deafen(self, end: int) -> None:
        """Lose what is sent to this end (0: the source): it goes to a station that is not there."""
        self._ip(
            1 - end, "neigh", "replace", ADDRESSES[end], "lladdr", _NOBODY, "dev", _DEVICES[1 - end], "nud", "permanent"
        )

    def undeafen(self, end: int) -> None:
        """Mend that."""
        self._ip(1 - end, "neigh", "del", ADDRESSES[end], "dev", _DEVICES[1 - end])


@contextmanager
def link() -> Iterator[Link]:
    """Make two namespaces and a link between them; skips the test where that is not allowed."""
    names = tuple(f"fusemig-test-{os.getpid()}-{end}" for end in "ab")
    try:
        for name in names:
            made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True, text=True, timeout=20)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        run(
            "ip",
            "link",
            "add",
            _DEVICES[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            _DEVICES[1],
            "netns",
            names[1],
        )
        for name, device, address in zip(names, _DEVICES, ADDRESSES, strict=True):
            run("ip", "-netns", name, "address", "add", f"{address}/24", "dev", device)
            run("ip", "-netns", name, "link", "set", "lo", "up")
            run("ip", "-netns", name, "link", "set", device, "up")
        yield Link((names[0], names[1]))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)
