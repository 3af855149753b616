"""The line that says how a migration goes: what is not known is not said."""

from __future__ import annotations

from typing import Any

import pytest

from fusemig.cli.progress import summary


@pytest.mark.parametrize(
    ("bandwidth", "expected"),
    [
        (0, "bulk, pass 1, 64.0 MiB pending, 0 B/s"),
        (1 << 20, "bulk, pass 1, 64.0 MiB pending, 1.0 MiB/s, expected downtime 64001 ms"),
    ],
    ids=["before anything was measured", "measured"],
)
def test_a_downtime_is_expected_once_a_rate_is_known(bandwidth: int, expected: str) -> None:
    """Before, QMP has the largest number that it may have there, which says nothing to a person."""
    info: dict[str, Any] = {
        "status": "active",
        "disk": {"remaining": 64 << 20},
        "expected-downtime": 64001 if bandwidth else 2_000_000,
        "x-fusemig": {"phase": "bulk", "pass": 1, "bandwidth": bandwidth},
    }
    assert summary(info) == expected
