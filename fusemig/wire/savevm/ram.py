"""RamSkipper: where the contents of a `ram` section end; no byte of memory is kept."""

from __future__ import annotations

import struct
from typing import Final, NoReturn

from fusemig.errors import RemoteProtocolError
from fusemig.wire.base import StepDecoder

DEFAULT_PAGE_SIZE: Final = 4096
"""Of the guests whose QEMU sends no `configuration/target-page-bits`: x86, ppc, s390x."""

RAM_SECTION: Final = "ram"
RAM_VERSION: Final = 4
RAM_ZERO: Final = 0x02
RAM_MEM_SIZE: Final = 0x04
RAM_PAGE: Final = 0x08
RAM_EOS: Final = 0x10
RAM_CONTINUE: Final = 0x20
_RAM_REFUSED: Final = {
    0x01: "FULL (an obsolete form of the stream)",
    0x40: "XBZRLE (turn off QEMU's migration capability xbzrle)",
    0x80: "HOOK (RDMA; migrate over tcp or a unix socket)",
    0x100: "COMPRESS_PAGE (turn off QEMU's migration capability compress)",
    0x200: "MULTIFD_FLUSH (turn off QEMU's migration capability multifd)",
}

_U64: Final = struct.Struct(">Q")


class RamSkipper(StepDecoder[None]):
    """Parses the contents of `ram` sections in order to know where they end; no byte of memory is kept.

    A page is read together with the 8 bytes that always follow it, so it costs one step.
    """

    def __init__(self, page_size: int, *, has_addresses: bool = False) -> None:
        """Skip pages of ``page_size``; ``has_addresses`` tells the block list that goes with `x-ignore-shared`."""
        super().__init__(page_size + _U64.size)
        self._page_size = page_size
        self._block_extra = 2 * _U64.size if has_addresses else _U64.size
        self._unlisted = 0
        self._skip = 0
        self._has_block = False
        self.is_in_section = False
        self._expect_head()

    def begin(self, version: int) -> None:
        """A section begins.

        Raises:
            RemoteProtocolError: its version is not ours.
        """
        if version != RAM_VERSION:
            raise RemoteProtocolError(
                f"unsupported version {version} of the '{RAM_SECTION}' section; {RAM_VERSION} is known"
            )
        self.is_in_section = True

    def _expect_head(self, skip: int = 0) -> None:
        self._skip = skip
        self._read(skip + _U64.size, self._on_head)

    def _on_head(self) -> None:
        (head,) = _U64.unpack_from(self._scratch, self._skip)
        flags = head & (self._page_size - 1)
        kind = flags & ~RAM_CONTINUE
        if kind in (RAM_PAGE, RAM_ZERO):
            self._skip = self._page_size if kind == RAM_PAGE else 1
            if not flags & RAM_CONTINUE:
                self._read(1, self._on_name_length)
            elif not self._has_block:
                raise RemoteProtocolError("a page of RAM that continues no block")
            else:
                self._expect_head(self._skip)
        elif flags == RAM_MEM_SIZE:
            self._unlisted = head - flags
            self._expect_listed()
        elif flags == RAM_EOS:
            self.is_in_section = False
            self._expect_head()
        else:
            self._refuse(flags)

    def _refuse(self, flags: int) -> NoReturn:
        for flag, text in _RAM_REFUSED.items():
            if flags & flag:
                raise RemoteProtocolError(f"RAM in a form that cannot be skipped: {text}")
        raise RemoteProtocolError(f"unknown flags {flags:#x} in the '{RAM_SECTION}' section")

    def _on_name_length(self) -> None:
        length = self._scratch[0]
        if not length:
            raise RemoteProtocolError("a block of RAM without a name")
        self._has_block = True
        self._read(length, self._on_name)

    def _on_name(self) -> None:
        self._expect_head(self._skip)

    def _expect_listed(self) -> None:
        if self._unlisted:
            self._read(1, self._on_listed_length)
        else:
            self._expect_head()

    def _on_listed_length(self) -> None:
        self._skip = self._scratch[0]
        self._read(self._skip + self._block_extra, self._on_listed)

    def _on_listed(self) -> None:
        (length,) = _U64.unpack_from(self._scratch, self._skip)
        if length > self._unlisted:
            raise RemoteProtocolError("the blocks of RAM are longer than their sum")
        self._unlisted -= length
        self._expect_listed()
