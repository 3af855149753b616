"""The bytes of QMP: a client's JSON to requests; greeting, replies and events to lines, and those lines back.

Rules:

1. A client's bytes are a stream of JSON values with or without white space between them (docs/interop/qmp-spec.txt in
   QEMU). `RequestParser` finds the end of a value by itself, so it does not matter how the bytes were cut.
2. Garbage is answered, not punished: a `BadRequest` holds the text of the error reply, and parsing goes on at the next
   object. A control byte, 0xFE or 0xFF drops a half-sent request, so a client can get back in step. Only a request
   of more than `MAX_REQUEST_BYTES` ends the conversation (`RemoteProtocolError`).
3. What the server sends is one line of ASCII for each message, ended by CR LF: many clients read lines.
4. ``id`` is echoed as it was sent, whatever JSON type it has; an absent ``id`` is `UNSET`, which is not ``null``.

The error texts are those of QEMU 7.2. Where QEMU reads more than JSON (single-quoted strings), we do not.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from fusemig.errors import RemoteProtocolError

MAX_REQUEST_BYTES: Final = 1 << 20
"""Longest request of a client; QEMU's own limit (MAX_TOKEN_SIZE in qobject/json-streamer.c) is 64 MiB."""

MAX_NESTING: Final = 128
"""Deepest nesting of a request; QEMU's limit is 1024, more than Python's recursion allows."""

MAX_REPLY_BYTES: Final = 10_000_000
"""Longest line that a client accepts, as in qemu.qmp."""

QEMU_VERSION: Final = (7, 2, 0)
"""The QEMU whose behaviour we emulate; it tells clients that block migration exists (removed in 9.1)."""

ErrorClass: TypeAlias = Literal["GenericError", "CommandNotFound", "DeviceNotActive", "DeviceNotFound", "KVMMissingCap"]
"""QapiErrorClass."""


@dataclass(frozen=True)
class Request:
    """A well-formed request: a command still to be looked up and checked."""

    execute: str
    arguments: dict[str, Any]
    id: Any = UNSET


@dataclass(frozen=True)
class BadRequest:
    """Bytes that are no request; ``desc`` is the text of the GenericError to answer with."""

    desc: str
    id: Any = UNSET


# What the scanner looks for; everything in between cannot end a value. A line end or a tab is white space between
# values and a control byte inside a string.
_RESET: Final = rb"\x00-\x08\x0b\x0c\x0e-\x1f\xfe\xff"
_VALUE_START: Final = re.compile(rb"[^ \t\r\n]")
_WORD: Final = re.compile(rb"[a-z]+|-?[0-9][0-9.eE+-]*|-\Z")
_STRUCTURE: Final = re.compile(rb'["{}\[\]' + _RESET + rb"]")
_STRING: Final = re.compile(rb'["\\\t\r\n' + _RESET + rb"]")
_RECOVERY: Final = re.compile(rb"[{\r\n" + _RESET + rb"]")
_RESET_BYTES: Final = frozenset({*range(0x20), 0xFE, 0xFF} - {*b"\t\r\n"})
_CLOSER: Final = {0x7B: 0x7D, 0x5B: 0x5D}
_QUOTE: Final = 0x22
_BACKSLASH: Final = 0x5C
_SHOWN_CHARACTERS: Final = 80
"""How much of what a client sent an error text repeats."""


