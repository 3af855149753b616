"""Compression: what is packed unpacks, what lies is refused, and the rule finds the faster way without alternating."""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING

import pytest

from fusemig.core.compression import LEVELS, Packer, PackingRule, parse_compression, unpack
from fusemig.core.units import CHUNK_SIZE
from fusemig.errors import ConfigError, RemoteProtocolError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT = (b"a disk image is mostly text and zeros " * 40_000)[:CHUNK_SIZE]


@pytest.mark.parametrize("level", [1, 3, LEVELS[-1]])
@pytest.mark.parametrize("length", [512, 4096, 40_000, CHUNK_SIZE])
def test_round_trip(level: int, length: int) -> None:
    content = TEXT[:length]
    packer = Packer(level)
    packed = packer.pack(memoryview(content))
    assert packed is not None
    assert len(packed) < length // 2
    assert unpack(memoryview(packed), length) == content
    assert (packer.bytes_in, packer.bytes_out) == (length, len(packed))


def test_what_does_not_get_smaller_goes_as_it_is_and_is_soon_left_alone() -> None:
    packer, rng = Packer(1), random.Random(1)
    noise = rng.randbytes(65536)
    assert all(packer.pack(noise) is None for _ in range(16))
    assert packer.pack(TEXT[:65536]) is None  # it rests
    tried = sum(packer.pack(TEXT[:65536]) is not None for _ in range(100))
    assert tried == 100 - 63


@pytest.mark.parametrize("length", [CHUNK_SIZE - 512, CHUNK_SIZE + 512])
def test_a_frame_that_lies_of_its_length_is_refused(length: int) -> None:
    packed = zstd.compress(TEXT)
    with pytest.raises(RemoteProtocolError):
        unpack(packed, length)


def test_hostile_frames_are_refused_cheaply() -> None:
    bomb = zstd.compress(bytes(64 << 20))
    assert len(bomb) < 10_000
    wide = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    frame = wide.compress(TEXT[:1000]) + wide.flush()
    whole = zstd.compress(TEXT[:4096])
    for packed, length in (
        (bomb, CHUNK_SIZE),
        (frame, 1000),  # needs a window of 128 MiB
        (whole[:-1], 4096),
        (whole + b"x", 4096),
        (whole + whole, 4096),
        (b"", 4096),
        (b"not a frame", 4096),
    ):
        with pytest.raises(RemoteProtocolError):
            unpack(packed, length)


def test_levels() -> None:
    assert parse_compression("zstd") == 1
    assert parse_compression("zstd:19") == 19
    for text in ("zstd:", "zstd:0", "zstd:20", "zstd:-1", "zlib", "", "zstd:1:1", "zstd:\u0662"):
        with pytest.raises(ConfigError):
            parse_compression(text)


def drive(link: Callable[[float], float], pack_rate: float, ratio: float, seconds: float) -> tuple[float, int, float]:
    """Send over a simulated link for a while; return bytes a second, how often the way changed, and the best rate.

    Reading takes 1/1000 s a MiB, packing 1/``pack_rate``; the link takes over while the sender works (a full buffer).
    """
    rule = PackingRule()
    now, sent, n_changes, was_on = 0.0, 0, 0, True
    while now < seconds:
        speed = link(now)
        is_on = rule.is_on
        busy = 0.001 + (1 / pack_rate if is_on else 0)
        on_wire = (ratio if is_on else 1.0) / speed
        took = max(busy, on_wire)
        rule.note_time(took, took - busy, CHUNK_SIZE)
        now += took
        sent += 1
        n_changes += rule.is_on != was_on
        was_on = rule.is_on
    speed = link(0)
    best = max(1 / max(0.001, 1 / speed), 1 / max(0.001 + 1 / pack_rate, ratio / speed))
    return sent / now, n_changes, best


@pytest.mark.parametrize("link", [5, 50, 100, 400, 900, 5000])
@pytest.mark.parametrize("pack_rate", [20, 150, 500])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_the_rule_finds_what_is_faster(link: float, pack_rate: float, ratio: float) -> None:
    """Within a tenth of the better way, whatever limits, and with few changes."""
    rate, n_changes, best = drive(lambda _now: link, pack_rate, ratio, 120)
    assert rate > 0.85 * best
    assert n_changes < 14


def test_the_rule_follows_the_link() -> None:
    """A link that gets fast, and slow again."""
    rule = PackingRule()

    def note(n: int, waited_s: float, packed: int, plain: int) -> bool:
        for _ in range(n):
            rule.note_time(0.1, waited_s, packed if rule.is_on else plain)
        return rule.is_on

    assert note(100, 0.08, CHUNK_SIZE, CHUNK_SIZE)
    assert not note(300, 0.0, CHUNK_SIZE, 10 * CHUNK_SIZE)  # packing is all that takes time
    assert note(3000, 0.08, 3 * CHUNK_SIZE, CHUNK_SIZE)
