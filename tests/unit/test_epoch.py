"""EpochFile: what was made durable is read again, whatever happens to the slot that was being written."""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_hexdigest

from fusemig.epoch import EpochFile, EpochRecord, Ownership, Side, redeemed, resolved
from fusemig.errors import ConfigError, StateError
from fusemig.group import Word
from support.crash import KilledError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SLOT = 4096
DEEP = b'{"counter":1,"check":"","record":' + b"[" * 4000


def record(state: Ownership, epoch: int = 1) -> EpochRecord:
    """Return a record."""
    version = 3 if state is Ownership.PLEDGED else 1
    return EpochRecord(state=state, image_id="d15c", epoch=epoch, session="5e55", peer="tcp:host:4711", version=version)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where an epoch file may be."""
    return tmp_path / "image.fusemig"


def written(path: Path, n_records: int) -> tuple[bytes, EpochRecord | None, EpochRecord]:
    """Write records; return the file, the last record but one, and the last."""
    file = EpochFile(path)
    former = None
    for number in range(n_records):
        former = file.record
        file.write(record(list(Ownership)[number % 5], number))
    assert file.record is not None
    return path.read_bytes(), former, file.record


def read(path: Path) -> EpochRecord | str | None:
    """Read the file; damage that is reported is "damaged"; no other exception may come."""
    try:
        return EpochFile(path).record
    except ConfigError as exc:
        if "is damaged, so who owns the disk is not known here" not in str(exc):
            raise
        return "damaged"


def test_an_image_without_a_file_never_moved(path: Path) -> None:
    """Opening creates nothing."""
    assert EpochFile(path).record is None
    assert not path.exists()


@pytest.mark.parametrize("state", Ownership)
def test_a_record_is_read_again(path: Path, state: Ownership) -> None:
    """Every field, by another object; the file belongs to its user alone."""
    EpochFile(path).write(record(state))
    assert EpochFile(path).record == record(state)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == 2 * SLOT


def test_the_last_record_counts(path: Path) -> None:
    """Over many writes, by one object and by another each time."""
    file = EpochFile(path)
    for number in range(7):
        file.write(record(Ownership.OWNER, number))
        assert EpochFile(path).record == record(Ownership.OWNER, number)
    for number in range(7, 14):
        EpochFile(path).write(record(Ownership.INCOMING, number))
        assert EpochFile(path).record == record(Ownership.INCOMING, number)


@pytest.mark.parametrize("n_records", [2, 3])
@pytest.mark.parametrize("change", [b"\0", b"\xff", b" ", b'"', b"9"])
def test_any_damaged_byte_leaves_the_former_or_the_newest(path: Path, n_records: int, change: bytes) -> None:
    """Each byte of the newest slot in turn becomes another one."""
    content, former, newest = written(path, n_records)
    start = SLOT if n_records % 2 else 0
    for at in {*range(start, start + 400), *range(start + 400, start + SLOT, 97), start + SLOT - 1}:
        path.write_bytes(content[:at] + change + content[at + 1 :])
        assert read(path) in (former, newest)


@pytest.mark.parametrize("n_records", [2, 3])
def test_any_flipped_bit_leaves_the_former_or_the_newest(path: Path, n_records: int) -> None:
    """Each bit of the newest record in turn; where bytes of the record changed it is the former one."""
    content, former, newest = written(path, n_records)
    start = SLOT if n_records % 2 else 0
    line = content[start : start + SLOT].rstrip()
    assert 100 < len(line) < 400
    for at in range(start, start + len(line)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            assert read(path) == former, (at, bit)
    assert former != newest


@pytest.mark.parametrize("n_records", [2, 3])
def test_a_torn_write_leaves_the_former_or_the_newest(path: Path, n_records: int) -> None:
    """The write stopped at any byte: what follows is what was in the slot before, or zeros."""
    before, former, _ = written(path, n_records - 1)
    former = EpochFile(path).record
    EpochFile(path).write(record(Ownership.RELEASED, 99))
    after = path.read_bytes()
    start = SLOT if n_records % 2 else 0
    for at in range(start, start + SLOT, 7):
        path.write_bytes(after[:at] + before[at : start + SLOT] + after[start + SLOT :])
        assert read(path) in (former, record(Ownership.RELEASED, 99))
        path.write_bytes(after[:at] + bytes(start + SLOT - at) + after[start + SLOT :])
        assert read(path) in (former, record(Ownership.RELEASED, 99))


def test_a_truncated_file_leaves_the_former_or_the_newest(path: Path) -> None:
    """Cut anywhere in the second slot, the first is still there."""
    content, former, newest = written(path, 3)
    for length in range(SLOT, 2 * SLOT, 7):
        path.write_bytes(content[:length])
        assert read(path) in (former, newest)


def test_a_torn_first_write_is_damage(path: Path) -> None:
    """With no former record there is nothing to go back to: a person decides, and is told what to look at."""
    content, _, _ = written(path, 1)
    path.write_bytes(content[: SLOT + 50] + b" " * (SLOT - 50))
    assert read(path) == "damaged"


def test_a_file_created_and_never_written_says_nothing(path: Path) -> None:
    """The crash came between creating the file and writing its first record, which nobody was told of."""
    for content in (b"", b" " * SLOT, (b" " * (SLOT - 1) + b"\n") * 2, bytes(2 * SLOT)):
        path.write_bytes(content)
        assert EpochFile(path).record is None
        EpochFile(path).write(record(Ownership.OWNER))
        assert EpochFile(path).record == record(Ownership.OWNER)


@given(
    garbage=st.binary(max_size=2 * SLOT + 10) | st.sampled_from([b"[" * 9000, DEEP, b'{"record":' * 900, b'{"a":1}'])
)
@settings(deadline=None)
def test_garbage_is_damage(tmp_path_factory: pytest.TempPathFactory, garbage: bytes) -> None:
    """Nothing but `ConfigError` comes of any content."""
    path = tmp_path_factory.mktemp("epoch") / "image.fusemig"
    path.write_bytes(garbage)
    assert read(path) in (None, "damaged")


def slot_of(raw: bytes, counter: int) -> bytes:
    """Return a whole, correct slot around a record's JSON."""
    line = {"counter": counter, "check": xxh3_64_hexdigest(raw, seed=counter), "record": msgspec.Raw(raw)}
    return msgspec.json.encode(line).ljust(SLOT)


