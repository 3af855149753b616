"""What the demo's guest (``tools/guest/init.c``) says on its console and leaves on its disk.

The consoles of the hosts that it was on, one after the other, are the console of one guest, torn at the byte at which
it stood still.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

RECORD: Final = 4096
"""Bytes of a record and of a slot."""
_WORDS: Final = RECORD // 8
_MAGIC: Final = 0x64726F6365727066
_BOOT: Final = re.compile(r"^boot ([0-9a-f-]{36})$", re.MULTILINE)
_DURABLE: Final = re.compile(r"^durable (\d+) ([0-9a-f]{8})$", re.MULTILINE)


class Account(NamedTuple):
    """What a guest's console tells."""

    boots: list[str]
    """Every boot id that it gave; one, if it never booted again."""
    numbers: list[int]
    """The records that it reported durable, in the order of the reports."""

    @property
    def is_one_guest(self) -> bool:
        """Whether it booted once, and each report is one more than the one before."""
        return len(self.boots) == 1 and self.numbers == list(range(1, len(self.numbers) + 1))


def read_console(*texts: str) -> Account:
    """Read the consoles of the hosts that a guest was on, in this order."""
    text = "".join(texts)
    boots = _BOOT.findall(text)
    heads = {boot[:8] for boot in boots}
    return Account(boots, [int(number) for number, head in _DURABLE.findall(text) if head in heads])


def last_durable(text: str) -> int:
    """Return the number of the last record that was reported durable; 0 if none was."""
    numbers = _DURABLE.findall(text[-RECORD:])
    return int(numbers[-1][0]) if numbers else 0


def record_number(block: bytes, boot: str) -> int | None:
    """Return the number of the record of this boot that ``block`` is, whole; None if it is none."""
    words = struct.unpack(f"<{_WORDS}Q", block)
    number = words[1]
    head = boot.replace("-", "")
    first = number * _WORDS
    whole = (
        _MAGIC,
        number,
        int(head[:16], 16),
        int(head[16:], 16),
        *(word % 2**64 for word in range(first + 4, first + _WORDS)),
    )
    return number if words == whole else None


def lost_records(image: Path, account: Account) -> list[int]:
    """Return the records reported durable that are neither in ``image``, whole, nor overwritten by later ones."""
    n_slots = image.stat().st_size // RECORD
    newest = {(number - 1) % n_slots: number for number in account.numbers}
    lost = []
    with image.open("rb") as file:
        for slot, number in newest.items():
            file.seek(slot * RECORD)
            found = record_number(file.read(RECORD), account.boots[0])
            if found is None or found < number:
                lost.append(number)
    return sorted(lost)
