"""`fusemig migrate` and its options; what it does is `fusemig.cli.migrate`'s, or `fusemig.cli.group`'s."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from fusemig.cli.config_file import ConfiguredCommand
from fusemig.cli.exits import run
from fusemig.cli.parameters import SOCKET, Rate, Time


@click.command(cls=ConfiguredCommand)
@SOCKET
@click.argument("uri", required=False)
@click.argument("more", nargs=-1, metavar="[SOCKET=URI]...")
@click.option(
    "--group",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Move disks of several daemons of this host in one switchover, all or none: SOCKET=URI for each; DIR, on a "
    "disk and writable by all, keeps the decision (docs/groups.md).",
)
@click.option("--disk", "disks", multiple=True, metavar="NAME", help="Move this disk only; may be repeated.")
@click.option("--max-bandwidth", type=Rate(), metavar="RATE", help="Bytes per second, such as 100M; 0 is unlimited.")
@click.option("--downtime-limit", type=Time(), metavar="TIME", help="Longest expected freeze, such as 300ms.")
@click.option(
    "--mode",
    type=click.Choice(["precopy", "mirror", "postcopy"]),
    default="precopy",
    show_default=True,
    help="mirror: forward guests' writes as they happen (docs/convergence.md); postcopy: hand over at once, and have "
    "the rest fetched (docs/postcopy.md).",
)
@click.option("--mirror-lag", metavar="SIZE|TIME", help="How far it may be behind; 0: no write is answered earlier.")
@click.option("--auto-mirror/--no-auto-mirror", default=None, help="Mirror what passes cannot follow, or never do.")
@click.option(
    "--throttle-max",
    type=click.IntRange(0, 99),
    metavar="PERCENT",
    help="Slow guests' writes down by so much, if that is needed to end (default: 0, never).",
)
@click.option(
    "--wire",
    type=click.Choice(["native", "qemu"]),
    default="native",
    show_default=True,
    help="qemu: QEMU's own; it proves nothing.",
)
@click.option("--machine", metavar="TYPE", help="Machine type of the QEMU at URI, such as pc-q35-7.2.")
@click.option(
    "--order",
    type=click.Choice(["sequential", "heat"]),
    default="sequential",
    show_default=True,
    help="Of the bulk phase; heat: what guests write all the time is sent last.",
)
@click.option("--compress", metavar="zstd[:LEVEL]", help="Compress where that is faster; levels 1 (the default) to 19.")
@click.option(
    "--streams",
    type=click.IntRange(1, 16),
    default=1,
    show_default=True,
    metavar="N",
    help="Send over so many connections, 1 to 16: for links on which one alone is slow.",
)
@click.option(
    "--incremental/--no-incremental",
    default=None,
    help="Compare with the destination's older copy, and insist on a shared base. Without either, what provably is "
    "there is not sent; --no-incremental sends everything.",
)
@click.option("--resume", is_flag=True, help="Go on with a migration that was interrupted; sends what is missing.")
@click.option(
    "--reconnect",
    type=Time(),
    default="30s",
    show_default=True,
    metavar="TIME",
    help="Try so long without progress to get a lost connection back; 0 gives up at once.",
)
@click.option("--guest", metavar="qmp:PATH", help="Move the guest of this QEMU with its disks; its QMP socket.")
@click.option("--guest-destination", metavar="qmp:PATH", help="QMP socket of the QEMU that waits with -incoming.")
@click.option("--guest-uri", metavar="URI", help="Where that QEMU listens, if it does not say so itself.")
@click.option("--pause-command", metavar="COMMAND", help="Brings a guest of another runtime to a standstill.")
@click.option("--resume-command", metavar="COMMAND", help="Lets it run again, on the side that $FUSEMIG_SIDE names.")
@click.option("--command-deadline", type=Time(), metavar="TIME", help="For each of the two (default: 30s).")
@click.option(
    "--progress",
    type=click.Choice(["auto", "plain", "json", "none"]),
    default="auto",
    show_default=True,
    help="auto: a live display on a terminal, else plain lines.",
)
@click.option("--detach", is_flag=True, help="Start it and return.")
@click.option(
    "--tls-creds",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Use TLS; DIR, on the daemon's host, has ca-cert.pem, client-cert.pem, client-key.pem and perhaps ca-crl.pem.",
)
@click.option("--tls-hostname", metavar="NAME", help="Name in the destination's certificate, if it is not URI's host.")
@click.option("--insecure", is_flag=True, help="Let plain text cross the network.")
@click.pass_context
def migrate(
    ctx: click.Context, /, socket: Path, uri: str | None, more: tuple[str, ...], group: Path | None, **options: Any
) -> None:
    """Move disks of the daemon at SOCKET to the destination at URI; with --group, of several: SOCKET=URI for each.

    Exits 0 only when the destination has proved that it holds every byte and has taken over (with --wire qemu: when
    everything was sent). Ctrl-C cancels: the disks then stay here, and so does a guest that was to move with them.
    """
    from fusemig.cli.migrate import MigrateRequest, migrate_command

    if group is not None:
        from fusemig.cli.group import migrate_group_command

        texts = [str(socket), *([] if uri is None else [uri]), *more]
        request = MigrateRequest(socket=socket, uri="", **options)
        sys.exit(run(migrate_group_command, group.absolute(), texts, request))
    if uri is None:
        raise click.UsageError("Missing argument 'URI'.", ctx)
    if more:
        raise click.UsageError(f"'{more[0]}' is one argument too many: several daemons need --group DIR", ctx)
    sys.exit(run(migrate_command, MigrateRequest(socket=socket, uri=uri, **options)))
