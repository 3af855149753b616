"""What `migrate` was asked about a guest, as the options of a runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType

from fusemig.errors import ConfigError
from fusemig.runtimes.command import DEFAULT_DEADLINE_S, CommandOptions, CommandRuntime
from fusemig.runtimes.qemu import QemuOptions, QemuRuntime

if TYPE_CHECKING:
    from fusemig.qmp.schema import Migrate
    from fusemig.runtimes.move import Runtime

GuestOptions = QemuOptions | CommandOptions


def guest_options(asked: Migrate, *, are_commands_allowed: bool) -> GuestOptions | None:
    """Return the options of the guest that moves with the disks; None if none does.

    Raises:
        ConfigError: they do not fit together, or commands are not allowed.
    """
    qemu = (asked.x_fusemig_guest, asked.x_fusemig_guest_destination, asked.x_fusemig_guest_uri)
    commands = (asked.x_fusemig_pause_command, asked.x_fusemig_resume_command, asked.x_fusemig_command_deadline)
    is_qemu, is_command = (any(value is not UNSET for value in values) for values in (qemu, commands))
    if is_qemu and is_command:
        raise ConfigError("a guest is moved by its QEMUs or by commands: give --guest or --pause-command, not both")
    if is_qemu:
        return _qemu_options(asked)
    return _command_options(asked, is_allowed=are_commands_allowed) if is_command else None


def _qemu_options(asked: Migrate) -> QemuOptions:
    source, destination, uri = asked.x_fusemig_guest, asked.x_fusemig_guest_destination, asked.x_fusemig_guest_uri
    if isinstance(source, UnsetType) or isinstance(destination, UnsetType):
        raise ConfigError("a guest moves from one QEMU to another: give --guest and --guest-destination")
    return QemuOptions(_socket(source), _socket(destination), None if isinstance(uri, UnsetType) else uri)


def _socket(text: str) -> Path:
    kind, _, path = text.partition(":")
    if kind != "qmp" or not path:
        raise ConfigError(f"guest '{text}': write qmp:PATH, the -qmp socket of its QEMU")
    if not path.startswith("/"):
        raise ConfigError(f"guest '{text}': give the absolute path; it is the daemon that connects to it")
    return Path(path)


def _command_options(asked: Migrate, *, is_allowed: bool) -> CommandOptions:
    pause, resume, deadline_ms = (
        asked.x_fusemig_pause_command,
        asked.x_fusemig_resume_command,
        asked.x_fusemig_command_deadline,
    )
    if isinstance(pause, UnsetType) or isinstance(resume, UnsetType):
        raise ConfigError("a guest that is paused must be resumed: give --pause-command and --resume-command")
    if not is_allowed:
        raise ConfigError(
            "this daemon runs no commands for the users of its control socket: start it with --allow-guest-commands"
        )
    deadline_s = DEFAULT_DEADLINE_S if isinstance(deadline_ms, UnsetType) else deadline_ms / 1000
    return CommandOptions(pause, resume, deadline_s)


def make_runtime(options: GuestOptions, session: str) -> Runtime:
    """Return the runtime of a guest that moves in migration ``session``."""
    return QemuRuntime(options) if isinstance(options, QemuOptions) else CommandRuntime(options, session)