class RequestParser:
    """Finds the requests in a client's bytes.

    Theory of operation. ``_buffer`` begins at the present value; ``_at`` is how far it has been scanned, so no byte is
    scanned twice. ``_closers`` holds the brackets that are open, ``_in_string`` is set after the quote at
    ``_string_at``. After an error, ``_is_recovering`` skips to the next object or control byte, which is where QEMU's
    lexer starts afresh.
    """

    def __init__(self, max_bytes: int = MAX_REQUEST_BYTES) -> None:
        """Start between two requests."""
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._at = 0
        self._closers = bytearray()
        self._in_string = False
        self._string_at = 0
        self._is_recovering = False

    def receive(self, data: bytes) -> None:
        """Take bytes in; call `next_request` until it returns None before the next call."""
        self._buffer += data

    def next_request(self) -> Request | BadRequest | None:
        """Return what comes next, or None where more bytes are needed.

        Raises:
            RemoteProtocolError: the request is too long; the parser is of no further use.
        """
        found = self._scan()
        if found is None or isinstance(found, BadRequest):
            return found
        return _decode_request(found)

    def _scan(self) -> bytes | BadRequest | None:
        """Return the next complete value, or what is wrong with it, and drop it from the buffer."""
        if not self._closers:
            start = self._find_start()
            if start is None or isinstance(start, BadRequest):
                return start
        buffer = self._buffer
        while True:
            match = (_STRING if self._in_string else _STRUCTURE).search(buffer, self._at)
            end = len(buffer) if match is None else match.end()
            if end > self._max_bytes:
                raise RemoteProtocolError(f"QMP request is longer than {self._max_bytes} bytes")
            if match is None:
                self._at = end
                return None
            byte = buffer[match.start()]
            if byte == _BACKSLASH:
                self._at = match.start()
                if self._at + 1 == len(buffer):
                    return None
                self._at += 2 if buffer[self._at + 1] in b'"\\' else 1  # a control byte counts here too
                continue
            self._at = end
            if byte == _QUOTE:
                self._in_string = not self._in_string
                self._string_at = match.start()
            elif byte in _CLOSER:
                self._closers.append(_CLOSER[byte])
                if len(self._closers) > MAX_NESTING:
                    return self._fail("JSON nesting depth limit exceeded")
            elif self._closers[-1] == byte:
                self._closers.pop()
                if not self._closers:
                    value = bytes(buffer[: self._at])
                    self._drop()
                    return value
            elif self._in_string:
                return self._fail(_stray(buffer[self._string_at : end]))
            elif byte in _RESET_BYTES:
                return self._fail(_stray(buffer[match.start() : end]))
            else:
                return self._fail("JSON parse error, expecting value")

    def _find_start(self) -> BadRequest | bool | None:
        """Drop what precedes the next value: True if it is there, None if more bytes are needed."""
        if self._is_recovering:
            match = _RECOVERY.search(self._buffer)
            if match is None:
                self._buffer.clear()
                return None
            self._is_recovering = False
            # As in QEMU, a control byte that ends the garbage is an error of its own.
            del self._buffer[: match.start()]
        match = _VALUE_START.search(self._buffer)
        if match is None:
            self._buffer.clear()
            return None
        del self._buffer[: match.start()]
        byte = self._buffer[0]
        if byte in _CLOSER:
            return True
        match = _WORD.match(self._buffer)
        if match is not None:
            return self._end_word(bytes(match[0]))
        self._at = 1
        if byte in b"]},:":
            bad = self._fail("JSON parse error, expecting value")
            self._is_recovering = False  # a token in the wrong place; the next one may be in its place
            return bad
        if byte == _QUOTE:
            return self._fail("QMP input must be a JSON object")
        return self._fail(_stray(self._buffer[:1]))

    def _end_word(self, word: bytes) -> BadRequest | None:
        """Drop a number or a keyword that stands where a request should; None if more of it may come."""
        if len(word) == len(self._buffer) and len(word) <= _SHOWN_CHARACTERS:
            return None
        desc = "QMP input must be a JSON object"
        if word.isalpha() and word not in (b"true", b"false", b"null"):
            desc = f"JSON parse error, invalid keyword '{word[:_SHOWN_CHARACTERS].decode()}'"
        self._at = len(word)
        bad = self._fail(desc)
        self._is_recovering = len(word) > _SHOWN_CHARACTERS  # a short one was whole; of this, more may come
        return bad

    def _fail(self, desc: str) -> BadRequest:
        """Drop what was scanned and skip to a new beginning; a control byte that failed is the end of the garbage."""
        byte = self._buffer[self._at - 1]
        self._is_recovering = 0x20 <= byte < 0xFE or byte in b"\t"
        self._drop()
        return BadRequest(desc)

    def _drop(self) -> None:
        del self._buffer[: self._at]
        self._at = 0
        self._closers.clear()
        self._in_string = False


