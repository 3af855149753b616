"""Lines of the log: what they carry of a migration, and how they look in the journal."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import trio
import trio.testing

from fusemig.cli.logs import _is_journal, render_for_journal
from fusemig.log_context import add_log_fields, log_fields


def line(**fields: Any) -> dict[str, Any]:
    """Return what a renderer is given."""
    return dict(add_log_fields(None, "info", {"event": "x", **fields}))


async def test_a_phase_is_the_present_one_in_tasks_and_threads_of_the_block() -> None:
    """Fields are asked for when the line is written, wherever in the block, and never outside of it."""
    phase = "bulk"
    go_on = trio.Event()
    lines = []

    async def child() -> None:
        await go_on.wait()
        lines.append(await trio.to_thread.run_sync(line))

    async with trio.open_nursery() as outside:
        with log_fields(lambda: {"migration": "abc", "phase": phase}):
            async with trio.open_nursery() as inside:
                inside.start_soon(child)
                await trio.testing.wait_all_tasks_blocked()
                phase = "frozen"
                go_on.set()
        outside.start_soon(child)
    assert lines == [{"event": "x", "migration": "abc", "phase": "frozen"}, {"event": "x"}]


def test_what_a_line_says_itself_goes_before() -> None:
    """A line about another phase keeps its own."""
    with log_fields(partial(dict, phase="dirty")):
        assert line(phase="bulk") == {"event": "x", "phase": "bulk"}


def test_the_journal_gets_priorities_on_every_line_and_no_time() -> None:
    """sd-daemon(3): a prefix for each line, those of a traceback too."""
    event = {"event": "it broke", "level": "error", "disk": "vda", "exception": "Traceback\n  here"}
    assert render_for_journal(None, "", event) == "<3>it broke disk='vda'\n<3>Traceback\n<3>  here"
    assert render_for_journal(None, "", {"event": "fine", "level": "info"}) == "<6>fine"


def test_the_journal_is_known_by_device_and_inode() -> None:
    """A variable that was inherited, but for another stream, changes nothing."""
    with open("/dev/null", "wb") as stream:
        status = os.fstat(stream.fileno())
        here = f"{status.st_dev}:{status.st_ino}"
        assert _is_journal({"JOURNAL_STREAM": here}, stream.fileno())
        assert not _is_journal({"JOURNAL_STREAM": "1:2"}, stream.fileno())
        assert not _is_journal({}, stream.fileno())
