"""DiskSpec: a disk as the command line names it, and where what is kept of it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fusemig.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection


@dataclass(frozen=True)
class DiskSpec:
    """A disk as the command line names it."""

    name: str
    path: Path
    is_read_only: bool = False
    base: Path | None = None
    """What the image is an overlay over."""


def parse_disk(text: str, read_only: Collection[str]) -> DiskSpec:
    """Return what ``NAME=PATH[,base=BASE]`` means; ``read_only`` are the names of the disks that are.

    Raises:
        ConfigError: it is not written so.
    """
    name, separator, rest = text.partition("=")
    path, base_separator, base = rest.partition(",base=")
    if not separator or not name or not path:
        raise ConfigError(f"--disk {text}: write NAME=PATH, such as vda=/var/lib/vm/vda.img")
    if base_separator and not base:
        raise ConfigError(f"--disk {text}: name the base, such as vda=/var/lib/vm/vda.img,base=/var/lib/vm/golden.img")
    return DiskSpec(name, Path(path).absolute(), name in read_only, Path(base).absolute() if base else None)


def epoch_path(spec: DiskSpec, state_dir: Path | None) -> Path:
    """Return where the epoch file of a disk lies; raises `ConfigError` if that cannot be known."""
    return state_directory(spec, state_dir) / f"{spec.path.name}.fusemig"


def state_directory(spec: DiskSpec, state_dir: Path | None) -> Path:
    """Return where the epoch file lies: beside an image, but never beside a device, in a /dev that a reboot empties."""
    if state_dir is not None:
        return state_dir
    if spec.path.is_block_device():
        raise ConfigError(
            f"image {spec.path} of disk '{spec.name}' is a block device: what must outlive a reboot cannot lie beside "
            "it; name a directory for it with --state-dir"
        )
    return spec.path.parent
