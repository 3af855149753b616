"""The exchange before an upgrade, and which mounts a successor takes for its predecessor's."""

from __future__ import annotations

import socket
import threading

import pytest

from fusemig import __version__
from fusemig.errors import StateError
from fusemig.estate import difference
from fusemig.handover.agreement import VARIABLE, Answer, answer, decode_answer
from fusemig.handover.state import Mount, ServedFile, State, encode_state

MOUNT = Mount(
    mountpoint="/mnt",
    files=(ServedFile(name="vda", inode=2, path="/a.img"), ServedFile(name="vdb", inode=3, path="/b.img", base="/c")),
)
DOCUMENT = encode_state(State(mount=MOUNT))


def ask(document: bytes | None) -> tuple[bool, bytes]:
    """Ask a candidate, or go away without a word; return whether it would wait for its turn, and what it said."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {VARIABLE: str(theirs.detach())}
    verdict: list[bool] = []
    candidate = threading.Thread(target=lambda: verdict.append(answer(environment)))
    with ours:
        candidate.start()
        if document is None:
            ours.close()
            candidate.join()
            return verdict[0], b""
        ours.send(document)
        said = ours.recv(4096)
        candidate.join()
    assert not environment, "its own children would be asked too"
    return verdict[0], said


def test_a_document_that_can_be_read_is_agreed_upon() -> None:
    """With the version of who answers."""
    would_wait, said = ask(DOCUMENT)
    assert would_wait
    assert decode_answer(said) == Answer(version=__version__)


@pytest.mark.parametrize(
    "document", [DOCUMENT.replace(b'"version":1', b'"version":9'), b"{}", DOCUMENT.replace(b'"mount"', b'"amount"')]
)
def test_what_cannot_be_read_is_refused_with_the_reason(document: bytes) -> None:
    """Of another version, or of this one and not understood; who refuses ends."""
    would_wait, said = ask(document)
    assert not would_wait
    assert "the state of the running daemon" in decode_answer(said).refusal


def test_a_daemon_that_gives_up_is_not_succeeded_by_surprise() -> None:
    """A candidate that nobody asks ends."""
    assert not ask(None)[0]


def test_who_is_no_candidate_is_not_asked() -> None:
    """A daemon that is started in any other way."""
    assert answer({})


@pytest.mark.parametrize(("said", "reason"), [(b"", "ended before it answered"), (b"hello", "cannot be read")])
def test_no_answer_is_no_agreement(said: bytes, reason: str) -> None:
    """What a broken installation says."""
    with pytest.raises(StateError, match=reason):
        decode_answer(said)


def test_what_differs_is_named_as_it_was() -> None:
    """So that a person can start the successor as the kernel needs it."""
    first, second = MOUNT.files
    changed = {
        "MOUNTPOINT /mnt": Mount(mountpoint="/other", files=MOUNT.files),
        "--disk vda=/a.img": Mount(mountpoint="/mnt", files=(second, first)),
        "--disk vdb=/b.img,base=/c": Mount(
            mountpoint="/mnt", files=(first, ServedFile(name="vdb", inode=3, path="/b.img"))
        ),
        "2 disks: vda, vdb": Mount(mountpoint="/mnt", files=(first,)),
        "--cache through": Mount(mountpoint="/mnt", files=MOUNT.files, is_write_back=True),
        "without --allow-other": Mount(mountpoint="/mnt", files=MOUNT.files, is_allow_other=True),
    }
    for text, mount in changed.items():
        assert difference(MOUNT, mount) == text
