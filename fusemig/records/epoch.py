"""EpochFile: the durable word on who may write an image.

It lies beside the image as ``IMAGE.fusemig`` (or in ``--state-dir``). Only migrations write it: an image without
one has never taken part in any and belongs to whoever opens it. Layout: two slots of 4 KiB, each one line of JSON
padded with spaces; a write goes to the older slot and is followed by fdatasync, so a torn write leaves the other slot
and no rename is needed at switchover. Only the first write, which has no other slot, is a file of its own that is
renamed. The valid slot with the higher counter counts.

What is read is made durable before it counts: a record that a killed daemon left in the page cache only would be acted
on, perhaps by the other side too, and be gone after a power loss. For the same reason the directory is synced once by
every daemon that uses the file, not only by the one that created it.

    state        meaning                                                may guests write?
    owner        this side owns the disk in `epoch`                     yes
    incoming     a destination's image, incomplete                      no: `serve --incoming` only
    prepared     a destination's image, complete, not yet given         no: `serve --incoming` only
    pledged      a source whose group decides (`fusemig.records.decision`)      no, until it has
    handed-off   a source that said COMMIT and knows no more            no, until settled (`evidence_of`, `resolved`)
    released     a source whose disk lives elsewhere now                no
    lending      released, and the destination still fetches from it    no
    borrowing    owner, and parts of the image are at the source yet    yes: `serve --incoming` only

The last two are of a post-copy migration (`fusemig.migration.lend`). A record that has to do with one is of version 2,
one that is pledged of version 3, so that a daemon which does not know them refuses the disk; all others of version 1.
"""

from __future__ import annotations

import os
from enum import Enum
from typing import TYPE_CHECKING, Final

import msgspec
from xxhash import xxh3_64_hexdigest

from fusemig.core.group import Conduct, conduct
from fusemig.core.handoff import Evidence
from fusemig.errors import ConfigError, StateError

if TYPE_CHECKING:
    from pathlib import Path

    from fusemig.core.group import Word

_SLOT_SIZE: Final = 4096
_VERSION: Final = 3
"""The latest that is understood."""


class Ownership(Enum):
    """Whose the disk is, as far as this side knows; see the module's table."""

    OWNER = "owner"
    INCOMING = "incoming"
    PREPARED = "prepared"
    PLEDGED = "pledged"
    HANDED_OFF = "handed-off"
    RELEASED = "released"
    LENDING = "lending"
    BORROWING = "borrowing"


DOUBTFUL: Final = frozenset({Ownership.PLEDGED, Ownership.HANDED_OFF})
"""A source in these may not write until something else than itself has told whose the disk is."""


class EpochRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What an epoch file says."""

    state: Ownership
    image_id: str
    """Names the disk, wherever it lives; given by the first source."""
    epoch: int
    """Counts hand-offs of this disk: 0 where it was born."""
    session: str = ""
    """The migration that wrote this record."""
    peer: str = ""
    """Where that migration went to (a URI, which is asked when it is in doubt) or came from (for people)."""
    wire: str = ""
    """The wire of that migration, as far as a source has handed off over it; only ``native`` can be asked."""
    group: int = 0
    """How many disks that migration moves together, as far as a source has handed off."""
    stamp: str = ""
    """With RELEASED, what the image was like then (`fusemig.disk.stamp`): while it is, it holds what was released."""
    tls_creds: str = ""
    """Where the credentials lie that a migration brought along, for asking its destination after a restart."""
    tls_hostname: str = ""
    """What the destination's certificate had to say, if that was not the host of the URI."""
    is_insecure: bool = False
    """Whether the migration was allowed to cross the network in plain text; so may the questions about it."""
    is_loan: bool = False
    """Whether the destination takes the disk over before it has all of it: `owner` is `borrowing` then."""
    decision: str = ""
    """With PLEDGED, the path of the group (`fusemig.records.decision`) that decides of the disk."""
    version: int = 1

    def handed_over(self) -> EpochRecord:
        """Return what a source's record becomes when the destination has taken the disk."""
        state = Ownership.LENDING if self.is_loan else Ownership.RELEASED
        return msgspec.structs.replace(self, state=state)

    def taken(self) -> EpochRecord:
        """Return what a destination's record becomes when it takes the disk."""
        state = Ownership.BORROWING if self.is_loan else Ownership.OWNER
        return msgspec.structs.replace(self, state=state)


class _Slot(msgspec.Struct, frozen=True):
    counter: int
    check: str
    record: msgspec.Raw


class _Versioned(msgspec.Struct, frozen=True):
    """All that a record of any version has to have."""

    version: int = 1


class _LaterVersionError(Exception):
    """A whole slot, written by a later version."""


