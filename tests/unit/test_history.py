"""The history of migrations: bounded, true to what it is told, and good enough for the report that is made of it."""

from __future__ import annotations

import gc
import re
import weakref
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import pytest

from fusemig import history
from fusemig.cli.report import ReportRequest, report_command
from fusemig.errors import FusemigError
from fusemig.history import History
from fusemig.pages.report import freeze, phases, report_page
from fusemig.phase import MigrationPhase
from fusemig.qmp import schema
from fusemig.qmp.seeing import RecordParameters

if TYPE_CHECKING:
    from pathlib import Path

    from fusemig.qmp.schema import MigrationRecord

PARAMETERS = RecordParameters(
    uri="tcp:10.0.0.2:4444",
    downtime_limit=300,
    max_bandwidth=0,
    order="sequential",
    auto_mirror=True,
    mirror_lag="20ms",
    throttle_max=0,
    reconnect=0,
    pause_before_switchover=False,
)


class Fake:
    """A migration as the history sees one."""

    def __init__(self) -> None:
        self.phase = MigrationPhase.NONE
        self.n_pass = 0
        self.remaining = 100 << 20
        self.error = ""
        self.names = ["vda"]
        self.began_s = 0.0

    def info(self, now: float = 0.0) -> schema.MigrationInfo:
        is_completed = self.phase is MigrationPhase.COMPLETED
        return schema.MigrationInfo(
            status=schema.MigrationStatus.ACTIVE,
            disk=schema.MigrationStats(remaining=self.remaining, total=1 << 30),
            total_time=round(self.began_s * 1000),
            downtime=12 if is_completed else msgspec.UNSET,
            error_desc=self.error or msgspec.UNSET,
            x_fusemig=schema.FusemigMigration(
                role=schema.Role.SOURCE,
                session="5e55104e",
                phase=self.phase.value,
                mode=schema.Mode.PRECOPY,
                wire=schema.WireName.NATIVE,
                pass_=self.n_pass,
                wire_bytes=1000 * self.n_pass,
                frozen_ms=11.5 if is_completed else 0.0,
                disks=[schema.MigratingDisk(name=name, size=1 << 30, digest="00ff") for name in self.names],
            ),
        )


def begin(kept: History, fake: Fake, peer: str = "tcp:10.0.0.2:4444") -> None:
    kept.begin(fake, peer, fake.info, lambda: PARAMETERS)  # type: ignore[arg-type]


def run(kept: History, *steps: tuple[float, str, int]) -> Fake:
    """Have a migration go through phases and passes at these times."""
    fake = Fake()
    begin(kept, fake)
    for now, phase, n_pass in steps:
        fake.phase, fake.n_pass = MigrationPhase(phase), n_pass
        kept.note(fake, now)  # type: ignore[arg-type]
    return fake


COMPLETED = (
    (10.0, "setup", 0),
    (10.1, "bulk", 0),
    (10.1, "bulk", 1),
    (12.0, "dirty", 1),
    (12.0, "dirty", 2),
    (13.0, "frozen", 2),
    (13.002, "frozen", 3),
    (13.010, "committed", 3),
    (13.0175, "completed", 3),
)


def test_a_record_tells_phases_and_passes_by_the_time_since_it_began() -> None:
    """And nothing before a migration has a phase."""
    kept = History()
    fake = Fake()
    begin(kept, fake)
    kept.note(fake, 5.0)  # type: ignore[arg-type]
    assert kept.records(5.0) == []
    kept = History()
    run(kept, *COMPLETED)
    (record,) = kept.records(20.0)
    assert [step.phase for step in record.phases] == ["setup", "bulk", "dirty", "frozen", "committed", "completed"]
    assert [round(step.at_ms) for step in record.phases] == [0, 100, 2000, 3000, 3010, 3018]
    assert [(step.pass_, round(step.at_ms)) for step in record.passes] == [(1, 100), (2, 2000), (3, 3002)]
    assert record.parameters == PARAMETERS
    assert (record.peer, record.info) == ("tcp:10.0.0.2:4444", kept.records(99.0)[0].info)


def test_the_parts_of_the_freeze_add_up() -> None:
    """From the closed gate to the take-over, without a gap: the downtime that was measured."""
    kept = History()
    run(kept, *COMPLETED)
    (record,) = kept.records(20.0)
    spans = freeze(record)
    assert [round(span.end_ms - span.start_ms, 1) for span in spans] == [2.0, 8.0, 1.5]
    assert spans[-1].end_ms - spans[0].start_ms == pytest.approx(record.info.x_fusemig.frozen_ms)  # type: ignore[union-attr]
    assert [span.end_ms for span in spans[:-1]] == [span.start_ms for span in spans[1:]]
    assert [span.name for span in phases(record)] == ["setup", "bulk", "dirty", "frozen", "committed"]


