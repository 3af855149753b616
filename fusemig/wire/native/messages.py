"""What the two sides say to each other in JSON: the native wire's messages (docs/wire-native.md lists them all)."""

from __future__ import annotations

from enum import Enum
from typing import Final, Literal

import msgspec

from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE

RESUME: Final = "resume"
"""The feature of a side that can go on after a lost connection: it knows HAVE, JOURNALED and what belongs to them."""

POSTCOPY: Final = "postcopy"
"""The feature of a side that can hand a disk over, or take it, before all of it was sent."""
MAX_RUNS: Final = 2048
"""Most runs of a MISSING."""
MAX_DISK_RUNS: Final = 1 << 20
"""Most runs in all MISSING of a disk."""
MAX_HOT: Final = 8192
"""Most chunks that a LEND names, of all its disks."""
MAX_FETCH_BLOCKS: Final = CHUNK_SIZE // BLOCK_SIZE
"""Most blocks of a FETCH."""
MAX_FETCH_RUNS: Final = MAX_FETCH_BLOCKS
"""Most runs of a FETCH: each is an extent of the frame that answers it."""
DELTA: Final = "delta"
"""The feature of a destination that can say what it has of a disk that was here before: it knows KEEP to LIKE."""
THIN: Final = "thin"
"""The feature of a destination that knows BASE."""
ZSTD: Final = "zstd"
"""The feature of a destination that knows PACKED, compressed with Zstandard."""

HAVE_VALUES: Final = 8192
"""Most chunks of a HAVE that carries values of the digest, 8 bytes each."""
HAVE_HASHES: Final = 64
"""Most chunks of a HAVE that carries hashes of contents, 16 bytes each."""


WEIGHED_CHUNKS: Final = 32
"""Most chunks of a WEIGH: 4 KiB of hashes each, which must fit a message."""
KEEP_RUNS: Final = 8192
"""Most runs of chunks of a KEEP, 16 bytes each."""


class SharedBase(msgspec.Struct, frozen=True):
    """What a source's disk is an overlay over."""

    size: int
    digest: str


class DiskOffer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A disk as the source describes it."""

    name: str
    size: int
    image_id: str
    epoch: int
    is_resumed: bool = False
    """Whether this is to go on with what the destination has of it."""
    allocated_bytes: int = 0
    """About how much of it is no hole, so that the destination can tell whether it has the room; 0: not known."""
    since: str = ""
    """The migration that brought the disk here, if it is known which chunks were written since."""
    is_compared: bool = False
    """Whether contents are to be compared where the destination cannot prove that it has what ``since`` left there."""
    base: SharedBase | None = None
    """Over which the disk lies, if only what differs from it is to be sent."""


class Hello(msgspec.Struct, frozen=True):
    """The source's first message."""

    version: int
    session: str
    chunk_size: int
    disks: list[DiskOffer]
    features: list[str] = []
    attempt: int = 0
    """Names this connection among all of the session; any number that none before had."""
    streams: int = 1
    """Over how many connections, this one included, the source would like to send."""


class Resumption(Enum):
    """What the destination can say of what it has."""

    NOTHING = ""
    """It begins anew."""
    JOURNAL = "journal"
    """It has a journal of this session: HAVE carries values of the digest."""
    COMPARE = "compare"
    """It has an image and does not know what of it is right: HAVE carries hashes of its contents."""


class Delta(Enum):
    """What a destination knows of a disk that was here before, in a migration that does not resume another."""

    NOTHING = ""
    PROVED = "proved"
    """It has, unchanged, what it released to the migration that the offer names: KEEP counts."""
    COMPARE = "compare"
    """It has an image, and tells its hashes first, as `Resumption.COMPARE` does."""


class Covered(msgspec.Struct, frozen=True):
    """The last frame that the journal of a disk covers: the connection, as its HELLO named it, and the frame."""

    attempt: int = 0
    sequence: int = 0


class Welcome(msgspec.Struct, frozen=True):
    """The destination accepts; disks are known by their place in the offer from here on."""

    version: int
    features: list[str] = []
    resumption: Resumption = Resumption.NOTHING
    covered: list[Covered] = []
    """With `Resumption.JOURNAL`, one for each disk."""
    deltas: list[Delta] = []
    """Of each disk, if any is not NOTHING; then WEIGH may come, and one of disk -1 ends it."""
    thin: list[bool] = []
    """Of each disk, whether it lies over the same base here, if any does."""
    streams: int = 1
    """How many connections the destination takes; of more than one, JOIN is awaited of the others, then STREAMS."""
    token: str = ""
    """What JOIN must say, if there are more."""


class Have(msgspec.Struct, frozen=True):
    """What the destination has of the chunks from ``first`` on; chunks that no HAVE tells of, it does not have.

    They come after WELCOME, disk by disk and in ascending order; the last one names no disk.
    """

    disk: int
    """Its place in the offer; -1: that was all."""
    first: int = 0
    values: bytes = b""
    """Of `Resumption.JOURNAL`, 64-bit values; of `Resumption.COMPARE`, xxh3_128. Little-endian; 0: it has not."""


class Refuse(msgspec.Struct, frozen=True):
    """The destination does not accept."""

    reason: str
    kind: str = "refused"
    """``authentication`` where the source itself is not welcome, and not what it offers."""
    is_busy: bool = False
    """Whether the same may be accepted in a moment."""


class Progress(msgspec.Struct, frozen=True):
    """Where the source is: shown to people at the destination, and proof of life."""

    pass_number: int
    pending_bytes: int
    total_bytes: int


class Sync(msgspec.Struct, frozen=True):
    """Make every applied frame durable."""


