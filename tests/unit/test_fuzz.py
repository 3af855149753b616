"""Every reader of foreign bytes with the kept corpus, damage made from it, and garbage; `tools/fuzz` runs longer.

Only a reader's own error may escape it, and what it asks for at once stays small.
"""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusemig.core.units import CHUNK_SIZE
from support.fuzzing import CORPUS, TARGETS, seeds

if TYPE_CHECKING:
    from pathlib import Path

MEMORY_CAP = 4 * CHUNK_SIZE
"""Bytes above the input's own: two chunks for the buffers, and what the interpreter needs."""


def kept(name: str) -> list[Path]:
    """Return a target's corpus."""
    return sorted((CORPUS / name).iterdir())


@pytest.mark.parametrize("name", TARGETS)
def test_the_kept_corpus(name: str) -> None:
    """Each input that ever showed something, or leads somewhere, within the memory cap."""
    files = kept(name)
    assert files, f"no corpus of {name}: run tools/fuzz --seeds"
    for path in files:
        data = path.read_bytes()
        TARGETS[name](data)  # what it loads once is not its own
        tracemalloc.start()
        try:
            TARGETS[name](data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < MEMORY_CAP + 8 * len(data), f"{path}: {peak} bytes"


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_kept(name: str) -> None:
    """The corpus has the good inputs of today's formats in it."""
    assert set(seeds()[name]) <= {path.read_bytes() for path in kept(name)}


@pytest.mark.parametrize("name", TARGETS)
def test_damage_and_garbage(name: str) -> None:
    """A kept input with bytes changed, taken out and put in; or anything."""
    corpus = [path.read_bytes() for path in kept(name)]

    @settings(max_examples=150)
    @given(st.sampled_from(corpus), st.data())
    def damage(data: bytes, choice: st.DataObject) -> None:
        spoiled = bytearray(data)
        for _ in range(choice.draw(st.integers(1, 4))):
            at = choice.draw(st.integers(0, len(spoiled)))
            spoiled[at : at + choice.draw(st.integers(0, 9))] = choice.draw(st.binary(max_size=9))
        TARGETS[name](bytes(spoiled))

    @settings(max_examples=100)
    @given(st.binary(max_size=3000))
    def garbage(data: bytes) -> None:
        TARGETS[name](data)

    damage()
    garbage()
