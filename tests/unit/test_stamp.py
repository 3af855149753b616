"""Stamps: whatever is done to a file shows."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from fusemig.disk.stamp import SETTLE_NS, settled_stamp, stamp_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("deed", ["write", "same bytes", "times set back", "replaced", "shorter", "moved and back"])
def test_a_deed_shows(tmp_path: Path, deed: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"0" * 4096)
    before = settled_stamp(image.stat)
    assert before
    found = image.stat()
    match deed:
        case "write":
            with image.open("r+b") as file:
                file.write(b"1")
        case "same bytes":
            with image.open("r+b") as file:
                file.write(b"0")
        case "times set back":
            with image.open("r+b") as file:
                file.write(b"1")
            os.utime(image, ns=(found.st_atime_ns, found.st_mtime_ns))
        case "replaced":
            (tmp_path / "other").write_bytes(b"0" * 4096)
            os.utime(tmp_path / "other", ns=(found.st_atime_ns, found.st_mtime_ns))
            (tmp_path / "other").replace(image)
        case "shorter":
            os.truncate(image, 512)
        case "moved and back":
            image.rename(tmp_path / "elsewhere")
            (tmp_path / "elsewhere").rename(image)
    assert stamp_of(image.stat()) != before


def test_reading_does_not_show(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"0" * 4096)
    before = settled_stamp(image.stat)
    image.read_bytes()
    os.sync()
    assert stamp_of(image.stat()) == before


def test_it_waits_until_a_later_write_must_show(tmp_path: Path) -> None:
    """Right after a write the clock of the file system may not have moved on."""
    image = tmp_path / "image"
    image.write_bytes(b"0")
    settled_stamp(image.stat)
    assert time.time_ns() - image.stat().st_ctime_ns >= SETTLE_NS


def test_nothing_is_told_of_what_is_no_file(tmp_path: Path) -> None:
    assert stamp_of(tmp_path.stat()) == ""
    assert stamp_of(os.stat("/dev/null")) == ""