@pytest.mark.parametrize(
    "later",
    [
        {"version": 4, "state": "owner", "image_id": "d15c", "epoch": 5},
        {"version": 4, "state": "shared", "image_id": "d15c", "epoch": 5},
        {"version": 4, "who": ["knows"]},
    ],
)
def test_a_later_version_is_refused(path: Path, later: dict[str, object]) -> None:
    """Also where its words are unknown here: the older slot beside it must not count instead."""
    content, _, _ = written(path, 2)
    path.write_bytes(content[:SLOT] + slot_of(msgspec.json.encode(later), 3))
    with pytest.raises(ConfigError, match="was written by a later version of fusemig; upgrade first"):
        EpochFile(path)


def test_a_replayed_slot_does_not_count(path: Path) -> None:
    """The check is seeded with the counter: an old record under a new counter is damage."""
    content, _, newest = written(path, 3)
    old = content[:SLOT].replace(b'"counter":2', b'"counter":9')
    path.write_bytes(old + content[SLOT:])
    assert EpochFile(path).record == newest


def test_a_directory_in_its_place_is_an_error_of_the_caller(path: Path) -> None:
    """What cannot be read is not taken for absent."""
    path.mkdir()
    with pytest.raises(ConfigError, match=r"cannot read the epoch file .*: Is a directory"):
        EpochFile(path)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """The former record counts, in memory as on disk, and the text says what to do."""
    file = EpochFile(tmp_path / "gone" / "image.fusemig")
    with pytest.raises(StateError, match=r"cannot write the epoch file .*: No such file or directory"):
        file.write(record(Ownership.OWNER))
    assert file.record is None


