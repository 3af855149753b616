"""B1 to B4: moving a disk that nobody writes. Every copy is compared byte for byte before it counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchlib import copiers, images, subject
from benchlib.copiers import CONVERT, LIMIT, MIRROR, NBDCOPY, QEMU_MIGRATE, Copier
from benchlib.measure import Contender, Goal, Row, Sample, run_case
from benchlib.settings import GIB, MIB
from benchlib.stage import Stage, file_system_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchlib.measure import Case
    from benchlib.settings import Settings


def _measure(  # one image, several ways to copy it
    settings: Settings,
    name: str,
    source: Path,
    ways: Sequence[Copier],
    goals: Sequence[Goal],
    *,
    on_disk: bool = False,
    is_allocated: bool = False,
    rate_of: int = 0,
) -> Case:
    size = source.stat().st_size
    amount = rate_of or size

    def contender(way: Copier) -> Contender:
        def once() -> Sample:
            with Stage(settings, on_disk=on_disk) as stage:
                destination = images.empty_image(stage.images / "copy", size)
                if is_allocated:
                    images.fill(destination)
                if on_disk:
                    images.drop_cache(source)
                sample = way.copy(stage, source, destination)
                images.check_equal(source, destination)
                extra = dict(sample.extra)
                extra["seconds"] = sample.value
                extra["allocated_ratio"] = images.allocated(destination) / max(images.allocated(source), 1)
                if "wall_s" in extra:
                    extra["wall_rate"] = amount / MIB / extra["wall_s"]
                return Sample(amount / MIB / sample.value, sample.source, sample.destination, extra)

        return Contender(way.name, way.kind, once, way.missing)

    return run_case(name, "MiB/s", [contender(way) for way in ways], settings.rounds(), goals=goals)


def row_b1(settings: Settings) -> Row:
    """An idle full disk."""
    row = Row("B1", "idle disk full of random data over loopback TCP, destination compared")
    peers = copiers.peers()
    ways = [*copiers.ours(settings), *(peers[name] for name in (QEMU_MIGRATE, MIRROR, NBDCOPY, CONVERT, LIMIT))]
    goals = [Goal(6, QEMU_MIGRATE), Goal(3, MIRROR), Goal(2, NBDCOPY), Goal(2, CONVERT), Goal(0.8, LIMIT)]
    with Stage(settings) as stage:
        source = images.random_image(stage.images / "source", settings.pick(2 * GIB, 512 * MIB))
        case = _measure(settings, f"{_size_of(source)}, tmpfs", source, ways, goals, is_allocated=True)
        row.cases.append(case)
        row.cases.append(case.derive(f"{case.name}, whole command", "MiB/s", "wall_rate"))
    if not settings.quick:
        with Stage(settings, on_disk=True) as stage:
            source = images.random_image(stage.images / "source", 1 * GIB)
            name = f"{_size_of(source)}, {file_system_of(settings.directory)}, source cache dropped"
            row.cases.append(_measure(settings, name, source, ways, (), on_disk=True))
    row.notes.append(
        "on tmpfs the destination holds other bytes before the copy: a virtual machine's first touch of fresh memory "
        "takes ten times as long as the copy, at random"
    )
    row.notes.append(
        "a migration's time is the engine's own total-time (QEMU: from the command to `completed`); 'whole command' "
        "includes the start of the `migrate` command, as it always does for nbdcopy and qemu-img"
    )
    return row


def row_b2(settings: Settings) -> Row:
    """A sparse disk."""
    row = Row("B2", "64 GiB sparse with 1 GiB of data in 1,000 pieces, tmpfs")
    peers = copiers.peers()
    ways = [*copiers.ours(settings), peers[NBDCOPY], peers[CONVERT]]
    with Stage(settings) as stage:
        source = images.sparse_image(stage.images / "source", 64 * GIB, 1000, 1072 << 10)
        amount = images.allocated(source)
        case = _measure(settings, "data moved", source, ways, (Goal(1.5, NBDCOPY),), rate_of=amount)
        row.cases.append(case)
        allocation = case.derive("destination's allocation", "of the source's", "allocated_ratio")
        allocation.higher_is_better = False
        allocation.goals = [Goal(1.01, at_most=True, percent=100)]
        row.cases.append(allocation)
    row.notes.append("nbdcopy is told that the destination is empty, which is its fastest way")
    return row


def row_b3(settings: Settings) -> Row:
    """Zeros that are allocated."""
    size = settings.pick(4 * GIB, 1 * GIB)
    row = Row("B3", "zeros, written and allocated, tmpfs")
    peers = copiers.peers()
    zeroing = f"{QEMU_MIGRATE}, zero-blocks"
    with Stage(settings) as stage:
        source = images.zero_image(stage.images / "source", size)
        ways = [*copiers.ours(settings), peers[zeroing]]
        row.cases.append(_measure(settings, _size_of(source), source, ways, (Goal(6, zeroing),)))
    return row


def row_b4(settings: Settings) -> Row:
    """What encryption costs."""
    row = Row("B4", "idle disk full of random data over TLS beside plain TCP, both ends on this machine, tmpfs")
    reason = subject.why_missing(settings)
    with Stage(settings) as stage:
        secrets = subject.make_secrets(stage.images / "secrets")

        def encrypted(inner: Stage, source: Path, destination: Path) -> Sample:
            return subject.copy(inner, source, destination, lane=settings.lanes[0], secrets=secrets)

        def plain(inner: Stage, source: Path, destination: Path) -> Sample:
            return subject.copy(inner, source, destination, lane=settings.lanes[0])

        source = images.random_image(stage.images / "source", settings.pick(2 * GIB, 512 * MIB))
        ways = [Copier("fusemig, TLS", "us", encrypted, reason), Copier("fusemig, plain", "peer", plain, reason)]
        row.cases.append(_measure(settings, _size_of(source), source, ways, (), is_allocated=True))
    return row


def _size_of(path: Path) -> str:
    size = path.stat().st_size
    return f"{size // GIB} GiB" if size % GIB == 0 else f"{size // MIB} MiB"
