"""The QMP codec: framing under any split, QEMU's texts, one line of ASCII out."""

from __future__ import annotations

import itertools
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from fusemig.errors import RemoteProtocolError
from fusemig.qmp import codec
from fusemig.qmp.codec import BadRequest, Request, RequestParser


def parse(*packets: bytes, max_bytes: int = codec.MAX_REQUEST_BYTES) -> list[Request | BadRequest]:
    """Return all that a parser finds in the packets."""
    parser = RequestParser(max_bytes)
    found: list[Request | BadRequest] = []
    for packet in packets:
        parser.receive(packet)
        while (request := parser.next_request()) is not None:
            found.append(request)
    return found


STOP = Request("stop", {})

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
).filter(lambda value: "\\ud" not in json.dumps(value) or _is_utf8(value))


def _is_utf8(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b'{"execute":"stop"}', [STOP]),
        (b'{"execute":"stop"}{"execute":"cont","id":1}', [STOP, Request("cont", {}, 1)]),
        (b' \t\r\n{\n"execute"\t:\r"stop" } \n', [STOP]),
        (b'{"execute":"a","arguments":{"x":"}]\\"{\\\\"}}', [Request("a", {"x": '}]"{\\'})]),
        (b'{"execute":"a","arguments":{"x":[{"y":[]}]}}', [Request("a", {"x": [{"y": []}]})]),
        (b'{"execute":"stop","id":null}', [Request("stop", {}, None)]),
        (b'{"execute":"stop","id":{"a":[1,1.5,"x"]}}', [Request("stop", {}, {"a": [1, 1.5, "x"]})]),
        (b'{"execute":"stop","id":"\\ud83d\\ude00"}', [Request("stop", {}, "\U0001f600")]),
        (b'{"execute":"stop","id":123456789012345678901234567890}', [Request("stop", {}, int("1234567890" * 3))]),
        (b"", []),
        (b'{"execute":"st', []),
    ],
)
def test_requests(sent: bytes, expected: list[Request]) -> None:
    """What a client may send, however it is cut."""
    assert parse(sent) == expected
    assert parse(*(sent[at : at + 1] for at in range(len(sent)))) == expected


# Recorded from qemu-system-x86_64 7.2.22 -M none -qmp stdio.
QEMU_REPLIES: list[tuple[bytes, str, Any]] = [
    (b"{}", "QMP input lacks member 'execute'", UNSET),
    (b'{"id":3}', "QMP input lacks member 'execute'", 3),
    (b"[]", "QMP input must be a JSON object", UNSET),
    (b'"hello"', "QMP input must be a JSON object", UNSET),
    (b"5\n", "QMP input must be a JSON object", UNSET),
    (b'{"execute":1}', "QMP input member 'execute' must be a string", UNSET),
    (b'{"execute":"stop","arguments":[]}', "QMP input member 'arguments' must be an object", UNSET),
    (b'{"execute":"stop","arguments":null}', "QMP input member 'arguments' must be an object", UNSET),
    (b'{"execute":"stop","extra":1}', "QMP input member 'extra' is unexpected", UNSET),
    (b'{"exec-oob":"stop","id":7}', "QMP input member 'exec-oob' is unexpected", 7),
    (b'{"execute":"a","execute":"b"}', "JSON parse error, duplicate key", UNSET),
    (b'{"execute":"a","arguments":{"uri":"a","uri":"b"}}', "JSON parse error, duplicate key", UNSET),
    (b'{"execute":"stop","id":"\xc3("}', "JSON parse error, invalid UTF-8 sequence in string", UNSET),
    (b'{"execute":"stop","id":"\\ud800"}', "JSON parse error, \\ud800 is not a valid Unicode character", UNSET),
    (b'{"execute":"stop","id":nan}', "JSON parse error, expecting value", UNSET),
    (b"}", "JSON parse error, expecting value", UNSET),
    (b",", "JSON parse error, expecting value", UNSET),
    (b"[" * 1500, "JSON nesting depth limit exceeded", UNSET),
    (b"\xff", "JSON parse error, stray '\ufffd'", UNSET),
    (b'{"execute":\x01', "JSON parse error, stray '\x01'", UNSET),
    (b'{"execute":"x\t', "JSON parse error, stray '\"x\t'", UNSET),
    (b'{"execute":"st\xff', "JSON parse error, stray '\"st\ufffd'", UNSET),
    (b"\x00", "JSON parse error, stray ''", UNSET),
    (b"garbage", "JSON parse error, invalid keyword 'garbage'", UNSET),
    (b"null", "QMP input must be a JSON object", UNSET),
    (b"GET / HTTP/1.1\r\n", "JSON parse error, stray 'G'", UNSET),
    # Ours alone: QEMU would wait for the bracket, echo "inf", or lose digits.
    (b'{"execute":[}', "JSON parse error, expecting value", UNSET),
    (b'{"execute":"stop","id":1e400}', "JSON parse error, number 1e400 is out of range", UNSET),
    (b'{"execute":"stop","id":NaN}', "JSON parse error, invalid keyword 'NaN'", UNSET),
    (b"{'execute':'stop'}", "JSON parse error, expecting property name enclosed in double quotes", UNSET),
]


