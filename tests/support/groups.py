"""Groups of daemons for tests: the points at which those who take part may die, and two pairs of real ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from support.hosts import MIB, Command, wait_until, write_random

if TYPE_CHECKING:
    from pathlib import Path

    from support.hosts import Finished, Host, Hosts

COORDINATOR_POINTS: Final = {
    "after-one-started": False,
    "after-started": False,
    "after-one-continued": False,
    "after-continued": False,
    "before-proposal": False,
    "after-proposal": True,
    "after-over": True,
}
"""Where a coordinator may die, and whether the group moves then."""
PLEDGE_POINTS: Final = {
    "after-one-pledged": False,
    "after-pledged": False,
    "after-commit-decided": True,
    "after-abort-decided": False,
}
"""Where a source that moves in a group may die, and whether the group moves then."""


class RealGroup:
    """Two pairs of daemons, each with a disk, and a directory for the decision."""

    def __init__(self, hosts: Hosts, place: Path, failpoints: tuple[str, str] = ("", ""), size: int = 2 * MIB) -> None:
        """Start them; a source kills itself at its failpoint."""
        self._hosts = hosts
        self._place = place
        self.directory = place / "group"
        self.directory.mkdir()
        self.uris = [f"unix:{place}/incoming-{index}" for index in range(2)]
        self.images = [write_random(place / f"{index}.img", size, index) for index in range(2)]
        self.copies = [place / f"{index}.copy" for index in range(2)]
        self.sources = [
            hosts.start(
                f"source-{index}", {"vda": image}, failpoint=f"{failpoints[index]}:kill" * bool(failpoints[index])
            )
            for index, image in enumerate(self.images)
        ]
        self.destinations = [self._destination(index) for index in range(2)]
        self._commands: list[Command] = []

    def _destination(self, index: int) -> Host:
        return self._hosts.start(f"destination-{index}", {"vda": self.copies[index]}, incoming=self.uris[index])

    def start(self, *arguments: object, failpoint: str = "") -> Command:
        """Start ``fusemig migrate --group``."""
        pairs = [f"{source.control}={uri}" for source, uri in zip(self.sources, self.uris, strict=True)]
        command = Command(
            ["migrate", "--group", self.directory, *pairs, "--progress", "none", "--downtime-limit", "2s", *arguments],
            self._place,
            f"group-{len(self._commands)}",
            f"{failpoint}:kill" * bool(failpoint),
        )
        self._commands.append(command)
        return command

    def migrate(self, *arguments: object) -> Finished:
        """Run it."""
        return self.start(*arguments).finish()

    def restart_source(self, index: int) -> Host:
        """Start a source that has killed itself again."""
        self.sources[index].wait_killed()
        self.sources[index] = self._hosts.start(f"source-{index}-again", {"vda": self.images[index]})
        return self.sources[index]

    def restart_destination(self, index: int) -> Host:
        """Start a destination that was killed again."""
        self.destinations[index] = self._destination(index)
        return self.destinations[index]

    def owners(self) -> list[str]:
        """Return who owns each disk once nothing is in doubt and nothing is frozen: ``source`` or ``destination``."""

        def settled() -> list[str] | None:
            found = []
            for source, destination in zip(self.sources, self.destinations, strict=True):
                here, there = source.disk(), destination.disk()
                if here["state"] not in ("owner", "released") or here["gate"] == "closed" or "in-doubt" in here:
                    return None
                if here["state"] == "released" and there["state"] != "owner":
                    return None
                if here["state"] == "owner" and source.migration().get("status", "none") not in _AT_REST:
                    return None
                assert (here["gate"], there["gate"]) in (("open", "read-only"), ("read-only", "open"))
                found.append("source" if here["gate"] == "open" else "destination")
            return found

        owners: list[str] = wait_until(settled, "the end of the group")
        return owners

    def close(self) -> None:
        """End its commands."""
        for command in self._commands:
            command.end()


_AT_REST: Final = ("none", "failed", "cancelled", "completed", "pre-switchover", "active")
