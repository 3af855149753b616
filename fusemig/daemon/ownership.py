"""What a disk may do, and what may be received into it, by what its epoch file says; nothing here changes anything.

What a disk may do when the daemon starts is decided by that alone (`fusemig.records.epoch`):

    epoch file             plain serve                        serve --incoming
    none, image exists     writable                           waits for a source; image must match in size
    none, no image         refused                            waits for a source; image is created
    owner                  writable                           writable, and never overwritten
    incoming, prepared     refused: the image is incomplete   waits for a source
    released               read-only                          waits for a source (the disk may come back)
    handed-off, pledged    read-only: in doubt                read-only: in doubt
    lending                read-only, and fetched from        read-only, and fetched from
    borrowing              refused: its source cannot come    writable; what is missing is fetched from the source
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog

from fusemig.disk.tracked import Gate
from fusemig.errors import ConfigError, PeerRefusedError
from fusemig.records.epoch import DOUBTFUL, Ownership

if TYPE_CHECKING:
    from pathlib import Path

    from fusemig.daemon.disk_spec import DiskSpec
    from fusemig.disk.allocation import BaseIdentity
    from fusemig.records.epoch import EpochFile, EpochRecord
    from fusemig.wire.native import DiskOffer

log = structlog.get_logger(__name__)

RECEIVABLE: Final = frozenset({None, Ownership.INCOMING, Ownership.PREPARED, Ownership.RELEASED})
"""What an epoch file may say of a disk that a source may fill."""


def starting_gate(spec: DiskSpec, epoch_file: EpochFile, *, is_waiting: bool, is_incoming: bool) -> Gate:
    """Return the gate of a disk when the daemon starts; the log says why it is not open.

    Args:
        spec: the disk.
        epoch_file: its epoch file.
        is_waiting: a source may fill it.
        is_incoming: the daemon is a destination.

    Raises:
        ConfigError: the image is incomplete, and cannot be served so.
    """
    record = epoch_file.record
    if is_waiting or spec.is_read_only:
        return Gate.READ_ONLY
    if record is None or record.state is Ownership.OWNER:
        return Gate.OPEN
    if record.state is Ownership.BORROWING:
        if is_incoming:
            return Gate.OPEN
        raise ConfigError(
            f"image {spec.path} of disk '{spec.name}' is not all here: the rest is at {record.peer or 'its source'}"
            ", which comes to the address that it went to; serve it with --incoming again"
        )
    if record.state in (Ownership.INCOMING, Ownership.PREPARED):
        raise ConfigError(
            f"image {spec.path} of disk '{spec.name}' is incomplete: a migration from {record.peer or 'elsewhere'} "
            f"did not end; serve it with --incoming to receive it again, or delete the image and "
            f"{epoch_file.path}"
            + (
                "; it is complete, and if the source is gone for good see `fusemig resolve --help`"
                if record.state is Ownership.PREPARED
                else ""
            )
        )
    if record.state is Ownership.PLEDGED:
        log.warning(
            "read-only: the disk is pledged to a group, whose decision is looked for; see `fusemig status`",
            disk=spec.name,
            group=record.decision,
        )
    elif record.state is Ownership.HANDED_OFF:
        log.warning(
            "read-only: it is not known whether the destination took the disk; it is asked, see `fusemig status`",
            disk=spec.name,
            destination=record.peer,
        )
    else:
        lends = record.state is Ownership.LENDING
        log.warning(
            "read-only: the disk was handed off" + (", and its destination still fetches from here" * lends),
            disk=spec.name,
            destination=record.peer,
        )
    return Gate.READ_ONLY


def check_offer(
    offer: DiskOffer,
    *,
    record: EpochRecord | None,
    is_waiting: bool,
    size: int | None,
    base: tuple[Path, BaseIdentity] | None,
) -> None:
    """Raise `PeerRefusedError` unless a disk can be received as offered.

    Args:
        offer: the source's.
        record: what the disk's epoch file says here.
        is_waiting: a source may fill it.
        size: its size in bytes here; None where it has no image.
        base: what its image lies over here, if it is an overlay.
    """
    state = None if record is None else record.state
    if state in DOUBTFUL:
        raise PeerRefusedError(f"disk '{offer.name}' is in doubt there: resolve that first (`fusemig resolve`)")
    if record is not None and record.state is Ownership.PREPARED and record.image_id != offer.image_id:
        raise PeerRefusedError(
            f"disk '{offer.name}' is prepared there for the source of another one ({record.peer}), which may have "
            "handed it off: have that migrate again, or see `fusemig resolve` there"
        )
    if not is_waiting:
        raise PeerRefusedError(
            f"disk '{offer.name}' is owned there and would be overwritten; serve another image with --incoming"
        )
    if offer.is_resumed and (reason := _why_not_resumed(offer, record, has_image=size is not None)):
        raise PeerRefusedError(
            f"there is nothing of disk '{offer.name}' to go on with there: {reason}; migrate without --resume, which"
            " sends everything"
        )
    if record is not None and record.image_id == offer.image_id and record.epoch > offer.epoch + 1:
        raise PeerRefusedError(
            f"disk '{offer.name}' is known there in epoch {record.epoch}, and epoch {offer.epoch} was offered: "
            "the offered copy is out of date"
        )
    if offer.base is not None and base is not None:
        path, ours = base
        if (offer.base.size, offer.base.digest) != (ours.size, ours.digest):
            raise PeerRefusedError(
                f"disk '{offer.name}' lies over another base there: {path} has {ours.size} bytes and digest "
                f"{ours.digest}, the source's {offer.base.size} bytes and {offer.base.digest}; serve it over a copy of "
                "the source's base, or migrate with --no-incremental, which sends everything"
            )
    if size is not None and size != offer.size:
        raise PeerRefusedError(
            f"disk '{offer.name}' has {size} bytes there and {offer.size} bytes at the source; "
            "delete the image there, or make it the same size"
        )


def _why_not_resumed(offer: DiskOffer, record: EpochRecord | None, *, has_image: bool) -> str:
    if record is None or not has_image:
        return "no migration of it has begun"
    if record.state not in (Ownership.INCOMING, Ownership.PREPARED):
        return f"its image is no incomplete one, its epoch file says {record.state.value}"
    if record.image_id != offer.image_id:
        return "its image is another disk's"
    if record.epoch != offer.epoch + 1:
        return f"its image is of a migration in epoch {record.epoch - 1}, and this one is in epoch {offer.epoch}"
    return ""
