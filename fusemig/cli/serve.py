"""``fusemig serve``."""

from __future__ import annotations

import gc
from pathlib import Path

import trio

from fusemig.daemon import Daemon, ServeOptions
from fusemig.errors import ConfigError
from fusemig.fuse.lanes import Lane
from fusemig.migration.arrival import IncomingWire
from fusemig.served import DiskSpec


async def serve_command(
    mountpoint: Path,
    disks: tuple[str, ...],
    control: Path,
    incoming: str | None,
    wire: str,
    read_only: tuple[str, ...],
    state_dir: Path | None,
    allow_other: bool,
    lane: str,
    lane_threads: int | None,
    cache: str,
) -> None:
    """Serve until SIGTERM, SIGINT, ``quit`` or an unmount from outside.

    Raises:
        FusemigError: it could not be started.
    """
    if wire != "auto" and incoming is None:
        raise ConfigError(f"--wire {wire} says what --incoming takes: add --incoming URI, or leave it out")
    specs = _parse_disks(disks, read_only)
    if state_dir is not None:
        await trio.Path(state_dir).mkdir(parents=True, exist_ok=True)
    gc.freeze()  # what is loaded by now stays: the collector need not look at it again while guests wait
    options = ServeOptions(
        mountpoint,
        specs,
        control,
        incoming,
        IncomingWire(wire),
        state_dir,
        allow_other,
        Lane(lane),
        lane_threads,
        write_back=cache == "writeback",
    )
    await Daemon(options).run()


def _parse_disks(disks: tuple[str, ...], read_only: tuple[str, ...]) -> tuple[DiskSpec, ...]:
    specs = []
    for text in disks:
        name, separator, path = text.partition("=")
        if not separator or not name or not path:
            raise ConfigError(f"--disk {text}: write NAME=PATH, such as vda=/var/lib/vm/vda.img")
        specs.append(DiskSpec(name, Path(path).absolute(), name in read_only))
    names = {spec.name for spec in specs}
    for name in read_only:
        if name not in names:
            raise ConfigError(
                f"--readonly {name}: there is no --disk {name}=PATH; disks are {', '.join(sorted(names))}"
            )
    return tuple(specs)