@pytest.mark.parametrize(("sent", "desc", "id_"), QEMU_REPLIES, ids=lambda value: repr(value)[:40])
def test_bad_requests_are_answered_and_the_next_is_understood(sent: bytes, desc: str, id_: Any) -> None:
    """Garbage costs one error reply, and the next request is understood without a newline before it."""
    expected: list[Request | BadRequest] = [BadRequest(desc, id_), STOP]
    sent += b'{"execute":"stop"}'
    assert parse(sent) == expected
    assert parse(*(sent[at : at + 1] for at in range(len(sent)))) == expected


def test_number_of_too_many_digits_is_answered() -> None:
    """Python refuses to convert it; so do we, with a reply."""
    (bad,) = parse(b'{"execute":"stop","id":' + b"1" * 5000 + b"}")
    assert isinstance(bad, BadRequest)


@pytest.mark.parametrize("reset", [b"\x00", b"\x1b", b"\xfe", b"\xff"])
@pytest.mark.parametrize("half", [b"{", b'{"execute":"st', b'{"a":{"b":[1,', b'{"a":"\\'])
def test_reset_byte_drops_a_half_sent_request(half: bytes, reset: bytes) -> None:
    """A client that lost its step gets back with a control byte or 0xFF."""
    bad, request = parse(half + reset + b'{"execute":"stop"}')
    assert isinstance(bad, BadRequest)
    assert request == STOP


def test_white_space_before_a_stray_byte() -> None:
    """The stray byte is the one that was found, not the one that lies there after the white space was dropped."""
    assert parse(b'\n\xff\n{"execute":"stop"}') == [BadRequest("JSON parse error, stray '\ufffd'"), STOP]


def test_newline_does_not_reset() -> None:
    """A newline between tokens is white space."""
    assert parse(b'{"execute"\n:', b'\n"stop"\n}') == [STOP]


def test_text_of_a_broken_request_is_one_error() -> None:
    """A line of prose is one mistake, not one for each word."""
    assert parse(b'GET / HTTP/1.1, "please"]\n{"execute":"stop"}') == [
        BadRequest("JSON parse error, stray 'G'"),
        STOP,
    ]


@pytest.mark.parametrize("shape", [b'{"execute":"%s"}', b'{"a":[[%s', b'{"%s'])
def test_request_over_the_cap_ends_it(shape: bytes) -> None:
    """The cap holds for whole and for unfinished requests, and whatever the packets are."""
    sent = shape % (b"1" * 2000)
    with pytest.raises(RemoteProtocolError):
        parse(sent, max_bytes=1000)
    with pytest.raises(RemoteProtocolError):
        parse(*(sent[at : at + 7] for at in range(0, len(sent), 7)), max_bytes=1000)


def test_cap_counts_one_request_only() -> None:
    """Many small requests in one packet are fine; so is one of just the cap."""
    assert parse(b'{"execute":"stop"} ' * 100, max_bytes=18) == [STOP] * 100
    with pytest.raises(RemoteProtocolError):
        parse(b'{"execute":"stop" } ', max_bytes=18)


def test_garbage_is_not_kept() -> None:
    """Garbage without an end takes no memory and is not a too long request."""
    desc = f"JSON parse error, invalid keyword '{'x' * 80}'"
    assert parse(*[b"x" * 100] * 100, max_bytes=1000) == [BadRequest(desc)]