class EpochFile:
    """Reads and writes one image's record; calls sleep (fdatasync)."""

    def __init__(self, path: Path) -> None:
        """Read ``path``, which need not exist.

        Raises:
            ConfigError: it cannot be read, is damaged in both slots, or was written by a later version.
        """
        self.path = path
        self.record: EpochRecord | None = None
        self.is_certain = True
        """Whether `record` is what is durable; not so after a write that failed, until one succeeds."""
        self._counter = 0
        self._is_linked = False
        """Whether the directory's entry of the file is known to be durable."""
        self._read()

    def _read(self) -> None:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                content = os.read(fd, 2 * _SLOT_SIZE)
            finally:
                os.close(fd)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise ConfigError(f"cannot read the epoch file {self.path}: {exc.strerror}") from exc
        try:
            slots = [_parse(content[at : at + _SLOT_SIZE]) for at in (0, _SLOT_SIZE)]
        except _LaterVersionError as exc:
            raise ConfigError(
                f"the epoch file {self.path} was written by a later version of fusemig; upgrade first"
            ) from exc
        valid = [slot for slot in slots if slot is not None]
        if not valid:
            if not content.strip(b" \n\0"):
                return  # created and never written
            raise ConfigError(
                f"the epoch file {self.path} is damaged, so who owns the disk is not known here; "
                "find out which side wrote last, then remove the file on that side"
            )
        self._make_durable()
        self._counter, self.record = max(valid, key=lambda slot: slot[0])

    def _make_durable(self) -> None:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
            sync_directory(self.path.parent)
        except OSError as exc:
            raise ConfigError(f"cannot make the epoch file {self.path} durable: {exc.strerror}") from exc
        self._is_linked = True

    def write(self, record: EpochRecord) -> None:
        """Make ``record`` durable; on return it is.

        Raises:
            StateError: it could not be made durable; the former record counts, and on the disk either may be.
        """
        record = msgspec.structs.replace(record, version=_version_of(record))
        counter = self._counter + 1
        raw = msgspec.json.encode(record)
        line = msgspec.json.encode(_Slot(counter, xxh3_64_hexdigest(raw, seed=counter), msgspec.Raw(raw)))
        slot = line.ljust(_SLOT_SIZE - 1) + b"\n"
        assert len(slot) == _SLOT_SIZE
        try:
            if self.path.exists():
                self._overwrite(slot, counter % 2)
            else:
                self._create(slot, counter % 2)
            if not self._is_linked:
                sync_directory(self.path.parent)
                self._is_linked = True
        except OSError as exc:
            self.is_certain = False
            raise StateError(
                f"cannot write the epoch file {self.path}: {exc.strerror}; free space there first"
            ) from exc
        self._counter = counter
        self.record = record
        self.is_certain = True

    def _overwrite(self, slot: bytes, number: int) -> None:
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            _pwrite(fd, slot, number * _SLOT_SIZE)
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def _create(self, slot: bytes, number: int) -> None:
        """Make the file whole under another name first: torn, it would have no other slot to go by."""
        new = self.path.with_name(f"{self.path.name}.new")
        new.unlink(missing_ok=True)
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _pwrite(fd, b"\n".rjust(_SLOT_SIZE) * 2, 0)
            _pwrite(fd, slot, number * _SLOT_SIZE)
            os.fdatasync(fd)
        finally:
            os.close(fd)
        new.rename(self.path)

    def assume(self, record: EpochRecord) -> None:
        """Go by ``record``, which could not be written but may be what is durable: for the safer of the two."""
        self.record = record
        self.is_certain = False


class Side(Enum):
    """One of the two sides of a hand-off, as a person names it."""

    SOURCE = "source"
    DESTINATION = "destination"


def evidence_of(record: EpochRecord | None, *, session: str, image_id: str, epoch: int) -> Evidence:
    """Return what a destination's durable record says of a disk that a source handed off.

    Args:
        record: the destination's, of this disk as far as it knows.
        session: the migration in which the source said COMMIT.
        image_id: the disk.
        epoch: the one in which the source owned the disk.
    """
    if record is None or record.image_id != image_id or record.epoch <= epoch:
        return Evidence.UNKNOWN
    if record.session == session and record.state is Ownership.PREPARED:
        return Evidence.PREPARED
    if record.session == session and record.state is Ownership.INCOMING:
        return Evidence.INCOMING
    if record.state in (Ownership.INCOMING, Ownership.PREPARED) and record.epoch == epoch + 1:
        # Offered by a source that owned it in the same epoch: this record does not tell what became of ours.
        return Evidence.UNKNOWN
    # Whoever owns the disk in a later epoch, or offers it from one, had it through our hand-off.
    return Evidence.OWNED