def _stray(token: bytes | bytearray) -> str:
    """Name what is no part of JSON: a byte, or a string as far as it came. As in QEMU, a zero byte ends the text."""
    text = token.decode(errors="replace").partition("\0")[0]
    return f"JSON parse error, stray '{text[:_SHOWN_CHARACTERS]}'"


def _decode_request(value: bytes) -> Request | BadRequest:
    """Decode a complete value whose brackets match."""
    try:
        # Not msgspec: it takes the last of two members of one name, which a control socket must not.
        message = json.loads(
            value.decode(), object_pairs_hook=_members, parse_constant=_refuse_constant, parse_float=_finite
        )
        if b"\\u" in value:
            json.dumps(message, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        return BadRequest("JSON parse error, invalid UTF-8 sequence in string")
    except UnicodeEncodeError as error:
        lone = f"\\u{ord(error.object[error.start]):04x}"
        return BadRequest(f"JSON parse error, {lone} is not a valid Unicode character")
    except json.JSONDecodeError as error:
        return BadRequest(f"JSON parse error, {error.msg[0].lower()}{error.msg[1:]}")
    except ValueError as error:  # our hooks, and Python's limit on the digits of a number
        return BadRequest(f"JSON parse error, {error}")
    if not isinstance(message, dict):
        return BadRequest("QMP input must be a JSON object")
    id_ = message.pop("id", UNSET)
    for name, member in message.items():
        if name == "execute":
            if not isinstance(member, str):
                return BadRequest("QMP input member 'execute' must be a string", id_)
        elif name == "arguments":
            if not isinstance(member, dict):
                return BadRequest("QMP input member 'arguments' must be an object", id_)
        else:
            return BadRequest(f"QMP input member '{name}' is unexpected", id_)
    if "execute" not in message:
        return BadRequest("QMP input lacks member 'execute'", id_)
    return Request(message["execute"], message.get("arguments", {}), id_)


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"invalid keyword '{name}'")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"number {text[:40]} is out of range")
    return number


# The messages of a server. An unset member is left out; ``id`` comes last, as in QEMU.


class _QemuVersion(msgspec.Struct, frozen=True):
    major: int
    minor: int
    micro: int


class Version(msgspec.Struct, frozen=True):
    """VersionInfo: the QEMU that is emulated, and in ``package`` who really speaks."""

    package: str
    qemu: _QemuVersion = _QemuVersion(*QEMU_VERSION)


class _GreetingBody(msgspec.Struct, frozen=True):
    version: Version
    capabilities: list[str]


class _Greeting(msgspec.Struct, frozen=True):
    QMP: _GreetingBody


class _Return(msgspec.Struct, frozen=True):
    result: Any = msgspec.field(name="return")
    id: Any = UNSET


class _ErrorBody(msgspec.Struct, frozen=True):
    class_: str = msgspec.field(name="class")
    desc: str = ""
    kind: str | UnsetType = msgspec.field(name="x-fusemig-kind", default=UNSET)


class _Error(msgspec.Struct, frozen=True):
    error: _ErrorBody
    id: Any = UNSET


class _Timestamp(msgspec.Struct, frozen=True):
    seconds: int
    microseconds: int


class _Event(msgspec.Struct, frozen=True):
    event: str
    data: Any
    timestamp: _Timestamp


def version(fusemig_version: str) -> Version:
    """Return the answer to ``query-version``, which the greeting holds too."""
    return Version(package=f"fusemig {fusemig_version}")