@contextmanager
def full_store() -> Iterator[None]:
    """Allow files of 100 bytes more than one slot: a store that runs full inside the second."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SLOT + 100, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.fixture
def file_with_one_slot(path: Path) -> EpochFile:
    """Return a file whose newest record is in the first slot and whose next one goes to the second."""
    content, _, _ = written(path, 2)
    path.write_bytes(content[:SLOT])
    return EpochFile(path)


def test_a_store_that_takes_only_a_part(path: Path, file_with_one_slot: EpochFile) -> None:
    """A short write is no success: the error is raised and the former record counts."""
    former = file_with_one_slot.record
    with full_store(), pytest.raises(StateError, match="File too large; free space there first"):
        file_with_one_slot.write(record(Ownership.HANDED_OFF))
    assert file_with_one_slot.record == former
    assert read(path) == former


def test_a_failed_write_is_overwritten_by_the_next(path: Path, file_with_one_slot: EpochFile) -> None:
    """The next record goes to the same slot, so that what may have been stored there is gone."""
    with full_store(), pytest.raises(StateError):
        file_with_one_slot.write(record(Ownership.HANDED_OFF))
    file_with_one_slot.write(record(Ownership.OWNER, 50))
    assert read(path) == record(Ownership.OWNER, 50)
    assert b"handed-off" not in path.read_bytes()[SLOT:]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """A record is read from its own file, and lands in its own file or nowhere."""
    target = tmp_path / "elsewhere"
    target.write_bytes(b"")
    link = tmp_path / "image.fusemig"
    file = EpochFile(link)
    link.symlink_to(target)
    with pytest.raises(StateError, match="Too many levels of symbolic links"):
        file.write(record(Ownership.OWNER))
    with pytest.raises(ConfigError, match="Too many levels of symbolic links"):
        EpochFile(link)
    assert target.read_bytes() == b""


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of what is synced from here on: names of files, and of directories with a slash."""
    names: list[str] = []

    def note(sync: Callable[[int], None]) -> Callable[[int], None]:
        def call(fd: int) -> None:
            found = Path(f"/proc/self/fd/{fd}").readlink()
            names.append(found.name + ("/" if found.is_dir() else ""))
            sync(fd)

        return call

    monkeypatch.setattr(os, "fdatasync", note(os.fdatasync))
    monkeypatch.setattr(os, "fsync", note(os.fsync))
    return names


def test_a_new_file_is_durable_with_its_name(path: Path, synced: list[str]) -> None:
    """The directory once, the file each time."""
    file = EpochFile(path)
    assert synced == []
    file.write(record(Ownership.OWNER))
    assert synced == ["image.fusemig.new", f"{path.parent.name}/"]
    file.write(record(Ownership.HANDED_OFF))
    assert synced[2:] == ["image.fusemig"]


def test_what_is_read_is_durable_before_it_counts(path: Path, synced: list[str]) -> None:
    """A daemon that was killed before its sync may have left it in the page cache only."""
    EpochFile(path).write(record(Ownership.HANDED_OFF))
    synced.clear()
    assert EpochFile(path).record == record(Ownership.HANDED_OFF)
    assert synced == ["image.fusemig", f"{path.parent.name}/"]


