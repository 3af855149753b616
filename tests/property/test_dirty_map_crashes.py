"""The persistent dirty maps against the images that they tell of, killed and cut from power at any call to a store.

The one rule: a map that is believed tells the truth: where its bit is clear a chunk is what it was at the base.
"""

from __future__ import annotations

import random
from collections import Counter

from fusemig.core.units import CHUNK_SIZE, SECTOR_SIZE
from fusemig.disk.dirty_file import DirtyFile
from fusemig.disk.dirty_map import MapBase, Since, dirty_file_size
from fusemig.disk.tracked import TrackedDisk
from support.crash import CrashDisk, Fate, KilledError

N_CHUNKS = 11
SIZE = N_CHUNKS * CHUNK_SIZE
SECTOR = CHUNK_SIZE // 2
"""Where in its chunk the tests write: the one sector that is looked at."""


class DirtyWorld:
    """A disk with its maps over stores that crash, and what its chunks were at the base of each map."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.fate = Fate()
        self.image = CrashDisk("d", SIZE, self.fate, self.rng)
        self.store = CrashDisk("d", dirty_file_size(SIZE), self.fate, self.rng)
        self.boot = 0
        self.stamp = 0
        self.n_begun = 0
        self.at_base: dict[str, list[bytes]] = {}
        """By the session of the base."""
        self.outcomes: Counter[str] = Counter()
        self.open()

    def open(self) -> None:
        """Open both as a new process does."""
        self.disk = TrackedDisk(self.image)
        self.file = DirtyFile(self.disk, f"boot {self.boot}", self.store, lambda: self.store, lambda: str(self.stamp))
        for since in Since:
            self.check(since)

    def contents(self) -> list[bytes]:
        """Return the sector of each chunk that is looked at."""
        return [bytes(self.image.content[at + SECTOR : at + SECTOR + SECTOR_SIZE]) for at in range(0, SIZE, CHUNK_SIZE)]

    def check(self, since: Since) -> None:
        """Hold a map that is believed against the image."""
        base = self.file.base(since)
        if base is None:
            self.outcomes["not believed"] += 1
            return
        self.outcomes["believed"] += 1
        written = self.file.written(since)
        for chunk, (now, then) in enumerate(zip(self.contents(), self.at_base[base.session], strict=True)):
            assert written[chunk] or now == then, f"chunk {chunk} was changed, and the {since.name} map does not say so"

    def write(self) -> None:
        """Write or zero a sector, or a sector of each of several chunks."""
        self.stamp += 1
        chunk = self.rng.randrange(N_CHUNKS)
        if self.rng.random() < 0.2:
            n = self.rng.randint(1, N_CHUNKS - chunk)
            self.disk.write_zeroes(chunk * CHUNK_SIZE, n * CHUNK_SIZE)
        else:
            self.disk.pwrite(self.rng.randbytes(SECTOR_SIZE), chunk * CHUNK_SIZE + SECTOR)

    def begin(self) -> None:
        """Begin one of the maps."""
        self.n_begun += 1
        base = MapBase(image_id="image", epoch=1, session=f"s{self.n_begun}")
        self.at_base[base.session] = self.contents()
        self.file.begin(self.rng.choice(list(Since)), base)

    def restart(self) -> None:
        """End in order, perhaps reboot, perhaps see the image changed by somebody else, and begin anew."""
        self.image.flush()
        self.file.close(is_synced=True)
        if self.rng.random() < 0.5:
            self.reboot()
        if self.rng.random() < 0.3:
            self.stamp += 1
            self.image.content[SECTOR] ^= 1
            self.image.durable[:] = self.image.content
        self.open()

    def reboot(self) -> None:
        """Lose what was not synced."""
        self.boot += 1
        self.image.lose_power()
        self.store.lose_power()

    def step(self) -> None:
        """Do something, which may be the last thing the process does."""
        self.fate.left = self.rng.choice((None, None, None, 0, 1, 2, 3, 5))
        act = self.rng.choice((self.write, self.write, self.write, self.write, self.begin, self.restart))
        while True:
            try:
                act()
            except KilledError:
                self.fate.left = self.rng.choice((None, 0, 1, 2))
                if self.rng.random() < 0.4:
                    self.reboot()
                act = self.open
                continue
            break
        self.fate.left = None
        for since in Since:
            self.check(since)


def test_a_map_that_is_believed_tells_the_truth(nightly: bool) -> None:
    """Whatever call a kill or a power loss falls on, and however often."""
    outcomes: Counter[str] = Counter()
    for seed in range(3000 if nightly else 60):
        world = DirtyWorld(seed)
        try:
            for _ in range(40):
                world.step()
        except BaseException as exc:
            exc.add_note(f"seed {seed}")
            raise
        outcomes += world.outcomes
    print(dict(outcomes))
    assert outcomes["believed"] > outcomes["not believed"] / 10
    assert outcomes["not believed"] > outcomes["believed"] / 50