def encode_greeting(fusemig_version: str) -> bytes:
    """Return the line that a server sends first; it offers no capability (``oob`` would have to be kept)."""
    return _line(_Greeting(_GreetingBody(version(fusemig_version), [])))


def encode_return(result: Any, id_: Any = UNSET) -> bytes:
    """Return the reply to a command that succeeded; None stands for the empty object.

    Raises:
        TypeError, ValueError: the result is not JSON (a bug of the command).
    """
    return _line(_Return({} if result is None else result, id_))


def encode_error(class_: ErrorClass, desc: str, id_: Any = UNSET, *, kind: str | UnsetType = UNSET) -> bytes:
    """Return the reply to a command that failed; ``kind`` is `FusemigError.kind` in a member of our own."""
    return _line(_Error(_ErrorBody(class_, desc, kind), id_))


def encode_event(name: str, data: Any, time_ns: int) -> bytes:
    """Return an event that happened at ``time_ns`` nanoseconds after the epoch; ``data`` None is left out."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    return _line(_Event(name, UNSET if data is None else data, _Timestamp(seconds, nanoseconds // 1000)))


def encode_request(execute: str, arguments: dict[str, Any] | None, id_: Any = UNSET) -> bytes:
    """Return a client's request as a line."""
    message: dict[str, Any] = {"execute": execute}
    if arguments:
        message["arguments"] = arguments
    if id_ is not UNSET:
        message["id"] = id_
    return _line(message)


def encode_value(value: Any) -> bytes:
    """Return a result alone, in ASCII and without a line break, for whoever takes it otherwise than from the socket."""
    return _ascii(msgspec.to_builtins(value, str_keys=True)).encode("ascii")


def _ascii(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False)


def _line(message: Any) -> bytes:
    # Not msgspec.json: it writes UTF-8.
    return encode_value(message) + b"\r\n"


@dataclass(frozen=True)
class Greeting:
    """The first message of a server."""

    package: str


@dataclass(frozen=True)
class Return:
    """A reply: the command succeeded."""

    result: Any
    id: Any


@dataclass(frozen=True)
class Error:
    """A reply: the command failed; ``kind`` is the server's `FusemigError.kind`, empty from other servers."""

    error_class: str
    desc: str
    id: Any
    kind: str = ""


@dataclass(frozen=True)
class Event:
    """Something happened at the server."""

    name: str
    data: dict[str, Any]
    time_s: float


class _AnyError(msgspec.Struct):
    class_: str = msgspec.field(name="class")
    desc: str
    kind: str = msgspec.field(name="x-fusemig-kind", default="")


class _ServerMessage(msgspec.Struct):
    """Any message of a server; exactly one of the first four members is there."""

    QMP: _GreetingBody | UnsetType = UNSET
    result: Any = msgspec.field(name="return", default=UNSET)
    error: _AnyError | UnsetType = UNSET
    event: str | UnsetType = UNSET
    id: Any = None
    data: dict[str, Any] = {}
    timestamp: _Timestamp = _Timestamp(0, 0)


_server_decoder: Final = msgspec.json.Decoder(_ServerMessage)


def decode_server_line(line: bytes) -> Greeting | Return | Error | Event:
    """Decode a server's line.

    Raises:
        RemoteProtocolError: it is no QMP message.
    """
    try:
        message = _server_decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"the server's line is no QMP message: {error}") from error
    if message.QMP is not UNSET:
        return Greeting(message.QMP.version.package)
    if message.error is not UNSET:
        return Error(message.error.class_, message.error.desc, message.id, message.error.kind)
    if message.result is not UNSET:
        return Return(message.result, message.id)
    if isinstance(message.event, str):
        time_s = message.timestamp.seconds + message.timestamp.microseconds / 1e6
        return Event(message.event, message.data, time_s)
    raise RemoteProtocolError("the server's line is no greeting, reply or event")