class Synced(msgspec.Struct, frozen=True):
    """Every frame applied before the `Sync` is durable."""


class DiskProof(msgspec.Struct, frozen=True):
    """A disk's digest and the epoch that the destination will own it in."""

    digest: int
    epoch: int


class FinalProofs(msgspec.Struct, frozen=True):
    """Frozen, everything is sent: one proof per disk, in the order of the offer."""

    disks: list[DiskProof]


class PreparedProofs(msgspec.Struct, frozen=True):
    """The destination's own proofs: durable, complete and equal."""

    disks: list[DiskProof]


class Commit(msgspec.Struct, frozen=True):
    """The source will never write again unless the destination says that it aborted."""


class Taken(msgspec.Struct, frozen=True):
    """The destination owns the disks."""


class Released(msgspec.Struct, frozen=True):
    """The source knows that it does not."""


class Abort(msgspec.Struct, frozen=True, omit_defaults=True):
    """The migration is over without a hand-off."""

    reason: str
    is_damaged: bool = False
    """Whether only this connection is: what came over it was damaged, and over another one the migration may go on."""


class AskedDisk(msgspec.Struct, frozen=True):
    """A disk that the source handed off, and the epoch in which it owned it."""

    image_id: str
    epoch: int


class Ask(msgspec.Struct, frozen=True):
    """The first message of a source that does not know whether its COMMIT arrived."""

    version: int
    session: str
    disks: list[AskedDisk]


class Answer(msgspec.Struct, frozen=True):
    """The destination's durable word; sent again after a COMMIT or ABORT that follows an ASK."""

    disks: list[Literal["owned", "prepared", "incoming", "unknown"]]
    """In the order in which they were asked about; the words are explained in `fusemig.core.handoff.Evidence`."""
    is_taken: bool
    """Whether any disk of that migration is owned by the destination."""


class Kept(msgspec.Struct, frozen=True):
    """The answer to each HAVE that carries hashes: the destination keeps what is equal, and knows its values now."""

    disk: int
    first: int
    values: bytes
    """64-bit values of the digest, little-endian; 0: it is not equal."""


class Missing(msgspec.Struct, frozen=True):
    """Blocks that the destination lacks or has an older version of; all MISSING of a disk come in ascending order."""

    disk: int
    """Its place in the offer."""
    runs: list[tuple[int, int]]
    """First 4 KiB block and the one after the last of each run; at most `MAX_RUNS`."""


class Lend(msgspec.Struct, frozen=True):
    """The first message of a source whose destination fetches from it; WELCOME, WHOLE or REFUSE is the answer."""

    version: int
    session: str
    """The migration that handed the disks over."""
    disks: list[AskedDisk]
    """Known by their place here from now on."""
    hot: list[bytes] = []
    """Of each disk, if not empty, the chunks that are best fetched first, in order; 64 bits each, little-endian."""
    max_runs: int = 1
    """Most runs of a FETCH that this source answers."""


class Fetch(msgspec.Struct, frozen=True, omit_defaults=True):
    """Send the 4 KiB blocks ``first`` to ``stop - 1`` of a disk, and ``more`` runs of it.

    They are answered in the order in which they come. One run is answered in one frame, which may tell of more zeros
    than that. Of several, those that read as zeros come first, in a ZERO of them, and then the others in a DATA.
    """

    disk: int
    first: int
    stop: int
    more: list[tuple[int, int]] = []
    """First block and the one after the last of each further run, ascending; only where LEND allows it."""

    @property
    def runs(self) -> list[tuple[int, int]]:
        """All runs."""
        return [(self.first, self.stop), *self.more]


class Whole(msgspec.Struct, frozen=True):
    """The destination needs the source no more."""


class Journaled(msgspec.Struct, frozen=True):
    """Every frame up to ``sequence`` is durable, and will be known to be after a crash of the destination."""

    sequence: int


class Keep(msgspec.Struct, frozen=True):
    """Chunks of a `Delta.PROVED` disk that nobody wrote since the migration that took it away from the destination."""

    disk: int
    runs: bytes
    """Of each run its first chunk and the one after its last, 64 bits each, little-endian; ascending."""


class Weigh(msgspec.Struct, frozen=True):
    """Asks for the hashes of the blocks of some chunks of a disk whose `Delta` is not NOTHING."""

    disk: int
    """Its place in the offer; -1: nothing more is asked, passes begin."""
    chunks: bytes = b""
    """Their numbers, 64 bits each, little-endian, ascending; at most `WEIGHED_CHUNKS`."""


class Weighed(msgspec.Struct, frozen=True):
    """The answer to each WEIGH."""

    hashes: bytes
    """xxh3_128 of each block of each chunk, in order; of the disk's last chunk, of the blocks that it has."""


class Like(msgspec.Struct, frozen=True):
    """The answer to each WEIGHED: the destination keeps the blocks that are equal; the others will come."""

    masks: bytes
    """Of each chunk 32 bytes: a bit a block, lowest first."""


class Probe(msgspec.Struct, frozen=True):
    """So many bytes, to see how fast they come; nothing is done with them."""

    padding: bytes = b""


class Probed(msgspec.Struct, frozen=True):
    """A `Probe` has arrived."""


class Join(msgspec.Struct, frozen=True):
    """The first message on a further connection of a migration; JOINED or REFUSE is the answer."""

    session: str
    token: str
    """As WELCOME said it, over the connection of this migration that came first."""
    place: int
    """Which one this is; that of the handshake is 0."""


class Joined(msgspec.Struct, frozen=True):
    """The connection belongs to the migration."""


class Streams(msgspec.Struct, frozen=True):
    """From the next byte on, what the source sends is cut in pieces over this many connections (`.stripes`)."""

    n: int
