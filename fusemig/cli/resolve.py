"""``fusemig resolve``: a person's word for who owns a disk, given to a daemon or, without one, to the epoch file."""

from __future__ import annotations

import stat
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import trio

from fusemig.control.client import open_control
from fusemig.daemon.disk_spec import DiskSpec, epoch_path
from fusemig.daemon.doubt import UNFENCED
from fusemig.disk.raw import RawDisk
from fusemig.errors import ConfigError, StateError
from fusemig.records.epoch import EpochFile, Ownership, Side, resolved

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ResolveRequest:
    """The options of ``fusemig resolve``."""

    target: Path
    disks: tuple[str, ...]
    ask: str | None
    owner: str | None
    is_other_fenced: bool
    state_dir: Path | None


async def resolve_command(request: ResolveRequest) -> None:
    """Resolve.

    Raises:
        FusemigError: it was not done, and why.
    """
    if (request.ask is None) == (request.owner is None):
        raise ConfigError("say who owns the disk (--owner), or where to ask that (--ask URI): one of the two")
    if request.ask is not None:
        await _ask(request, request.ask)
        return
    if not request.is_other_fenced:
        raise ConfigError(UNFENCED)
    if _is_socket(request.target):
        if request.state_dir is not None:
            raise ConfigError("--state-dir goes with an image; a daemon knows where its epoch files are: leave it out")
        if not request.disks:
            raise ConfigError("name the disks: --disk NAME, as often as there are disks")
        arguments = {"disks": list(request.disks), "owner": request.owner, "i-have-fenced-the-other": True}
        async with open_control(request.target) as control:
            await control.execute("x-fusemig-resolve", arguments)
        print(f"fusemig: {', '.join(request.disks)}: the {request.owner} owns it from now on", file=sys.stderr)
        return
    if request.disks:
        raise ConfigError("--disk goes with a control socket: an image is a disk by itself, so leave it out")
    await trio.to_thread.run_sync(_resolve_image, request)


async def _ask(request: ResolveRequest, uri: str) -> None:
    if not _is_socket(request.target):
        raise ConfigError("only a running daemon can ask: serve the image, which is safe, and name its control socket")
    if request.is_other_fenced or request.state_dir is not None:
        raise ConfigError("--ask takes nobody's word: leave --i-have-fenced-the-other and --state-dir out")
    if not request.disks:
        raise ConfigError("name the disks: --disk NAME, as often as there are disks")
    async with open_control(request.target) as control:
        await control.execute("x-fusemig-ask", {"disks": list(request.disks), "uri": uri})
    print(f"fusemig: {', '.join(request.disks)}: settled; see `fusemig status`", file=sys.stderr)


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError as exc:
        raise ConfigError(
            f"{path}: {exc.strerror}; name the control socket of a running daemon, or the image of a stopped one"
        ) from exc


def _resolve_image(request: ResolveRequest) -> None:
    path = request.target.absolute()
    owner = Side(request.owner)
    epoch_file = EpochFile(epoch_path(DiskSpec(path.name, path), request.state_dir))
    image = RawDisk(path.name, path, read_only=False)  # its lock: refused while a daemon serves it
    try:
        before = epoch_file.record
        try:
            record = resolved(before, owner)
        except StateError as exc:
            raise StateError(f"{epoch_file.path}: {exc}") from exc
        assert before is not None
        epoch_file.write(record)
    finally:
        image.close()
    log.warning(
        "resolved by hand",
        image=str(path),
        owner=owner.value,
        before=before.state.value,
        after=record.state.value,
        epoch=record.epoch,
        destination=record.peer,
        session=record.session,
    )
    what = "serve it to write it" if record.state is Ownership.OWNER else "it is not written here"
    print(f"fusemig: {path}: the {owner.value} owns it from now on; {what}", file=sys.stderr)
