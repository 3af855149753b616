"""A guest's move as people see it: its timeline, and what each part of its standstill took."""

from __future__ import annotations

from typing import Any, Final

_WORDS: Final = {
    "copying": "its memory is being copied, the disks' passes go on",
    "standing-still": "it stands still; the disks' last blocks follow",
    "loading": "the destination has proved that it holds every block; the rest of the memory follows",
    "loaded": "the destination holds all of it, not running",
    "given": "COMMIT: from here it cannot run at the source any more",
    "arrived": "TAKEN: the destination owns the disks",
    "at-destination": "it runs at the destination",
    "returning": "the move is called off",
    "returned": "it runs at the source",
    "stuck-at-source": "it stands still, and may run at the source only",
    "in-doubt": "it stands still; nobody knows who owns its disks",
    "stuck-at-destination": "it stands still, and may run at the destination only",
}
"""What each of `fusemig.core.guest.GuestState` means; the first, at-source, is no news."""

_PARTS: Final = (
    ("disks", "standing-still", "loading"),
    ("memory", "loading", "loaded"),
    ("hand-off", "loaded", "arrived"),
    ("start", "arrived", "at-destination"),
    ("return", "returning", "returned"),
)
STUCK: Final = frozenset({"stuck-at-source", "stuck-at-destination"})
"""States in which a guest does not run although it might."""


def timeline(guest: dict[str, Any]) -> list[str]:
    """Return a line for each step of ``x-fusemig.core.guest``."""
    return [f"{step['at-ms'] / 1000:7.3f} s  {_WORDS[step['state']]}" for step in guest.get("timeline", [])]


def downtime(guest: dict[str, Any]) -> str:
    """Return how long the guest stood still and what for; empty if it did not, or does still."""
    if "downtime-ms" not in guest:
        return ""
    at = {step["state"]: step["at-ms"] for step in guest["timeline"]}
    parts = [f"{name} {at[end] - at[begin]:.1f}" for name, begin, end in _PARTS if begin in at and end in at]
    return f"{guest['downtime-ms']:.1f} ms ({', '.join(parts)})"


def lines(guest: dict[str, Any]) -> list[str]:
    """Return all of it for a terminal."""
    found = ["the guest:", *(f"  {line}" for line in timeline(guest))]
    if stood := downtime(guest):
        found.append(f"  it stood still for {stood}")
    return found