def is_as_released(record: EpochRecord | None, *, image_id: str, epoch: int, session: str, stamp: str) -> bool:
    """Tell whether an image is, byte for byte, what this side released in migration ``session``.

    Args:
        record: this side's, of the image.
        image_id: the disk that is offered to it.
        epoch: the one in which whoever offers it owns the disk.
        session: the migration that brought the disk there; empty if that is not known.
        stamp: what the image is like now; empty if that cannot be told.
    """
    return (
        record is not None
        and record.state is Ownership.RELEASED
        and (record.image_id, record.epoch + 1) == (image_id, epoch)
        and bool(session)
        and record.session == session
        and bool(stamp)
        and record.stamp == stamp
    )


def resolved(record: EpochRecord | None, owner: Side) -> EpochRecord:
    """Return the record that a person's word makes of ``record``: who owns the disk, the other side being fenced.

    A source that takes its disk back skips an epoch: the next one may have been used by the destination, and whatever
    that still holds must count as older.

    Raises:
        StateError: there is nothing to resolve in this state.
    """
    state = None if record is None else record.state
    change = (
        {
            (Ownership.PLEDGED, Side.SOURCE): (Ownership.OWNER, 2),
            (Ownership.PLEDGED, Side.DESTINATION): (Ownership.RELEASED, 0),
            (Ownership.HANDED_OFF, Side.SOURCE): (Ownership.OWNER, 2),
            (Ownership.HANDED_OFF, Side.DESTINATION): (Ownership.RELEASED, 0),
            (Ownership.RELEASED, Side.SOURCE): (Ownership.OWNER, 2),
            (Ownership.LENDING, Side.SOURCE): (Ownership.OWNER, 2),
            (Ownership.LENDING, Side.DESTINATION): (Ownership.RELEASED, 0),
            (Ownership.PREPARED, Side.SOURCE): (Ownership.INCOMING, 0),
            (Ownership.PREPARED, Side.DESTINATION): (Ownership.OWNER, 0),
        }.get((state, owner))
        if state is not None
        else None
    )
    if record is None or change is None:
        raise StateError(f"there is nothing to resolve: {_UNDOUBTED[state]}")
    new_state, skipped = change
    record = msgspec.structs.replace(record, decision="")
    if record.state is Ownership.LENDING:
        record = msgspec.structs.replace(record, is_loan=False)  # the word is also that nothing is fetched any more
    if owner is Side.DESTINATION:
        return record.handed_over() if new_state is Ownership.RELEASED else record.taken()
    return msgspec.structs.replace(record, state=new_state, epoch=record.epoch + skipped, is_loan=False)


def redeemed(record: EpochRecord, word: Word) -> EpochRecord:
    """Return what a pledged record becomes when its group is decided, for a daemon that was started again."""
    assert record.state is Ownership.PLEDGED
    if conduct(word, is_overdue=True) is Conduct.HAND_OFF:
        return msgspec.structs.replace(record, state=Ownership.HANDED_OFF, decision="")
    return resolved(record, Side.SOURCE)


_UNDOUBTED: Final = {
    None: "the disk never moved (it has no epoch file) and belongs to whoever serves it",
    Ownership.OWNER: "the state is 'owner': this side owns the disk; to give it away, migrate it",
    Ownership.INCOMING: "the state is 'incoming': the image is incomplete and its source goes on; receive it again",
    Ownership.PREPARED: "the state is 'prepared'",
    Ownership.PLEDGED: "the state is 'pledged'",
    Ownership.HANDED_OFF: "the state is 'handed-off'",
    Ownership.RELEASED: "the state is 'released': the destination owns the disk already",
    Ownership.LENDING: "the state is 'lending'",
    Ownership.BORROWING: "the state is 'borrowing': this side owns the disk already, and fetches it from its source",
}


def _version_of(record: EpochRecord) -> int:
    """Return the earliest version that understands a record."""
    if record.state is Ownership.PLEDGED:
        return 3
    return 2 if record.is_loan else 1


def _parse(slot: bytes) -> tuple[int, EpochRecord] | None:
    try:
        parsed = msgspec.json.decode(slot, type=_Slot)
        if xxh3_64_hexdigest(bytes(parsed.record), seed=parsed.counter) != parsed.check:
            return None
        # Before the rest, which may have words in it that are not known here.
        if msgspec.json.decode(parsed.record, type=_Versioned).version > _VERSION:
            raise _LaterVersionError
        return parsed.counter, msgspec.json.decode(parsed.record, type=EpochRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError):
        return None


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    """Write all of ``data``; a store that runs full may take a part first and say so only the next time."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def sync_directory(directory: Path) -> None:
    """Make the entries of a directory durable; raises `OSError`."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
