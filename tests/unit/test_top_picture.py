"""What `fusemig top` draws: signs that hide no state, and lines that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusemig.chunk_map import Cell
from fusemig.cli.top_picture import ASCII, MAX_ROWS, UNICODE, Watched, cell_states, cells_wanted, picture, rows_per_disk
from fusemig.qmp import schema, seeing
from fusemig.qmp.seeing import MAX_CELLS, ChunkMap, DiskView, RecentEvent


def make_map(per: int = 1, **counts: list[int]) -> ChunkMap:
    lists: dict[str, list[int]] = {name: counts.get(name, []) for name in Cell._fields}
    chunks = sum(sum(of) for name, of in lists.items() if name != "hot")
    return ChunkMap(chunks=chunks, chunks_per_cell=per, **lists)


def make_view(n_disks: int = 1, *, pid: int = 1, clock: float = 0.0, written: int = 0, **status: Any) -> schema.View:
    names = [f"disk{n}" for n in range(n_disks)]
    defaults: dict[str, Any] = {
        "version": "1.2",
        "pid": pid,
        "mountpoint": "/mnt",
        "status": schema.RunState.RUNNING,
        "disks": [
            schema.ServedDisk(name=name, size=1 << 30, path="/x", state="owner", gate="open", parked_writes=7)
            for name in names
        ],
        "totals": schema.MigrationTotals(),
    }
    return schema.View(
        at=1_700_000_000_000,
        clock=clock,
        status=schema.DaemonStatus(**defaults | status),
        parameters=schema.MigrationParameters(),
        disks=[
            DiskView(name=name, written_bytes=written, map=make_map(hole=[1] * 299 + [0], dirty=[0] * 299 + [1]))
            for name in names
        ],
        events=[RecentEvent(number=n, at=n * 1000, event="STOP", text=f"event {n}") for n in range(1, 9)],
    )


SENDING = schema.MigrationInfo(
    status=schema.MigrationStatus.ACTIVE,
    disk=schema.MigrationStats(remaining=77 << 20),
    expected_downtime=150,
    x_fusemig=schema.FusemigMigration(
        role=schema.Role.SOURCE,
        session="s",
        phase="dirty",
        mode=schema.Mode.PRECOPY,
        wire=schema.WireName.NATIVE,
        pass_=3,
        bandwidth=100 << 20,
        dirty_rate=10 << 20,
        eta=9000,
        converges=True,
    ),
)


def watch(*views: schema.View) -> Watched:
    watched = Watched(Path("/run/vm/control"))
    for view in views:
        watched.take(view)
    return watched


def test_a_cell_shows_its_most_important_state_and_whether_it_is_hot() -> None:
    """One dirty chunk among many is seen; so is heat, wherever it is."""
    chunks = make_map(
        per=8,
        in_flight=[1, 0, 0, 0, 0],
        dirty=[7, 1, 1, 0, 0],
        sent=[0, 7, 7, 8, 0],
        hole=[0, 0, 0, 0, 8],
        hot=[1, 0, 1, 1, 0],
    )
    assert cell_states(chunks) == ["in-flight", "dirty", "dirty and hot", "hot", "hole"]


@pytest.mark.parametrize("signs", [UNICODE, ASCII])
def test_no_two_states_look_the_same_without_colours(signs: Any) -> None:
    """Colour is never the only difference; ASCII where there is nothing else."""
    assert len(set(signs.of.values())) == len(signs.of)
    assert all(len(sign) == 1 for sign in signs.of.values())
    assert signs is UNICODE or all(sign.isascii() for sign in "".join([*signs.of.values(), *signs[1:]]))


@settings(deadline=None)
@given(st.integers(20, 300), st.integers(5, 120), st.integers(1, 3), st.integers(1, 20))
def test_a_picture_fits_its_screen(width: int, height: int, n_daemons: int, n_disks: int) -> None:
    """Never a line too many or too long, and a map for each disk as far as there is room."""
    watched = [watch(make_view(n_disks, migration=SENDING)) for _ in range(n_daemons)]
    lines = picture(watched, width, height, UNICODE).plain.split("\n")
    assert len(lines) == height
    assert max(len(line) for line in lines) <= width
    assert lines[-1] == "q quits"[:width]
    assert 1 <= rows_per_disk(height, watched) <= MAX_ROWS
    assert 1 <= cells_wanted(width, height, watched) <= MAX_CELLS


def test_everything_that_decides_is_said() -> None:
    """Phase, pass, pending, rates, forecast, downtime against its limit, parked writes, counts, the last events."""
    text = picture([watch(make_view(migration=SENDING))], 200, None, ASCII).plain
    for expected in (
        "sending: dirty  pass 3, 77.0 MiB pending",
        "100.0 MiB/s, dirtied 10.0 MiB/s",
        "about 9 s left",
        "expected downtime 150 ms, limit 300 ms  ########........",
        "7 parked writes",
        "d dirty 1",
        ". hole 299",
        "event 8",
    ):
        assert expected in text, expected
    assert "event 4" not in text


def test_rates_are_of_one_daemon_between_two_views() -> None:
    """After a restart counters begin anew, and nothing is made of their difference."""
    watched = watch(make_view(clock=0.0), make_view(clock=2000.0, written=4 << 20))
    assert watched.guest_rates(0) == (0.0, 2 << 20)
    watched.take(make_view(clock=3000.0, pid=2))
    assert watched.guest_rates(0) is None


def test_a_daemon_that_is_away_keeps_its_last_picture_and_says_so() -> None:
    """What was seen last stays, with the reason; one that never answered has a reason alone."""
    watched = watch(make_view())
    watched.problem = "no daemon listens at '/run/vm/control'"
    text = picture([watched], 120, None, ASCII).plain
    assert "away since" in text
    assert "d dirty 1" in text
    never = Watched(Path("/run/other"))
    never.problem = "nobody"
    assert picture([never], 120, None, ASCII).plain.strip() == "/run/other  nobody"


def test_a_disk_that_is_still_to_come_has_no_map() -> None:
    """A destination's, whose size is not known."""
    view = make_view()
    view = schema.View(
        at=view.at,
        clock=view.clock,
        status=view.status,
        parameters=view.parameters,
        disks=[seeing.DiskView(name="disk0")],
        events=[],
    )
    assert "dirty" not in picture([watch(view)], 120, None, ASCII).plain


def test_what_a_peer_said_does_not_reach_the_terminal_as_a_command() -> None:
    """Escape sequences in names and reasons are shown as what they are not."""
    info = schema.MigrationInfo(
        status=SENDING.status,
        disk=SENDING.disk,
        x_fusemig=SENDING.x_fusemig,
        error_desc="no\x1b]0;owned\x07\x9b2J room",
    )
    text = picture([watch(make_view(migration=info))], 200, None, ASCII).plain
    assert "room" in text
    assert all(character.isprintable() or character == "\n" for character in text)
