"""Lenders: go on lending what a destination took over and does not have all of; for disks that nobody lends now.

A migration lends its disks itself. After it, or after a restart, the epoch files say that there is something to lend.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import trio

from fusemig.migration.lend import Lending, LentDisk
from fusemig.records.epoch import Ownership

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from fusemig.daemon.served import ServedDisk
    from fusemig.net.transport import ByteStream
    from fusemig.records.epoch import EpochRecord


class Lenders:
    """One task for each migration whose disks are lent."""

    def __init__(
        self,
        disks: Mapping[str, ServedDisk],
        dial: Callable[[EpochRecord], Awaitable[ByteStream]],
        on_over: Callable[[str], None],
        *,
        is_destination: bool,
    ) -> None:
        """Lend nothing yet.

        Args:
            disks: all disks of the daemon.
            dial: connects to the destination that a record names.
            on_over: called with the session of a migration when its destination has everything.
            is_destination: disks may come back into the images that they left.
        """
        self._disks = disks
        self._dial = dial
        self._on_over = on_over
        self._is_destination = is_destination

    def go_on(self, nursery: trio.Nursery) -> None:
        """Look for disks that are to be lent, and lend those that nobody does, in tasks of ``nursery``."""
        lent: dict[str, list[ServedDisk]] = {}
        for served in self._disks.values():
            record = served.epoch_file.record
            if record is not None and record.state is Ownership.LENDING and not served.busy:
                lent.setdefault(record.session, []).append(served)
        for disks in lent.values():
            for served in disks:
                served.busy = "its destination fetches from here what it lacks"
            nursery.start_soon(self._lend, disks)

    async def _lend(self, lent: Sequence[ServedDisk]) -> None:
        record = lent[0].epoch_file.record
        assert record is not None
        disks = [LentDisk(served.name, served.disk.image, served.epoch_file) for served in lent if served.disk]
        try:
            await Lending(disks, partial(self._dial, record), trio.to_thread.run_sync).run()
        finally:
            for served in lent:
                served.busy = ""
                served.look_again(is_destination=self._is_destination)
        self._on_over(record.session)