def test_what_cannot_be_made_durable_does_not_count(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: refused, with the reason."""
    EpochFile(path).write(record(Ownership.HANDED_OFF))

    def fail(_fd: int) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(ConfigError, match=r"cannot make the epoch file .* durable: Input/output error"):
        EpochFile(path)


def is_uncertain(file: EpochFile) -> bool:
    """Tell whether what is durable is not known (a call, so that no type checker takes it for settled)."""
    return not file.is_certain


def test_after_a_failed_write_nothing_is_certain(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the next one succeeds; that goes to the same slot, so what may have been stored is gone."""
    file = EpochFile(path)
    file.write(record(Ownership.OWNER))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", lambda _fd: (_ for _ in ()).throw(OSError(5, "on purpose")))
        with pytest.raises(StateError, match="on purpose"):
            file.write(record(Ownership.HANDED_OFF))
    assert is_uncertain(file)
    assert file.record == record(Ownership.OWNER)
    assert read(path) == record(Ownership.HANDED_OFF), "stored all the same"
    file.write(record(Ownership.OWNER))
    assert file.is_certain
    assert read(path) == record(Ownership.OWNER)


def test_what_may_be_durable_is_gone_by(path: Path) -> None:
    """`assume` writes nothing; the next write still replaces what the failed one left."""
    file = EpochFile(path)
    file.write(record(Ownership.OWNER))
    file.assume(record(Ownership.HANDED_OFF))
    assert file.record == record(Ownership.HANDED_OFF)
    assert is_uncertain(file)
    assert read(path) == record(Ownership.OWNER)
    file.write(record(Ownership.HANDED_OFF))
    assert file.is_certain
    assert read(path) == record(Ownership.HANDED_OFF)


def test_records_of_earlier_and_later_versions_of_the_format(path: Path) -> None:
    """What an earlier fusemig did not write has its default, and what a later one adds is no damage."""
    record = msgspec.json.encode({"state": "owner", "image_id": "i", "epoch": 3, "version": 1, "added_later": [1]})
    line = msgspec.json.encode(
        {"counter": 1, "check": xxh3_64_hexdigest(record, seed=1), "record": msgspec.Raw(record)}
    )
    path.write_bytes(b"\n".rjust(4096) + line.ljust(4095) + b"\n")
    assert EpochFile(path).record == EpochRecord(state=Ownership.OWNER, image_id="i", epoch=3)


def test_the_first_write_is_there_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no other slot to go by: killed before its end it was never made, and the next one is made anew."""

    def die(_fd: int) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", die)
        with pytest.raises(KilledError):
            EpochFile(path).write(record(Ownership.INCOMING))
    assert not path.exists()
    assert EpochFile(path).record is None
    EpochFile(path).write(record(Ownership.INCOMING))
    assert EpochFile(path).record == record(Ownership.INCOMING)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_is_lent_is_not_read_by_an_earlier_version(path: Path) -> None:
    """Its record is of version 2, all others of version 1: an earlier daemon would take half a disk for a whole one."""
    file = EpochFile(path)
    file.write(record(Ownership.PREPARED))
    assert file.record is not None
    assert file.record.version == 1
    file.write(msgspec.structs.replace(record(Ownership.PREPARED), is_loan=True))
    assert file.record.version == 2
    assert file.record.taken().state is Ownership.BORROWING
    assert file.record.handed_over().state is Ownership.LENDING
    assert EpochFile(path).record == file.record
    file.write(record(Ownership.OWNER))
    assert file.record.version == 1
    assert file.record.taken().state is Ownership.OWNER
    assert file.record.handed_over().state is Ownership.RELEASED


def test_a_pledge_is_not_read_by_an_earlier_version_and_leaves_nothing_behind(path: Path) -> None:
    """Of version 3, with the group; what it becomes is of version 1 again, whoever decides."""
    file = EpochFile(path)
    pledged = msgspec.structs.replace(record(Ownership.PLEDGED), decision="/var/lib/groups/g1")
    file.write(pledged)
    assert EpochFile(path).record == pledged
    assert b'"version":3' in path.read_bytes()
    for became, state, epoch in (
        (redeemed(pledged, Word.COMMIT), Ownership.HANDED_OFF, 1),
        (redeemed(pledged, Word.ABORT), Ownership.OWNER, 3),
        (resolved(pledged, Side.SOURCE), Ownership.OWNER, 3),
        (resolved(pledged, Side.DESTINATION), Ownership.RELEASED, 1),
    ):
        file.write(became)
        assert EpochFile(path).record == file.record
        assert file.record is not None
        assert (file.record.state, file.record.epoch, file.record.decision) == (state, epoch, "")
        assert file.record.version == 1
