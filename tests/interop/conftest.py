"""What the tests with a real QEMU share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.hosts import Hosts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Make fusemig hosts; all are stopped at the end, and none may have misbehaved."""
    hosts = Hosts(tmp_path)
    try:
        yield hosts
    finally:
        problems = hosts.close()
    assert not problems, problems
