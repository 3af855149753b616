"""What commands print for programs."""

from __future__ import annotations

import json
from typing import Any


def print_json(value: Any) -> None:
    """Print one JSON object as a line of its own, at once."""
    print(json.dumps(value), flush=True)
