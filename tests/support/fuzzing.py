"""Whatever reads bytes that others wrote, as functions of those bytes: for tests/unit/test_fuzz.py and `tools/fuzz`.

A target swallows the errors that its reader may raise, and nothing else; it returns what it was sure to hold at once.
"""

from __future__ import annotations

import ssl
import struct
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest

from fusemig.core.compression import Packer, unpack
from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.allocation import AllocationMap, BaseIdentity, map_size, write_header
from fusemig.disk.memory import MemoryDisk
from fusemig.errors import AuthenticationError, ConfigError, RemoteProtocolError, StateError
from fusemig.handover.state import (
    SLOT_SIZE,
    Mount,
    Outgoing,
    Request,
    ServedFile,
    State,
    decode_state,
    encode_slot,
    encode_state,
    newest,
)
from fusemig.net.credentials import Endpoint, load_credentials
from fusemig.qmp.codec import RequestParser, decode_server_line, encode_request
from fusemig.qmp.objects import ObjectAdd, ObjectType
from fusemig.records.epoch import EpochFile, EpochRecord, Ownership
from fusemig.wire import native, qemu_block, savevm
from fusemig.wire.native.stripes import STRIPE_BYTES, STRIPE_HEAD_SIZE, StripeOrder, encode_stripe

if TYPE_CHECKING:
    from collections.abc import Callable

CORPUS: Final = Path(__file__).parent.parent / "vectors/fuzz"
_DEVICES: Final = [qemu_block.Device("d0", 3 * CHUNK_SIZE), qemu_block.Device("d1", 512)]
_MAPPED_SIZE: Final = 1 << 20
_STRIPE: Final = struct.Struct(">HI")
_HEADER: Final = struct.Struct(">HBBHHQQQII")


def _native(data: bytes, allowed: frozenset[native.FrameType]) -> None:
    decoder = native.Decoder(allowed, preface=allowed is native.FROM_SOURCE)
    with suppress(RemoteProtocolError):
        for event in decoder.feed(data):
            if isinstance(event, native.DataFrame):
                event.verify()
            elif isinstance(event, native.PackedFrame):
                event.verify(unpack(event.payload, event.length))


def native_from_source(data: bytes) -> None:
    """The native wire as a destination hears it."""
    _native(data, native.FROM_SOURCE)


def native_from_destination(data: bytes) -> None:
    """The native wire as a source hears it."""
    _native(data, native.FROM_DESTINATION)


def native_behind_the_checks(data: bytes) -> None:
    """The same with every frame's hash right, so that what lies behind it is reached."""
    _native(native.PREFACE + with_checks(data), native.FROM_SOURCE)


def with_checks(data: bytes) -> bytes:
    """Return ``data``, taken as frames without their hashes, with those; half of them with right numbers too."""
    out, at, sequence = b"", 0, 0
    while at + _HEADER.size <= len(data):
        _, kind, flags, disk, n_extents, number, offset, length, n_payload, _ = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        table = data[at : at + 16 * min(max(n_extents - 1, 0), 300)]
        at += len(table)
        payload = data[at : at + n_payload % (1 << 16)]
        at += len(payload)
        if flags & 1:
            kind = kind % len(native.FrameType) + 1
            if kind in (native.FrameType.DATA, native.FrameType.ZERO):
                sequence += 1
                number = sequence
            n_payload = len(payload)
        head = _HEADER.pack(
            native.MAGIC, kind, flags & ~1 & 0xFF, disk, n_extents, number, offset, length, n_payload, 0
        )
        check = xxh3_64_intdigest(head + table, seed=xxh3_64_intdigest(payload))
        out += head + struct.pack(">Q", check) + table + payload
    return out


def packed_frame(data: bytes) -> None:
    """The compressed bytes of a frame that says that they are 4 KiB."""
    with suppress(RemoteProtocolError):
        assert len(unpack(data, 4096)) == 4096


def stripes(data: bytes) -> None:
    """Headers of pieces on several streams, each of 24 bytes as they come or made from a stream, a place, a length."""
    order = StripeOrder(data[0] % native.MAX_STREAMS + 1 if data else 1)
    with suppress(RemoteProtocolError):
        for at in range(1, len(data) - STRIPE_HEAD_SIZE, STRIPE_HEAD_SIZE + 1):
            stream, head = data[at] >> 1, data[at + 1 : at + 1 + STRIPE_HEAD_SIZE]
            if data[at] & 1:
                head = encode_stripe(*_STRIPE.unpack_from(head))
            unknown = order.unknown()
            order.note_head(unknown[stream % len(unknown)], head)
            while order.turn is not None:
                assert 0 < order.left <= STRIPE_BYTES
                order.advance(min(order.left, 1 + data[at]))


