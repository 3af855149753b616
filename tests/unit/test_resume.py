"""Reconciliation: what the destination says that it has is checked before it is believed."""

from __future__ import annotations

import pytest

from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.memory import MemoryDisk
from fusemig.disk.tracked import TrackedDisk
from fusemig.errors import RemoteProtocolError
from fusemig.migration.reader import OutgoingDisk
from fusemig.migration.resume import ContentReconciliation, LivingReconciliation, content_pages, group_resumption
from fusemig.wire.native import HAVE_HASHES, HAVE_VALUES, Have, Resumption

SIZE = 70 * CHUNK_SIZE + 512


def outgoing() -> OutgoingDisk:
    """Return a disk with data in its first and in its last chunk, all of it dirty."""
    image = MemoryDisk("a", SIZE)
    image.content[0] = image.content[-1] = 1
    disk = TrackedDisk(image)
    sending = OutgoingDisk(0, disk, disk.start_tracking())
    sending.find_allocated()
    return sending


@pytest.mark.parametrize(
    "have",
    [
        Have(0, 0, b""),
        Have(0, 0, b"1234567"),
        Have(0, 71, bytes(8)),
        Have(0, 70, bytes(16)),
        Have(0, -1, bytes(8)),
        Have(0, 0, bytes(8 * (HAVE_VALUES + 1))),
    ],
)
def test_what_does_not_fit_the_disk_is_an_error(have: Have) -> None:
    """Nothing is read or marked outside the disk, whatever a destination says."""
    walk = LivingReconciliation(outgoing(), set())
    with pytest.raises(RemoteProtocolError):
        walk.on_have(have, Resumption.JOURNAL)


def test_chunks_are_told_of_once_and_in_order() -> None:
    """A second word on a chunk is an error; a gap is a lack."""
    walk = LivingReconciliation(outgoing(), set())
    walk.on_have(Have(0, 3, bytes(16)), Resumption.JOURNAL)
    with pytest.raises(RemoteProtocolError):
        walk.on_have(Have(0, 4, bytes(8)), Resumption.JOURNAL)


def test_a_page_of_hashes_is_bounded() -> None:
    """It makes the source read, so it is short."""
    walk = ContentReconciliation(outgoing())
    with pytest.raises(RemoteProtocolError):
        walk.on_have(Have(0, 0, bytes(16 * (HAVE_HASHES + 1))), Resumption.COMPARE)


def test_a_destination_that_has_nothing_gets_everything() -> None:
    """Zeros as extents, each chunk with data as a whole."""
    disk = outgoing()
    LivingReconciliation(disk, set()).end()
    assert disk.holes == [(CHUNK_SIZE, 69 * CHUNK_SIZE)]
    assert disk.tracking.take_next(0) == (0, (1 << 256) - 1)
    assert disk.tracking.take_next(0) == (70, 1)


def test_equal_contents_are_kept() -> None:
    """Only chunks that hold data are read, at both sides, and each equal one is kept with its value."""
    disk = outgoing()
    walk = ContentReconciliation(disk)
    pages = list(content_pages(0, disk.disk.image))
    assert [(page.first, len(page.values) // 16) for page in pages] == [(0, 1), (70, 1)]
    walk.on_have(pages[0], Resumption.COMPARE)
    assert list(walk.kept) == [disk.digest.value_of(0)]
    assert walk.kept[0]
    walk.on_have(Have(0, 70, bytes(15) + b"1"), Resumption.COMPARE)
    assert list(walk.kept) == [0]
    walk.end()
    assert disk.tracking.take_next(0) == (70, 1)


def test_a_group_is_as_good_as_its_worst() -> None:
    """One disk without a journal has all of them compared."""
    kinds = [Resumption.JOURNAL, Resumption.COMPARE]
    assert group_resumption(kinds) is Resumption.COMPARE
    assert group_resumption([*kinds, Resumption.NOTHING]) is Resumption.NOTHING
    assert group_resumption(kinds[:1]) is Resumption.JOURNAL
