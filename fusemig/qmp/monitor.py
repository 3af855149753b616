"""Lines of QEMU's human monitor, as `human-monitor-command` answers them: text for people, from the same structs.

Only what is asked for with `info` is there, and `help`. As in QEMU, a line that is not understood is answered with a
text that says so, and is no error of the command. Lines end with CR LF.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from msgspec import UNSET

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fusemig.qmp import block, schema

HELP: Final = (
    "info block [-v] [device] -- show info of one disk, or of all (-v: with the image)",
    "info migrate -- show the migration's status",
    "info status -- show whether guests may write",
)


class Queries(Protocol):
    """Where the answers come from."""

    def blocks(self) -> Sequence[block.BlockInfo]:
        """Return `query-block`."""

    def status(self) -> schema.StatusInfo:
        """Return `query-status`."""

    def migration(self) -> schema.MigrationInfo:
        """Return `query-migrate`."""


def answer(line: str, queries: Queries) -> str:
    """Return what the monitor says to a line."""
    words = line.split()
    if not words:
        return ""
    if words[0] in ("help", "?"):
        wanted = " ".join(words[1:])
        return _lines(text for text in HELP if text.startswith(wanted or "info"))
    if words[0] == "info" and words[1:2] in (["block"], ["migrate"], ["status"]):
        kind, rest = words[1], words[2:]
        if kind == "block":
            return _info_block(rest, queries.blocks())
        if rest:
            return _lines(
                [f"{kind}: extraneous characters at the end of line", f'Try "help info {kind}" for more information']
            )
        return _info_status(queries.status()) if kind == "status" else _info_migrate(queries.migration())
    if words == ["info"]:
        return _lines(HELP)
    return _lines([f"unknown command: '{' '.join(words[: 2 if words[0] == 'info' else 1])}'"])


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\r\n" for line in lines)


def _info_status(info: schema.StatusInfo) -> str:
    if info.running:
        return _lines(["VM status: running"])
    return _lines([f"VM status: {info.status}"])


def _info_block(arguments: list[str], blocks: Sequence[block.BlockInfo]) -> str:
    is_verbose = "-v" in arguments
    names = [word for word in arguments if word != "-v"]
    lines: list[str] = []
    for info in blocks:
        if names and info.device not in names:
            continue
        if lines:
            lines.append("")
        node = info.inserted
        if node is UNSET:
            lines.append(f"{info.device}: [not inserted]")
            continue
        read_only = ", read-only" if node.ro else ""
        lines.append(f"{info.device} ({node.node_name}): {node.file} ({node.drv}{read_only})")
        lines.append(f"    Cache mode:       {'writeback' if node.cache.writeback else 'writethrough'}")
        if is_verbose:
            image = node.image
            lines += [
                "",
                "Images:",
                f"image: {image.filename}",
                f"file format: {image.format}",
                f"virtual size: {_size(image.virtual_size)} ({image.virtual_size} bytes)",
                f"disk size: {_size(image.actual_size)}",
            ]
    return _lines(lines)


def _size(n_bytes: int) -> str:
    """Return a size as QEMU's size_to_str writes it, with three digits."""
    size, unit = float(n_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1000 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}"


def _info_migrate(info: schema.MigrationInfo) -> str:
    if info.status is UNSET:
        return ""
    reason = "" if info.error_desc is UNSET else f" ({info.error_desc})"
    lines = [f"Migration status: {info.status}{reason}"]
    for label, value in (
        ("total time", info.total_time),
        ("expected downtime", info.expected_downtime),
        ("downtime", info.downtime),
        ("setup", info.setup_time),
    ):
        if value is not UNSET:
            lines.append(f"{label}: {value} ms")
    if info.disk is not UNSET:
        disk = info.disk
        lines += [
            f"throughput: {disk.mbps:.2f} mbps",
            f"dirty sync count: {disk.dirty_sync_count}",
            f"transferred disk: {disk.transferred >> 10} kbytes",
            f"remaining disk: {disk.remaining >> 10} kbytes",
            f"total disk: {disk.total >> 10} kbytes",
        ]
    return _lines(lines)