def savevm_container(data: bytes) -> None:
    """QEMU's migration stream, with block sections in it."""
    decoder = savevm.Decoder({qemu_block.SECTION: qemu_block.Decoder(_DEVICES)})
    with suppress(RemoteProtocolError):
        decoder.feed(data)
        decoder.close()


def block_section(data: bytes) -> None:
    """The contents of QEMU's block sections, and whether they are complete."""
    decoder, completeness = qemu_block.Decoder(_DEVICES), qemu_block.BlockCompleteness(_DEVICES)
    with suppress(RemoteProtocolError):
        decoder.begin(qemu_block.VERSION)
        for event in decoder.feed(data):
            completeness.observe(event)
        decoder.close()
    completeness.problem()


def qmp_requests(data: bytes) -> None:
    """What a QMP client sends."""
    parser = RequestParser()
    parser.receive(data)
    with suppress(RemoteProtocolError):
        while parser.next_request() is not None:
            pass


def qmp_answers(data: bytes) -> None:
    """What a daemon answers, as the command line reads it."""
    with suppress(RemoteProtocolError):
        decode_server_line(data)


def epoch_file(data: bytes) -> None:
    """The durable word on who may write: what is not whole is refused or the older slot, never believed."""
    with tempfile.TemporaryDirectory(prefix="fusemig-fuzz-", dir=_fast()) as directory:
        path = Path(directory) / "epoch"
        path.write_bytes(data)
        with suppress(ConfigError):
            record = EpochFile(path).record
            assert record is None or isinstance(record.state, Ownership)


def overlay_map(data: bytes) -> None:
    """The map of an overlay: a byte flipped, or anything else."""
    store = MemoryDisk("map", map_size(_MAPPED_SIZE))
    if data[:1] == b"\0":  # the rest damages a good one
        write_header(store, _MAPPED_SIZE, BaseIdentity(size=_MAPPED_SIZE, digest="0"))
        for at in range(1, len(data) - 4, 5):
            (where,) = struct.unpack_from(">I", data, at)
            store.content[where % store.size] ^= data[at + 4]
    else:
        store.content[: len(data)] = data[: store.size]
    with suppress(ConfigError):
        found = AllocationMap(store, _MAPPED_SIZE, "boot")
        assert found.n_allocated <= found.n_blocks
        found.close()


def state_memory(data: bytes) -> None:
    """What the daemon before left: two slots, or (behind a zero byte) a document by itself."""
    with suppress(StateError):
        if data[:1] == b"\0":
            decode_state(data[1:])
        else:
            newest([data[:SLOT_SIZE], data[SLOT_SIZE : 2 * SLOT_SIZE]])


def credentials(data: bytes) -> None:
    """The files of a credentials directory, one after the other; what is loaded proves something, or is refused."""
    with tempfile.TemporaryDirectory(prefix="fusemig-fuzz-", dir=_fast()) as name:
        directory = Path(name)
        for file, content in zip(CREDENTIALS, data.split(BETWEEN_FILES), strict=False):
            if content:
                (directory / file).write_bytes(content)
        with suppress(AuthenticationError):
            found = load_credentials(directory, Endpoint.CLIENT)
            assert found.context.verify_mode is ssl.CERT_REQUIRED
            assert found.context.minimum_version is ssl.TLSVersion.TLSv1_3
            assert found.context.cert_store_stats()["x509_ca"]


CREDENTIALS: Final = ("ca-cert.pem", "client-cert.pem", "client-key.pem", "ca-crl.pem")
BETWEEN_FILES: Final = b"\n====\n"


def _fast() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "native-from-source": native_from_source,
    "native-from-destination": native_from_destination,
    "native-behind-the-checks": native_behind_the_checks,
    "packed-frame": packed_frame,
    "stripes": stripes,
    "savevm": savevm_container,
    "block": block_section,
    "qmp-requests": qmp_requests,
    "qmp-answers": qmp_answers,
    "epoch-file": epoch_file,
    "overlay-map": overlay_map,
    "state-memory": state_memory,
    "credentials": credentials,
}


def _pem(kind: str) -> bytes:
    """Return a file that looks like one of its kind and holds nothing; whole ones are in the corpus."""
    return f"-----BEGIN {kind}-----\nMAA=\n-----END {kind}-----\n".encode()


