"""Pages: one checked JSON record in 4 KiB, the headers of the files that lie beside an image."""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec
from xxhash import xxh3_64_hexdigest

from fusemig.errors import ConfigError

PAGE_SIZE: Final = 4096
BLANK_PAGE: Final = b"\n".rjust(PAGE_SIZE)
"""A page that holds no record."""

_Record = TypeVar("_Record", bound=msgspec.Struct)


class _Page(msgspec.Struct, frozen=True):
    check: str
    record: msgspec.Raw


def encode_page(record: msgspec.Struct) -> bytes:
    """Return the page that holds ``record``.

    Raises:
        ConfigError: it does not fit.
    """
    raw = msgspec.json.encode(record)
    line = msgspec.json.encode(_Page(xxh3_64_hexdigest(raw), msgspec.Raw(raw)))
    page = line.ljust(PAGE_SIZE - 1) + b"\n"
    if len(page) != PAGE_SIZE:
        raise ConfigError(f"a record of {len(line)} bytes is too long to be kept: use shorter names and paths")
    return page


def decode_page(page: bytes | bytearray, kind: type[_Record]) -> _Record | None:
    """Return a page's record, or None if it is blank, damaged or of another kind."""
    try:
        parsed = msgspec.json.decode(page, type=_Page)
        if xxh3_64_hexdigest(bytes(parsed.record)) != parsed.check:
            return None
        return msgspec.json.decode(parsed.record, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
