"""`fusemig.wire.native.stripes`: pieces of one sequence on several streams, in any interleaving, and wrong ones."""

from __future__ import annotations

import random

import pytest

from fusemig.errors import RemoteProtocolError
from fusemig.wire.native.stripes import STRIPE_BYTES, STRIPE_HEAD_SIZE, StripeOrder, encode_stripe


def test_the_bytes_are_fixed() -> None:
    """A change of these is a new version of the wire."""
    assert encode_stripe(0x0102030405060708, 0x10000).hex() == "f5ed0057000100000102030405060708" + "fb0d78dc7c4b8d6b"
    assert len(encode_stripe(0, 1)) == STRIPE_HEAD_SIZE == 24


@pytest.mark.parametrize("seed", range(20))
def test_any_interleaving_gives_the_sequence(seed: int) -> None:
    """However pieces are shared out, and in whatever portions each stream delivers, the order is that of the bytes."""
    rng = random.Random(seed)
    n_streams, sequence = rng.randint(1, 16), rng.randbytes(3_000)
    wires = [bytearray() for _ in range(n_streams)]
    position = 0
    while position < len(sequence):
        length = min(rng.randint(1, 200), len(sequence) - position)
        wires[rng.randrange(n_streams)] += encode_stripe(position, length) + sequence[position : position + length]
        position += length
    came = [bytearray() for _ in range(n_streams)]
    order, result = StripeOrder(n_streams), bytearray()
    while len(result) < len(sequence):
        at = rng.randrange(n_streams)
        n = rng.randint(0, 300)
        came[at] += wires[at][:n]
        del wires[at][:n]
        for stream in order.unknown():
            if order.turn is None and len(came[stream]) >= STRIPE_HEAD_SIZE:
                order.note_head(stream, bytes(came[stream][:STRIPE_HEAD_SIZE]))
                del came[stream][:STRIPE_HEAD_SIZE]
        if order.turn is not None and (n := min(order.left, len(came[order.turn]), rng.randint(1, 100))):
            result += came[order.turn][:n]
            del came[order.turn][:n]
            order.advance(n)
    assert result == sequence
    assert order.due == len(sequence)


def head(position: int, length: int = 10) -> bytes:
    """Return a header."""
    return encode_stripe(position, length)


@pytest.mark.parametrize(
    ("heads", "text"),
    [
        ([bytes(STRIPE_HEAD_SIZE)], "out of step"),
        ([head(0)[:23] + b"\0"], "out of step"),
        ([head(0, 0)], "a piece of 0 bytes"),
        ([head(0, STRIPE_BYTES + 1)], f"a piece of {STRIPE_BYTES + 1} bytes"),
        ([head(0), head(0)], "streams 0 and 1 both have the bytes from 0"),
        ([head(5), head(7)], "no stream has the bytes from 0"),
    ],
)
def test_a_wrong_piece(heads: list[bytes], text: str) -> None:
    """It is an error of the peer's, at once, and never a wait for what cannot come."""
    order = StripeOrder(2)
    with pytest.raises(RemoteProtocolError, match=text):
        for stream, one in enumerate(heads):
            order.note_head(stream, one)


def test_a_piece_that_overlaps() -> None:
    """It is seen when the piece before it ends, or when its header comes."""
    order = StripeOrder(2)
    order.note_head(0, head(0, 10))
    order.note_head(1, head(9, 10))
    with pytest.raises(RemoteProtocolError, match="stream 1 has bytes from 9 on, which came before"):
        order.advance(10)
    order = StripeOrder(1)
    order.note_head(0, head(0, 10))
    order.advance(10)
    with pytest.raises(RemoteProtocolError, match="which came before"):
        order.note_head(0, head(9))


def test_every_flipped_bit_of_a_header_is_seen() -> None:
    """Damage never makes bytes belong somewhere else."""
    good = head(0)
    for bit in range(8 * STRIPE_HEAD_SIZE):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RemoteProtocolError):
            StripeOrder(2).note_head(0, bytes(damaged))
