"""What is told of a guest's move in ``query-migrate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import UNSET

from fusemig.core.guest import GuestState
from fusemig.qmp import schema

if TYPE_CHECKING:
    from msgspec import UnsetType

    from fusemig.migration.guest import GuestAccount

_RUNS_AGAIN = (GuestState.AT_DESTINATION, GuestState.RETURNED)


def guest_info(account: GuestAccount | None, began_at: float) -> schema.GuestInfo | UnsetType:
    """Return the account of a guest whose migration began at ``began_at``, on trio's clock in seconds."""
    if account is None:
        return UNSET
    stood_at, runs_at = account.at(GuestState.STANDING_STILL), account.at(*_RUNS_AGAIN)
    return schema.GuestInfo(
        runtime=account.runtime,
        state=account.state.value,
        timeline=[
            schema.GuestStep(state=state.value, at_ms=round((time - began_at) * 1000, 1))
            for state, time in account.timeline
        ],
        downtime_ms=UNSET if stood_at is None or runs_at is None else round((runs_at - stood_at) * 1000, 1),
        error=account.error or UNSET,
    )
