"""Measuring the way to a destination, over links of known speed on a virtual clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from fusemig.core.phase import MigrationPhase
from fusemig.errors import FusemigError, PeerRefusedError, RemoteProtocolError
from fusemig.migration.destination import DestinationMigration
from fusemig.migration.link import BufferPool, NativeLink
from fusemig.migration.probe import LONGEST_S, Path, measure
from fusemig.wire import native
from support.faults import faulty_connection
from support.pair import inline
from support.streams import carry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

    from support.faults import FaultyStream


async def probe(
    bytes_per_s: float, refusal: str = "", delay_s: float = 0.0001
) -> tuple[Path | FusemigError, DestinationMigration]:
    """Measure a link against a real destination."""
    source, near = faulty_connection()
    far, destination = faulty_connection()
    incoming = DestinationMigration(destination, None, inline, lambda _phase: None, b"", refusal)  # type: ignore[arg-type]
    found: list[Path | FusemigError] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(incoming.run)
        nursery.start_soon(carry, near, far, bytes_per_s, delay_s)
        nursery.start_soon(carry, far, near, 1e9, delay_s)
        try:
            found.append(await measure(source))
        except FusemigError as exc:
            found.append(exc)
        await source.aclose()
        await destination.aclose()
    return found[0], incoming


@pytest.mark.parametrize(("bytes_per_s", "delay_s"), [(100e3, 0.0001), (2e6, 0.0001), (20e6, 0.02)])
async def test_the_speed_of_a_link(bytes_per_s: float, delay_s: float, autojump_clock: MockClock) -> None:
    """Within a tenth of what the link carries, and no migration of the destination's."""
    found, incoming = await probe(bytes_per_s, delay_s=delay_s)
    assert isinstance(found, Path)
    assert found.bytes_per_s == pytest.approx(bytes_per_s, rel=0.1)
    assert found.round_trip_s == pytest.approx(2 * delay_s, abs=0.01)
    assert incoming.is_question
    assert incoming.error is None
    assert incoming.phase is MigrationPhase.NONE


async def test_a_refusal_is_told(autojump_clock: MockClock) -> None:
    """A destination that takes QEMU's wire only says so."""
    found, incoming = await probe(50e6, "only QEMU's stream")
    assert isinstance(found, PeerRefusedError)
    assert "only QEMU's stream" in str(found)
    assert isinstance(incoming.error, PeerRefusedError)


async def run_against(answers: Callable[[NativeLink, FaultyStream], Awaitable[None]]) -> None:
    source, destination = faulty_connection(50e6)
    link = NativeLink(destination, native.Decoder(native.FROM_SOURCE, preface=True), BufferPool())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answers, link, destination)
        await measure(source)


async def test_an_older_destination_hangs_up(autojump_clock: MockClock) -> None:
    """It does not know the question; the error says what to do instead."""

    async def hang_up(link: NativeLink, stream: FaultyStream) -> None:
        await stream.wait_readable()
        await stream.aclose()

    with pytest.RaisesGroup(pytest.RaisesExc(PeerRefusedError, match="give it with --link RATE")):
        await run_against(hang_up)


async def test_another_answer_is_an_error(autojump_clock: MockClock) -> None:
    """A destination that answers with something else is out of order."""

    async def babble(link: NativeLink, stream: FaultyStream) -> None:
        await link.receive(1.0)
        await link.send_message(native.Synced())

    with pytest.RaisesGroup(pytest.RaisesExc(RemoteProtocolError, match="where PROBED was due")):
        await run_against(babble)


async def test_who_measures_for_ever_is_cut_off(autojump_clock: MockClock) -> None:
    """A destination listens for as long as a slow link needs, and no longer."""
    source, destination = faulty_connection(50e6)
    incoming = DestinationMigration(destination, None, inline)  # type: ignore[arg-type]
    link = NativeLink(source, native.Decoder(native.FROM_DESTINATION, preface=False), BufferPool())

    async def never_end() -> None:
        await link.send([native.PREFACE])
        while True:
            await link.send_message(native.Probe())
            await link.receive(1.0)
            await trio.sleep(0.5)

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(never_end)
        await incoming.run()
        nursery.cancel_scope.cancel()
    assert isinstance(incoming.error, RemoteProtocolError)
    assert trio.current_time() - began == pytest.approx(LONGEST_S, abs=1)