def seeds() -> dict[str, list[bytes]]:
    """Return good inputs of each target, from which damage is made: what `tools/fuzz --seeds` writes."""
    hello = native.Hello(1, "0" * 32, CHUNK_SIZE, [native.DiskOffer("vda", CHUNK_SIZE, "1" * 32, 0)])
    payload = bytes(range(256)) * 2
    messages: list[native.Message] = [
        hello,
        native.Progress(1, 2, 3),
        native.Sync(),
        native.FinalProofs([native.DiskProof(1, 2)]),
    ]
    messages += [native.Commit(), native.Released(), native.Abort("why")]
    messages += [native.Keep(0, b"\0" * 8 + b"\1" + b"\0" * 7), native.Weigh(0, b"\0" * 8), native.Like(b"\1" * 32)]
    messages += [native.Join("0" * 32, "1" * 32, 1), native.Streams(2)]
    packed = Packer(1).pack(bytes(4096)) or b""
    data = native.encode_data(0, 1, [(0, 512)], xxh3_64_intdigest(payload), 512) + payload
    zero = native.encode_zero(0, 2, [(512, 512), (4096, 512)])
    zero += native.encode_base(0, 3, [(0, 4096)])
    zero += native.encode_packed(0, 4, [(0, 4096)], xxh3_64_intdigest(bytes(4096)), len(packed)) + packed
    answers: list[native.Message] = [
        native.Welcome(1),
        native.Synced(),
        native.PreparedProofs([native.DiskProof(1, 2)]),
        native.Taken(),
        native.Weighed(b"\1" * 4096),
        native.Welcome(1, [], native.Resumption.NOTHING, [], [], [], 4, "1" * 32),
        native.Joined(),
    ]
    block = qemu_block.Encoder(_DEVICES)
    records = b"".join(map(bytes, block.data(0, 0, bytes(CHUNK_SIZE))))[:300]
    records_zero = block.zero(0, 1) + block.progress(CHUNK_SIZE) + block.end()
    section = savevm.encode_start(7, qemu_block.SECTION, qemu_block.VERSION) + records_zero + savevm.encode_footer(7)
    stream = savevm.encode_header("pc-i440fx-7.2") + section + savevm.encode_eof()
    with tempfile.TemporaryDirectory() as directory:
        file = EpochFile(Path(directory) / "epoch")
        for epoch in range(2):
            file.write(EpochRecord(state=Ownership.OWNER, image_id="1" * 32, epoch=epoch))
        epoch_bytes = file.path.read_bytes()
    state = encode_state(
        State(
            software="1",
            mount=Mount(mountpoint="/mnt", files=(ServedFile(name="vda", inode=2, path="/a.img"),)),
            sizes={"vda": 1 << 30},
            objects=(ObjectAdd(qom_type=ObjectType.AUTHZ_SIMPLE, id="z", identity="CN=a"),),
            outgoing=Outgoing(request=Request(uri="unix:/there", disks=("vda",)), session="0" * 32, began_s=1.5),
        )
    )
    bare = struct.pack(">HBBHHQQQII", native.MAGIC, 3, 1, 0, 2, 1, 0, 512, 1024, 0)
    return {
        "native-from-source": [
            native.PREFACE + b"".join(map(native.encode_message, messages)),
            native.PREFACE + native.encode_message(hello) + data + zero,
        ],
        "native-from-destination": [b"".join(map(native.encode_message, answers)) + native.encode_ack(1)],
        "native-behind-the-checks": [bare + struct.pack(">QQ", 4096, 512) + payload * 2],
        "packed-frame": [packed],
        "stripes": [
            b"\1"
            b"\0"
            + encode_stripe(0, 7)
            + b"\0"
            + encode_stripe(7, 9)
            + b"\3"
            + _STRIPE.pack(26, 1).ljust(STRIPE_HEAD_SIZE, b"\0")
            + b"\1"
            + _STRIPE.pack(16, 10).ljust(STRIPE_HEAD_SIZE, b"\0")
        ],
        "savevm": [stream],
        "block": [records_zero, records],
        "qmp-requests": [
            encode_request("qmp_capabilities", None) + b'{"execute": "stop", "id": [1, {"a": "\\u00e9"}]}'
        ],
        "qmp-answers": [
            b'{"return": {"a": [1, 2.5, null]}, "id": 7}',
            b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}',
        ],
        "epoch-file": [epoch_bytes],
        "state-memory": [b"\0" + state, encode_slot(state, 1)],
        "credentials": [
            BETWEEN_FILES.join([_pem("CERTIFICATE"), _pem("CERTIFICATE"), _pem("PRIVATE KEY"), _pem("X509 CRL")]),
            b"",
        ],
        "overlay-map": [b"\0" + struct.pack(">IB", 5, 1) + struct.pack(">IB", 9000, 255)],
    }
