"""A Linux guest that writes numbered records to its disk without pause, and what its host can tell of it.

The guest's user space is ``tools/guest/init.c``; ``tools/make_guest`` puts it and a distribution's kernel into
``.guest``. What it reports on its console goes to a file; the consoles of the source and of the destination, one after
the other, are the console of one guest, torn at the byte at which it stood still.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fusemig.cli.demo_records import RECORD, last_durable, record_number
from support.hosts import wait_until
from support.qemu import Qemu

if TYPE_CHECKING:
    from collections.abc import Sequence

PARTS = Path(__file__).parents[2] / ".guest"
KERNEL, INITRD = PARTS / "vmlinuz", PARTS / "initrd"
MEMORY_MIB = 128
BOOT_DEADLINE_S = 60.0


def is_made() -> bool:
    """Tell whether there is a kernel to boot."""
    return KERNEL.exists() and INITRD.exists()


class Guest(Qemu):
    """A QEMU that runs the guest, or waits for it with ``incoming``; fusemig's own QMP socket is `migrator`."""

    def __init__(self, directory: Path, disk: Path, *, incoming: str = "", more: Sequence[str] = ()) -> None:
        """Start it on ``disk``, with everything else in ``directory``."""
        directory.mkdir()
        self.console_path = directory / "console"
        self.migrator = directory / "migrator.sock"
        arguments = ["-no-user-config", "-no-reboot"]
        arguments += ["-kernel", str(KERNEL), "-initrd", str(INITRD), "-append", "console=ttyS0 quiet panic=-1"]
        arguments += ["-serial", f"file:{self.console_path}"]
        arguments += ["-drive", f"if=none,id=vda,file={disk},format=raw,cache=none"]
        arguments += ["-device", "virtio-blk-pci,drive=vda"]
        arguments += ["-qmp", f"unix:{self.migrator},server=on,wait=off", *more]
        super().__init__(directory, drives=[], incoming=incoming, memory_mib=MEMORY_MIB, paused=False, more=arguments)

    @property
    def console(self) -> str:
        """What the guest has said here."""
        return self.console_path.read_text(errors="replace")

    def last_durable(self) -> int:
        """Return the number of the last record that was reported durable here; 0 before the first."""
        return last_durable(self.console)

    def wait_writing(self, n_more: int = 200) -> None:
        """Wait until the guest has made ``n_more`` records durable here, from now on."""
        try:
            first = wait_until(self.last_durable, "a record of the guest", BOOT_DEADLINE_S)
            wait_until(lambda: self.last_durable() >= first + n_more, "records of the guest", BOOT_DEADLINE_S)
        except TimeoutError as exc:
            exc.add_note(self._situation())
            raise

    def _situation(self) -> str:
        """Say whether the guest, QEMU or the mount hangs: twice where the CPU is, and what waits for an answer."""
        waiting = {str(path): path.read_text().strip() for path in Path("/sys/fs/fuse/connections").glob("*/waiting")}
        said = [f"run state {self.run_state()}; unanswered FUSE requests {waiting}; console {self.console[-500:]!r}"]
        said += [self.monitor(command) for command in ("info blockstats", "info registers", "info registers")]
        return "\n".join(said)

    def run_state(self) -> str:
        """Return QEMU's run state."""
        state: str = self.execute("query-status")["status"]
        return state


def fill(image: Path, size: int) -> None:
    """Make an image in which every block differs from zeros, from each other and from a record."""
    with image.open("wb") as file:
        for index in range(size // RECORD):
            file.write(_filling(index))


def _filling(index: int) -> bytes:
    return struct.pack("<Q", ~index & 0xFFFFFFFFFFFFFFFF) * (RECORD // 8)


def make_record(number: int, boot: str) -> bytes:
    """Return a record as the guest writes it."""
    head = boot.replace("-", "")
    words = (0x64726F6365727066, number, int(head[:16], 16), int(head[16:], 16))
    n_words = RECORD // 8
    return struct.pack(f"<{n_words}Q", *words, *range(number * n_words + 4, (number + 1) * n_words))


class Records(NamedTuple):
    """What is on the guest's disk."""

    held: set[int]
    """The numbers of the whole records."""
    torn: list[int]
    """Offsets, in bytes, of what is neither a record nor what the disk was filled with."""
    n_slots: int

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Return those of ``numbers`` that are neither there nor overwritten by a later record of their slot."""
        newest: dict[int, int] = {}
        for number in self.held:
            slot = (number - 1) % self.n_slots
            newest[slot] = max(number, newest.get(slot, 0))
        return [number for number in numbers if newest.get((number - 1) % self.n_slots, 0) < number]


def read_records(image: Path, boot: str) -> Records:
    """Read every record of this boot from a disk that was made by `fill`."""
    held, torn, index = set(), [], 0
    with image.open("rb") as file:
        while block := file.read(RECORD):
            if block != _filling(index):
                number = record_number(block, boot)
                if number is None:
                    torn.append(index * RECORD)
                else:
                    held.add(number)
            index += 1
    return Records(held, torn, index)
