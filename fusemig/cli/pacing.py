"""What people are told of what a migration does to its guests."""

from __future__ import annotations

from typing import Any


def notes(own: dict[str, Any]) -> list[str]:
    """Describe what a migration does to its guests: nothing, in most cases."""
    now = own.get("pacing", {})
    parts = []
    if now.get("mirror", "none") != "none":
        parts.append(f"mirroring {'all' if now['mirror'] == 'all' else 'what is hot'}")
    if now.get("throttle-percentage"):
        parts.append(f"guest writes throttled by {now['throttle-percentage']} %")
    return parts
