"""DiskDigest: equal exactly when both sides were built from the same frames; what never came is known."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from fusemig.core.digest import DiskDigest
from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE, chunk_length, n_blocks, n_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZE = 3 * CHUNK_SIZE + 1536

Frame = tuple[str, "Sequence[tuple[int, int]]", int]
"""``data`` or ``zero``, extents, payload hash."""

chunk_numbers = st.integers(0, n_chunks(SIZE) - 1)


def whole(chunk: int) -> tuple[int, int]:
    """Return the extent of a chunk."""
    return chunk * CHUNK_SIZE, chunk_length(chunk, SIZE)


@st.composite
def parts(draw: st.DrawFn) -> tuple[int, int]:
    """Draw a run of sectors anywhere, also over the ends of chunks and up to the disk's end."""
    first = draw(st.integers(0, SIZE // 512 - 1))
    return first * 512, 512 * draw(st.integers(1, SIZE // 512 - first) | st.just(min(8, SIZE // 512 - first)))


frames = st.one_of(
    st.tuples(st.just("data"), chunk_numbers.map(lambda chunk: [whole(chunk)]), st.integers(0, (1 << 64) - 1)),
    st.tuples(st.just("data"), parts().map(lambda part: [part]), st.integers(0, (1 << 64) - 1)),
    st.tuples(st.just("zero"), parts().map(lambda part: [part]), st.just(0)),
    st.tuples(st.just("zero"), chunk_numbers.map(lambda chunk: [whole(chunk)]), st.just(0)),
)


def apply(digest: DiskDigest, frame: Frame) -> None:
    """Note a frame."""
    kind, extents, payload_hash = frame
    if kind == "data":
        digest.apply_data(extents, payload_hash)
    else:
        digest.apply_zero(extents)


def test_nothing_is_known_at_first() -> None:
    """A new digest misses the whole disk."""
    digest = DiskDigest(SIZE)
    assert list(digest.missing()) == [(0, SIZE)]
    assert digest.value == 0


@given(st.lists(frames, max_size=30))
def test_the_same_frames_give_the_same_digest(given_frames: list[Frame]) -> None:
    """Both sides compute the same from the same frames."""
    ours, theirs = DiskDigest(SIZE), DiskDigest(SIZE)
    for frame in given_frames:
        apply(ours, frame)
        apply(theirs, frame)
    assert ours.value == theirs.value
    assert list(ours.missing()) == list(theirs.missing())


@given(st.lists(frames, min_size=1, max_size=10), st.data())
def test_a_lost_data_frame_shows(given_frames: list[Frame], data: st.DataObject) -> None:
    """A frame that one side never saw changes the digest, unless a whole chunk came later or the frame repeats one."""
    lost = data.draw(st.integers(0, len(given_frames) - 1))
    given_frames[lost] = ("data", [whole(1)], 4711)
    after = [frame for frame in given_frames[lost + 1 :] if covers(frame, 1)]
    ours, theirs = DiskDigest(SIZE), DiskDigest(SIZE)
    for number, frame in enumerate(given_frames):
        apply(ours, frame)
        if number != lost:
            apply(theirs, frame)
    before = [frame for frame in given_frames[:lost] if touches(frame, 1)]
    if not after and (not before or before[-1] != given_frames[lost]):
        assert ours.value != theirs.value
    if after:
        assert ours.value == theirs.value


def touches(frame: Frame, chunk: int) -> bool:
    """Tell whether a frame has bytes of a chunk."""
    start, length = whole(chunk)
    return any(offset < start + length and offset + n > start for offset, n in frame[1])


def covers(frame: Frame, chunk: int) -> bool:
    """Tell whether a frame gives a chunk a fresh value."""
    start, length = whole(chunk)
    if frame[0] == "data":
        return frame[1] == [whole(chunk)]
    return any(offset <= start and offset + n >= start + length for offset, n in frame[1])


@given(st.lists(frames, max_size=20), st.lists(frames, max_size=20))
def test_whole_chunks_forget_the_past(one: list[Frame], other: list[Frame]) -> None:
    """Two sides with different pasts agree once every chunk came as a whole: a reconnect needs no history."""
    rng = random.Random(1)
    hashes = [rng.getrandbits(64) for _ in range(n_chunks(SIZE))]
    digests = [DiskDigest(SIZE), DiskDigest(SIZE)]
    for digest, past in zip(digests, (one, other), strict=True):
        for frame in past:
            apply(digest, frame)
        for chunk, payload_hash in enumerate(hashes):
            digest.apply_data([whole(chunk)], payload_hash)
    assert digests[0].value == digests[1].value
    assert not list(digests[0].missing())


@given(st.lists(frames, max_size=20))
def test_all_zeros_is_zero(past: list[Frame]) -> None:
    """A disk of zeros has the digest 0, whatever was there before."""
    digest = DiskDigest(SIZE)
    for frame in past:
        apply(digest, frame)
    digest.apply_zero([(0, SIZE)])
    assert digest.value == 0
    assert not list(digest.missing())


@given(st.sets(chunk_numbers))
def test_missing_is_what_never_came(came: set[int]) -> None:
    """Missing blocks, the disk's end cutting the last; a part of a block does not make it known."""
    digest = DiskDigest(SIZE)
    for chunk in came:
        digest.apply_data([whole(chunk)], 1)
    digest.apply_data([(0, 512)], 5)
    digest.apply_zero([(CHUNK_SIZE + 512, 3 * BLOCK_SIZE)])
    inner = {CHUNK_SIZE // BLOCK_SIZE + 1, CHUNK_SIZE // BLOCK_SIZE + 2}
    known = {block for block in range(n_blocks(SIZE)) if block in inner or block * BLOCK_SIZE // CHUNK_SIZE in came}
    missing: set[int] = set()
    for offset, length in digest.missing():
        assert offset % BLOCK_SIZE == 0
        assert offset + length == SIZE or length % BLOCK_SIZE == 0
        missing.update(range(offset // BLOCK_SIZE, n_blocks(offset + length)))
    assert missing == set(range(n_blocks(SIZE))) - known


@pytest.mark.parametrize(
    "swapped",
    [
        ([(0, BLOCK_SIZE)], [(0, 2 * BLOCK_SIZE)]),
        ([(0, BLOCK_SIZE)], [(BLOCK_SIZE, BLOCK_SIZE)]),
    ],
)
def test_parts_know_their_order(swapped: tuple[list[tuple[int, int]], list[tuple[int, int]]]) -> None:
    """Parts applied in another order are another history, and are not taken for equal."""
    first, second = swapped
    ours, theirs = DiskDigest(SIZE), DiskDigest(SIZE)
    ours.apply_data(first, 1)
    ours.apply_data(second, 2)
    theirs.apply_data(second, 2)
    theirs.apply_data(first, 1)
    assert ours.value != theirs.value


def test_the_same_content_elsewhere_is_another_disk() -> None:
    """The chunk's place is in its value: exchanged chunks do not cancel out."""
    ours, theirs = DiskDigest(SIZE), DiskDigest(SIZE)
    for digest, order in ((ours, (0, 1)), (theirs, (1, 0))):
        for chunk, content in zip(order, (b"a", b"b"), strict=True):
            digest.apply_data([whole(chunk)], xxh3_64_intdigest(content * CHUNK_SIZE))
    assert ours.value != theirs.value
