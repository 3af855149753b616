"""The state document: what is written is read again, and what cannot be read in full is not read at all."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusemig import __version__
from fusemig.errors import StateError
from fusemig.handover import state as state_module
from fusemig.handover.state import (
    MAX_DOCUMENT,
    SLOT_SIZE,
    VERSION,
    FileTimes,
    Hints,
    Mount,
    Outgoing,
    Parameters,
    Request,
    ServedFile,
    State,
    decode_state,
    encode_slot,
    encode_state,
    newest,
    slot_of,
)
from fusemig.handover.state_memory import StateMemory
from fusemig.qmp.objects import ObjectAdd, ObjectType
from fusemig.qmp.schema import MigrationCapability

if TYPE_CHECKING:
    from collections.abc import Iterator

MOUNT = Mount(mountpoint="/mnt", files=(ServedFile(name="vda", inode=2, path="/a.img", base="/b.img"),))
FULL = State(
    mount=MOUNT,
    sizes={"vda": 1 << 30},
    is_stopped=True,
    parameters=Parameters(max_bandwidth=1 << 20, downtime_limit_s=0.2, tls_creds="t", tls_hostname="h", tls_authz="z"),
    capabilities=(MigrationCapability.EVENTS, MigrationCapability.BLOCK),
    objects=(ObjectAdd(qom_type=ObjectType.TLS_CREDS_X509, id="t", dir="/etc/pki"),),
    listening="tcp:127.0.0.1:4711",
    outgoing=Outgoing(
        request=Request(uri="unix:/there", disks=("vda",), tls_directory="/etc/pki", reconnect_limit_s=30.0),
        session="0" * 32,
        began_s=12.5,
        has_sent=True,
        may_switch_over=True,
        n_reconnects=3,
    ),
)


@pytest.fixture
def memory() -> Iterator[StateMemory]:
    """A memory that is closed at the end."""
    made = StateMemory.create()
    with closing(os.fdopen(made.fd, "r+b", buffering=0)):
        yield made


def test_all_of_it_comes_back() -> None:
    """Also through what a successor does: another object on the same descriptor."""
    assert decode_state(encode_state(FULL)) == FULL


def test_the_format_of_version_1() -> None:
    """A document that a daemon of today leaves must be read by those of tomorrow: this text is a contract."""
    text = (
        b'{"software":"1","mount":{"mountpoint":"/mnt","files":[{"name":"vda","inode":2,"path":"/a.img"}]},'
        b'"is-stopped":true,"outgoing":{"request":{"uri":"unix:/there","disks":["vda"]},'
        b'"session":"s","began-s":1.5},"version":1}'
    )
    assert decode_state(text) == State(
        software="1",
        mount=Mount(mountpoint="/mnt", files=(ServedFile(name="vda", inode=2, path="/a.img"),)),
        is_stopped=True,
        outgoing=Outgoing(request=Request(uri="unix:/there", disks=("vda",)), session="s", began_s=1.5),
    )


def older_reader(record: type[msgspec.Struct], unknown: str) -> type[msgspec.Struct]:
    """Return a record as a version read it that had not heard of one member yet, and refused what it did not know."""
    fields = [
        (one.name, one.type) if one.required else (one.name, one.type, msgspec.field(default=one.default))
        for one in msgspec.structs.fields(record)
        if one.name != unknown and one.default_factory is msgspec.NODEFAULT
    ]
    return msgspec.defstruct(
        f"Older{record.__name__}", fields, forbid_unknown_fields=True, rename="kebab", kw_only=True
    )


OPTIONAL = [
    (record, one.name)
    for record in (Mount, ServedFile, Request, Outgoing)
    for one in msgspec.structs.fields(record)
    if not one.required
]
PLAIN: dict[type[msgspec.Struct], msgspec.Struct] = {
    Mount: Mount(mountpoint="/mnt", files=()),
    ServedFile: ServedFile(name="vda", inode=2, path="/a.img"),
    Request: Request(uri="unix:/there", disks=("vda",)),
    Outgoing: Outgoing(request=Request(uri="unix:/there", disks=("vda",)), session="s", began_s=1.5),
}
IN_USE: dict[type, object] = {bool: True, str: "heat", int: 3, float: 2.5}


@pytest.mark.parametrize(("record", "member"), OPTIONAL)
def test_an_older_version_reads_what_uses_nothing_newer(record: type[msgspec.Struct], member: str) -> None:
    """Whichever member it has not heard of; in use it is refused."""
    plain, older = PLAIN[record], older_reader(record, member)
    msgspec.json.decode(msgspec.json.encode(plain), type=older)
    used = IN_USE.get(type(getattr(plain, member)), True)
    in_use = msgspec.structs.replace(plain, **{member: used})
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(msgspec.json.encode(in_use), type=older)


def test_a_hint_that_nobody_has_heard_of_is_ignored() -> None:
    """Beside others; a member of anything else that nobody has heard of is not."""
    document = encode_state(State(mount=MOUNT))
    hinted = document.replace(b'"version":', b'"hints":{"of-tomorrow":[{"a":1}]},"version":')
    assert decode_state(hinted) == State(mount=MOUNT, hints=Hints())
    times = Hints(times={"vda": FileTimes(atime_ns=-1, mtime_ns=2, changed_ns=3)})
    assert decode_state(encode_state(State(mount=MOUNT, hints=times))).hints == times
    with pytest.raises(StateError, match="start `fusemig serve` anew"):
        decode_state(document.replace(b'"version":', b'"of-tomorrow":[],"version":'))


def test_who_wrote_it_and_the_version_are_always_said() -> None:
    """Another version is told by them before it looks at anything else."""
    found = msgspec.json.decode(encode_state(State(mount=MOUNT)))
    assert (found["version"], found["software"]) == (VERSION, __version__)
    assert set(found) == {"version", "software", "mount"}, "what is as ever is not written"


def test_another_version_is_refused_by_name() -> None:
    """Before anything else is looked at: with members nobody here has heard of, and the software that wrote it."""
    text = b'{"version": 2, "software": "9.9", "mount": 7, "a member of tomorrow": []}'
    with pytest.raises(StateError, match=r"\(fusemig 9\.9\) is of version 2, and fusemig .* reads version 1: install"):
        decode_state(text)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        encode_state(FULL)[:-1],
        encode_state(FULL).replace(b'"inode":2', b'"inode":-2'),
        encode_state(FULL).replace(b'"is-stopped"', b'"is-halted"'),
        encode_state(FULL).replace(b'"events"', b'"telepathy"'),
        b'{"version": true}',
        b'{"version": 1e400}',
    ],
)
def test_half_understood_is_refused(text: bytes) -> None:
    """Whatever is missing, unknown or out of range."""
    with pytest.raises(StateError, match="start `fusemig serve` anew"):
        decode_state(text)


def test_too_large_is_refused_and_changes_nothing(memory: StateMemory) -> None:
    """With the next step; the former document stays."""
    memory.write(FULL)
    objects = tuple(ObjectAdd(qom_type=ObjectType.AUTHZ_SIMPLE, id=f"{n}", identity="x" * 1000) for n in range(99))
    with pytest.raises(StateError, match="delete objects"):
        memory.write(msgspec.structs.replace(FULL, objects=objects))
    assert StateMemory(memory.fd).read() == FULL


def test_a_successor_reads_what_was_written_last(memory: StateMemory) -> None:
    """Many times over, longer and shorter ones in turn; an empty memory says that there was nobody."""
    assert memory.read() is None
    for n in range(5):
        state = msgspec.structs.replace(FULL, listening="x" * (1000 * (5 - n)), is_stopped=bool(n % 2))
        memory.write(state)
        memory = StateMemory(memory.fd)
        assert memory.read() == state


@given(st.integers(0, 2 * SLOT_SIZE), st.booleans())
def test_killed_in_the_middle_of_a_write(n_written: int, is_reversed: bool) -> None:
    """However much of the new slot is there, and in whichever order: the new document, or the former one."""
    old, new = encode_state(FULL), encode_state(msgspec.structs.replace(FULL, is_stopped=False))
    content = bytearray(2 * SLOT_SIZE)
    for generation, document in ((6, b"older"), (7, old)):
        slot = encode_slot(document, generation)
        content[slot_of(generation) : slot_of(generation) + len(slot)] = slot
    slot = encode_slot(new, 8)
    part = slice(max(0, len(slot) - n_written), len(slot)) if is_reversed else slice(0, n_written)
    at = slot_of(8)
    content[at + part.start : at + min(part.stop, len(slot))] = slot[part]
    # The former slot may have had the same bytes at the same places.
    is_whole = content[at : at + len(slot)] == slot
    assert is_whole or n_written < len(slot)
    found = newest([bytes(content[:SLOT_SIZE]), bytes(content[SLOT_SIZE:])])
    assert found == ((8, new) if is_whole else (7, old))


def test_damage_in_both_slots_is_told(memory: StateMemory) -> None:
    """A successor does not take itself for the first daemon."""
    memory.write(FULL)
    memory.write(msgspec.structs.replace(FULL, is_stopped=False))
    for at in (0, SLOT_SIZE):
        os.pwrite(memory.fd, b"\xff", at + 100)
    with pytest.raises(StateError, match="damaged"):
        StateMemory(memory.fd)


def test_the_same_state_is_not_written_again(memory: StateMemory) -> None:
    """So that it may be kept at every pass of a migration."""
    memory.write(FULL)
    before = os.pread(memory.fd, 2 * SLOT_SIZE, 0)
    memory.write(FULL)
    assert os.pread(memory.fd, 2 * SLOT_SIZE, 0) == before


def test_a_reader_of_a_later_version_reads_today_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it can read is a set of its own, beside the version that it writes."""
    document = encode_state(FULL)
    monkeypatch.setattr(state_module, "READABLE", frozenset({VERSION + 1}))
    with pytest.raises(StateError, match="reads version 2"):
        decode_state(document)
    assert len(document) < MAX_DOCUMENT
