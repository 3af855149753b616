"""The journal of an incoming image against that image, killed and cut from power at any call to a store.

For each chunk the model knows every version that a frame ever brought. The rules, whenever the journal is read:

- an entry is a version that was written to the image, and if no later frame of the chunk was ever written, the image
  holds that version, also after a power loss;
- a chunk all of whose frames are covered by the mark has the entry of the last of them; or none, where a kill or a
  power loss tore its sector, which then counts as not there.
"""

from __future__ import annotations

import random
from collections import Counter

from fusemig.core.bitmap import ChunkBitmap
from fusemig.core.digest import DiskDigest
from fusemig.core.units import CHUNK_SIZE
from fusemig.disk.journal import CHUNKS_PER_SECTOR, JournalOwner, Mark, ReceiptJournal, journal_size
from support.crash import CrashDisk, Fate, KilledError

N_CHUNKS = 2 * CHUNKS_PER_SECTOR + 5
SIZE = N_CHUNKS * CHUNK_SIZE


class JournalWorld:
    """A journal, and a stand-in for its image with a sector for each chunk."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.fate = Fate()
        self.image = CrashDisk("d", N_CHUNKS * 512, self.fate, self.rng)
        self.store = CrashDisk("d", journal_size(SIZE), self.fate, self.rng)
        self.session = 0
        self.believed = 0
        self.covered: Counter[bool] = Counter()
        self.journal = ReceiptJournal(self.store, SIZE)
        self.begin()

    def begin(self) -> None:
        """Begin a migration anew."""
        self.session += 1
        self.sequence = 0
        self.attempt = 1
        self.digest = DiskDigest(SIZE)
        self.changed = ChunkBitmap(N_CHUNKS)
        self.frames: dict[int, list[tuple[tuple[int, int], int]]] = {}
        """For each chunk, when each of its frames was written and which value it brought."""
        self.journal.begin(self.owner)

    @property
    def owner(self) -> JournalOwner:
        return JournalOwner(image_id="i", epoch=1, session=f"s{self.session}")

    def apply(self) -> None:
        """Write frames of whole chunks."""
        for _ in range(self.rng.randint(1, 5)):
            chunk, value = self.rng.randrange(N_CHUNKS), self.rng.randint(1, 3)
            self.sequence += 1
            self.frames.setdefault(chunk, []).append(((self.attempt, self.sequence), value))
            self.image.pwrite(bytes([value]) * 512, chunk * 512)
            self.digest.apply_data([(chunk * CHUNK_SIZE, CHUNK_SIZE)], value)
            self.changed.set(chunk)

    def write(self) -> None:
        """Sync and journal, with frames coming between the steps."""
        sectors, mark = self.journal.snapshot(self.digest, self.changed), Mark(self.attempt, self.sequence)
        if self.rng.random() < 0.5:
            self.apply()
        self.image.flush()
        if self.rng.random() < 0.5:
            self.apply()
        self.journal.write(sectors, mark)

    def reopen(self) -> None:
        """Read what is there as a new process does, and go on with the next connection."""
        self.journal = ReceiptJournal(self.store, SIZE)
        if self.journal.owner != self.owner:
            assert self.journal.owner is None or int(self.journal.owner.session[1:]) < self.session
            self.begin()
            return
        self.digest = DiskDigest(SIZE)
        self.changed = ChunkBitmap(N_CHUNKS)
        self.journal.load(self.digest)
        mark = (self.journal.mark.attempt, self.journal.mark.sequence)
        for chunk, value in enumerate(self.digest.values(0, N_CHUNKS)):
            frames = self.frames.get(chunk, [])
            if value:
                assert value in [brought for _, brought in frames]
                self.believed += 1
            if value and len({brought for _, brought in frames}) == 1:
                # What a source that was restarted relies on: the chunk never changed.
                assert self.image.content[chunk * 512] == self.image.content[chunk * 512 + 511] == value
            if frames and frames[-1][0] <= mark:
                # What a source that lives relies on: it sent nothing of the chunk since.
                assert value in (0, frames[-1][1])
                assert frames[-1][1] == self.image.content[chunk * 512]
                self.covered[bool(value)] += 1
        self.attempt += 1
        self.sequence = 0
        # Such a source sends everything else again, so that nothing of this connection is of the one before.
        for chunk, frames in self.frames.items():
            if frames[-1][0] > mark:
                self.sequence += 1
                frames.append(((self.attempt, self.sequence), frames[-1][1]))
                self.image.pwrite(bytes([frames[-1][1]]) * 512, chunk * 512)
                self.digest.apply_data([(chunk * CHUNK_SIZE, CHUNK_SIZE)], frames[-1][1])
                self.changed.set(chunk)

    def step(self) -> None:
        """Do something, which may be the last thing the process does."""
        self.fate.left = self.rng.choice((None, None, 0, 1, 2, 3, 5))
        act = self.rng.choice((self.apply, self.apply, self.apply, self.write, self.write, self.reopen))
        if self.rng.random() < 0.02:
            act = self.begin
        while True:
            try:
                act()
            except KilledError:
                self.fate.left = self.rng.choice((None, 0, 1, 2))
                if self.rng.random() < 0.5:
                    self.image.lose_power()
                    self.store.lose_power()
                act = self.reopen
                continue
            break
        self.fate.left = None


def test_what_the_journal_says_is_durable(nightly: bool) -> None:
    """Whatever call a kill or a power loss falls on, and however often."""
    outcomes: Counter[str] = Counter()
    for seed in range(5000 if nightly else 150):
        world = JournalWorld(seed)
        try:
            for _ in range(40):
                world.step()
            world.reopen()
        except BaseException as exc:
            exc.add_note(f"seed {seed}")
            raise
        outcomes["believed"] += world.believed
        outcomes["sessions"] += world.session
        outcomes["covered"] += world.covered[True]
        outcomes["torn"] += world.covered[False]
    print(dict(outcomes))
    assert outcomes["believed"] > 10 * outcomes["sessions"]
    assert outcomes["covered"] > 3 * outcomes["torn"]