def cut(data: bytes, points: list[int]) -> list[bytes]:
    """Cut the data at some points."""
    edges = sorted({0, len(data), *(point % (len(data) + 1) for point in points)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(
    st.lists(st.tuples(st.text(), st.dictionaries(st.text(), JSON, max_size=3), JSON), min_size=1, max_size=4).filter(
        lambda requests: all(_is_utf8(request) for request in requests)
    ),
    st.booleans(),
    st.lists(st.integers(0, 10_000), max_size=10),
)
def test_any_request_survives_any_split(
    requests: list[tuple[str, dict[str, Any], Any]], is_ascii: bool, points: list[int]
) -> None:
    """The requests that come out are those that went in, however the bytes were cut."""
    sent = "".join(
        json.dumps({"execute": name, "arguments": arguments, "id": id_}, ensure_ascii=is_ascii)
        for name, arguments, id_ in requests
    ).encode()
    assert parse(*cut(sent, points)) == [Request(*request) for request in requests]


NOISE = st.lists(
    st.sampled_from(
        [bytes([byte]) for byte in b"{}[]\"\\,:\n\t \x00\xff\xc31x'"]
        + [b'"execute"', b'"id"', b'{"execute":"stop"}', b'\\ud800"', b"null", b"1e999"]
    )
    | st.binary(max_size=3),
    max_size=30,
).map(b"".join)


@given(NOISE, st.lists(st.integers(0, 100), max_size=5))
def test_garbage_never_raises_and_never_depends_on_the_split(noise: bytes, points: list[int]) -> None:
    """Whatever comes, the codec answers it, the same way for every split, and a reset brings it back."""
    sent = noise + b'\xff\n{"execute":"cont"}'
    found = parse(sent)
    assert found[-1] == Request("cont", {})
    assert found == parse(*cut(sent, points))
    for item in found:
        if isinstance(item, BadRequest):
            line = codec.encode_error("GenericError", item.desc, item.id)
            assert line.isascii()


@given(st.binary(max_size=200))
def test_cap_is_the_only_error(noise: bytes) -> None:
    """With a tiny cap the codec raises its own error or none."""
    with suppress(RemoteProtocolError):
        parse(noise, max_bytes=8)


def test_greeting() -> None:
    """The shapes that qemu.qmp insists on; nothing is offered."""
    assert json.loads(codec.encode_greeting("1.2")) == {
        "QMP": {
            "version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "fusemig 1.2"},
            "capabilities": [],
        }
    }


@pytest.mark.parametrize("id_", [None, 0, 1.5, "é\n", [], {"a": None}, False, 10**30], ids=repr)
def test_reply_echoes_the_id(id_: Any) -> None:
    """The id comes back with its type; a reply is one line of ASCII."""
    for line in (codec.encode_return({"x": "ü\u2028"}, id_), codec.encode_error("GenericError", "ü", id_)):
        assert line.endswith(b"\r\n")
        assert line.count(b"\n") == line.count(b"\r") == 1
        assert line.isascii()
        echoed = json.loads(line)["id"]
        assert echoed == id_
        assert type(echoed) is type(id_)


def test_reply_without_id_has_none() -> None:
    """Absent is not null."""
    assert codec.encode_return(None) == b'{"return": {}}\r\n'
    assert codec.encode_error("CommandNotFound", "x") == b'{"error": {"class": "CommandNotFound", "desc": "x"}}\r\n'


def test_results_that_are_no_json_are_bugs() -> None:
    """They raise in the encoder, not in a client's parser."""
    with pytest.raises((TypeError, ValueError)):
        codec.encode_return(object())
    with pytest.raises(ValueError, match="JSON"):
        codec.encode_return({"rate": float("inf")})


def test_event() -> None:
    """The timestamp is split as QMP wants it; absent data is left out."""
    assert json.loads(codec.encode_event("MIGRATION", {"status": "setup"}, 1_700_000_000_123_456_789)) == {
        "event": "MIGRATION",
        "data": {"status": "setup"},
        "timestamp": {"seconds": 1_700_000_000, "microseconds": 123_456},
    }
    assert "data" not in json.loads(codec.encode_event("STOP", None, 0))


def test_client_side_reads_what_the_server_side_writes() -> None:
    """Each message of a server comes back as its type."""
    decode = codec.decode_server_line
    assert decode(codec.encode_greeting("1")) == codec.Greeting("fusemig 1")
    assert decode(codec.encode_return([1], 2)) == codec.Return([1], 2)
    assert decode(b'{"return": null}') == codec.Return(None, None)
    assert decode(codec.encode_error("GenericError", "x", 3, kind="refused")) == codec.Error(
        "GenericError", "x", 3, "refused"
    )
    assert decode(codec.encode_event("STOP", None, 1_500_000_000)) == codec.Event("STOP", {}, 1.5)
    assert parse(codec.encode_request("migrate", {"uri": "é"}, 4)) == [Request("migrate", {"uri": "é"}, 4)]


@given(st.binary(max_size=60) | NOISE)
def test_client_side_raises_only_its_own_error(line: bytes) -> None:
    """A line that is no message is the peer's fault, whatever it holds."""
    with suppress(RemoteProtocolError):
        codec.decode_server_line(line)


@pytest.mark.parametrize("line", [b"{}", b"[]", b'{"event":1}', b'{"error":{}}', b"\xff", b"[" * 100_000])
def test_lines_that_are_no_message(line: bytes) -> None:
    """Each is refused."""
    with pytest.raises(RemoteProtocolError):
        codec.decode_server_line(line)