def test_whatever_a_migration_does_its_record_stays_small() -> None:
    """A thousand passes, switchovers that fail, and hours of samples: first and last are kept, in order."""
    kept = History()
    fake = run(kept, (0.0, "setup", 0), (0.0, "bulk", 1))
    now = 0.0
    for n_pass in range(2, 1000):
        now += 0.5
        fake.n_pass = n_pass
        fake.phase = MigrationPhase.FROZEN if n_pass % 5 == 0 else MigrationPhase.DIRTY
        kept.note(fake, now)  # type: ignore[arg-type]
    for _ in range(5000):
        now += 1.0
        kept.tick(now)
    (record,) = kept.records(now)
    for steps, limit in (
        (record.phases, history.MAX_PHASES),
        (record.passes, history.MAX_PASSES),
        (record.samples, history.MAX_SAMPLES),
    ):
        times = [step.at_ms for step in steps]
        assert limit // 2 - 1 <= len(times) <= limit
        assert times == sorted(times)
        assert times[0] == 0.0
    assert record.passes[-1].pass_ == 999
    assert record.samples[-1].at_ms > 0.95 * now * 1000
    half = sum(step.at_ms < now * 1000 / 2 for step in record.samples)
    assert half > len(record.samples) / 4  # they are as dense at its beginning as at its end
    assert len(msgspec.json.encode(record)) < 100_000


def test_the_last_migrations_are_kept_and_what_is_over_is_not_looked_at() -> None:
    """The oldest record goes; one that was let go of stays as it was."""
    kept = History()
    for n in range(history.MAX_MIGRATIONS + 3):
        fake = run(kept, (float(n), "setup", 0), (n + 0.5, "failed", 0))
        fake.error = "changed later"
        kept.end(fake)  # type: ignore[arg-type]
        kept.note(fake, n + 0.6)  # type: ignore[arg-type]
    records = kept.records(100.0)
    assert len(records) == history.MAX_MIGRATIONS
    assert all(record.info.error_desc is msgspec.UNSET for record in records)
    assert all(len(record.samples) == 1 for record in records)


def test_what_a_migration_held_is_not_kept_with_its_record() -> None:
    """Its maps and digests may be large: the next one of that side takes its place."""
    kept = History()
    fake = run(kept, *COMPLETED)
    gone = weakref.ref(fake)
    del fake
    run(kept, (50.0, "setup", 0))
    gc.collect()
    assert gone() is None
    assert len(kept.records(60.0)) == 2


def test_a_migration_that_was_in_doubt_is_settled_in_its_record() -> None:
    """It is not over for good: the owner may be found out much later."""
    kept = History()
    fake = run(kept, (0.0, "setup", 0), (1.0, "committed", 2), (11.0, "in-doubt", 2))
    kept.tick(500.0)
    fake.phase = MigrationPhase.COMPLETED
    kept.note(fake, 3600.0)  # type: ignore[arg-type]
    assert [step.phase for step in kept.records(3601.0)[0].phases][-2:] == ["in-doubt", "completed"]


def test_what_a_predecessor_began_counts_from_its_beginning() -> None:
    """A successor's record of it starts with the time that was already spent."""
    kept = History()
    fake = Fake()
    fake.began_s = 60.0
    begin(kept, fake)
    fake.phase = MigrationPhase.SETUP
    kept.note(fake, 1000.0)  # type: ignore[arg-type]
    assert kept.records(1000.0)[0].phases[0].at_ms == pytest.approx(60_000)


class Reader(HTMLParser):
    """Reads a page as a browser would: tags that are closed, text, and what would be loaded or run."""

    VOID: ClassVar = {"meta", "link", "br", "input"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            assert name != "style"
            if name in ("src", "href"):
                self.loads.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(record: MigrationRecord) -> Reader:
    page = report_page(record)
    reader = Reader(page.text)
    assert reader.open == []
    assert reader.loads == ["data:,"]
    assert "script" not in reader.tags
    assert "script-src" not in page.security_policy
    return reader


def test_a_report_has_everything_in_itself() -> None:
    """Outcome, timeline, downtime and its parts, passes, digests, parameters; nothing is loaded and nothing runs."""
    kept = History()
    run(kept, *COMPLETED)
    text = read(kept.records(20.0)[0]).text
    for expected in (
        "Migration of vda to tcp:10.0.0.2:4444",
        "proved it",
        "11.5 ms",
        "The limit was 300.0 ms",
        "last pass, syncs, digests",
        "digest, the same on both sides",
        "00ff",
        "no limit",
        "on the wire by then",
    ):
        assert expected in text, expected


@pytest.mark.parametrize("phase", ["failed", "cancelled", "in-doubt", "bulk"])
def test_a_report_of_what_did_not_complete_does_not_say_that_it_did(phase: str) -> None:
    """The outcome, the reason, and no claim of a proof."""
    kept = History()
    fake = run(kept, (0.0, "setup", 0), (1.0, "bulk", 1))
    fake.error = "disk full <b>there</b>"
    fake.phase = MigrationPhase(phase)
    kept.note(fake, 2.0)  # type: ignore[arg-type]
    text = read(kept.records(3.0)[0]).text
    assert phase in text
    assert "disk full <b>there</b>" in text  # as text, not as a tag: the reader has unescaped it
    assert "proved it" not in text
    assert "same on both sides" not in text


def test_names_in_a_report_are_text_whatever_they_are() -> None:
    """What a peer, a person or a file chose is never a tag; the page's data is whole."""
    kept = History()
    fake = Fake()
    fake.names = ["</pre></details><script>alert(1)</script>", '"><img src=x>']
    begin(kept, fake, peer="<script>alert(2)</script>")
    for now, phase in ((0.0, "setup"), (1.0, "bulk"), (2.0, "failed")):
        fake.phase = MigrationPhase(phase)
        kept.note(fake, now)  # type: ignore[arg-type]
    (record,) = kept.records(3.0)
    reader = read(record)
    assert "img" not in reader.tags
    found = re.search(r"\{.*\}", reader.text.partition("Everything, as data")[2], re.DOTALL)
    assert found is not None
    assert msgspec.json.decode(found[0], type=schema.MigrationRecord) == record


def test_many_passes_are_shortened() -> None:
    """The first and the last are shown, and how many are not."""
    kept = History()
    run(kept, (0.0, "setup", 0), *((n / 10, "dirty" if n > 1 else "bulk", n) for n in range(1, 100)))
    text = read(kept.records(20.0)[0]).text
    assert "75 more in the data below" in text


def test_a_record_survives_its_way_through_json() -> None:
    """As `report --json` writes it and `report FILE` reads it."""
    kept = History()
    run(kept, *COMPLETED)
    (record,) = kept.records(20.0)
    raw: Any = msgspec.to_builtins(record)
    assert msgspec.convert(raw, schema.MigrationRecord) == record


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"not json", "is no file that"),
        (b"\xff\xfe", "is no file that"),
        (b"[]", "is no file that"),
        (b'{"began": 1}', "is no file that"),
        (b'{"began": 1, "peer": "", "phases": [], "passes": [], "samples": [], "info": {}}', "lacks x-fusemig"),
        (b"", "remembers no migration"),
    ],
)
async def test_a_file_that_is_no_record_is_said_to_be_none(tmp_path: Path, content: bytes | None, says: str) -> None:
    """Whatever is in it; and nothing is written."""
    file, out = tmp_path / "records", tmp_path / "out.html"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FusemigError, match=says):
        await report_command(ReportRequest(target=file, output=out, migration="", as_json=False))
    assert not out.exists()


async def test_one_record_of_a_file_is_chosen_by_its_session(tmp_path: Path) -> None:
    """By how it begins; one that is not there is refused, and so is a place that cannot be written."""
    kept = History()
    run(kept, *COMPLETED)
    file, out = tmp_path / "records", tmp_path / "out.html"
    file.write_bytes(msgspec.json.encode(kept.records(20.0)[0]) + b"\n\n")
    await report_command(ReportRequest(target=file, output=out, migration="5e55", as_json=False))
    assert "proved it" in out.read_text()
    await report_command(ReportRequest(target=file, output=out, migration="", as_json=True))
    assert msgspec.json.decode(out.read_bytes(), type=schema.MigrationRecord) == kept.records(20.0)[0]
    for output, migration, says in ((out, "f", "no migration f"), (tmp_path, "", "choose another -o")):
        with pytest.raises(FusemigError, match=says):
            await report_command(ReportRequest(target=file, output=output, migration=migration, as_json=False))
