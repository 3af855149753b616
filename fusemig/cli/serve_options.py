"""`fusemig serve` and its options; what it does is `fusemig.cli.serve`'s."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from fusemig.cli.config_file import ConfiguredCommand
from fusemig.cli.exits import EXIT_CODES, fail
from fusemig.cli.logs import LEVELS, set_up_logs
from fusemig.cli.parameters import Mountpoint
from fusemig.errors import FusemigError


@click.command(cls=ConfiguredCommand)
@click.argument("mountpoint", type=Mountpoint())
@click.option(
    "--disk",
    "disks",
    multiple=True,
    required=True,
    metavar="NAME=PATH[,base=BASE]",
    help="Serve PATH as NAME; with a base, as an overlay over it.",
)
@click.option("--control", type=click.Path(path_type=Path), required=True, help="Control socket (QMP), mode 0600.")
@click.option("--incoming", metavar="URI", help="Wait for disks at tcp:HOST:PORT, unix:PATH, or defer to QMP.")
@click.option(
    "--wire",
    type=click.Choice(["auto", "native", "qemu"]),
    default="auto",
    show_default=True,
    help="Stream format that --incoming takes.",
)
@click.option("--readonly", "read_only", multiple=True, metavar="NAME", help="Serve this disk read-only.")
@click.option("--state-dir", type=click.Path(path_type=Path, file_okay=False), help="Keep epoch files here.")
@click.option("--allow-other", is_flag=True, help="Let other users use the mount.")
@click.option(
    "--lane",
    type=click.Choice(["auto", "data", "pyfuse3"]),
    default="auto",
    show_default=True,
    help="How I/O is served.",
)
@click.option(
    "--lane-threads", type=click.IntRange(1, 64), help="Threads of the data lane (default: cores, at most 2)."
)
@click.option(
    "--cache",
    type=click.Choice(["through", "writeback"]),
    default="through",
    show_default=True,
    help="writeback: the kernel acknowledges buffered writes before fusemig has seen them; only fsync or O_SYNC makes "
    "them known and durable, also to a migration. Writes it still holds at the switchover fail with EROFS when synced.",
)
@click.option(
    "--detect-zeroes",
    type=click.Choice(["off", "on", "unmap"]),
    default="off",
    show_default=True,
    help="What writes of zeros to whole blocks become: writes, cheap zeroings, or holes.",
)
@click.option(
    "--allow-guest-commands", is_flag=True, help="Run the --pause-command and --resume-command that `migrate` names."
)
@click.option(
    "--tls-creds",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="TLS only. DIR has ca-cert.pem, perhaps ca-crl.pem; server-cert.pem and server-key.pem for --incoming; "
    "client-cert.pem and client-key.pem to send.",
)
@click.option(
    "--tls-authz", multiple=True, metavar="IDENTITY", help="Admit the source with this name in its certificate."
)
@click.option("--insecure", is_flag=True, help="Let plain text cross the network, and anybody there send disks.")
@click.option("--metrics", metavar="URI", help="Answer Prometheus at tcp:127.0.0.1:PORT or unix:PATH, path /metrics.")
@click.option("--metrics-insecure", is_flag=True, help="Let other hosts read the metrics, in plain text.")
@click.option("--web", metavar="URI", help="Show the disks and their migration in a browser, at tcp:127.0.0.1:PORT.")
@click.option("--web-insecure", is_flag=True, help="Let other hosts look at that page, in plain text.")
@click.option(
    "--resilient", is_flag=True, help="Keep the mount when the daemon dies, and start another: guests only wait."
)
@click.option("--standby", is_flag=True, help="With --resilient: have the next daemon wait warm, for a shorter pause.")
@click.option(
    "--log-format",
    type=click.Choice(["console", "json"]),
    default="console",
    show_default=True,
    help="On stderr: lines for people, or JSON.",
)
@click.option("--log-level", type=click.Choice(list(LEVELS)), default="info", show_default=True, help="And above.")
def serve(log_format: str, log_level: str, **options: Any) -> None:
    """Serve disk images as files of MOUNTPOINT, in the foreground.

    Ready when MOUNTPOINT/NAME can be stat'ed. Unmounts on SIGTERM and SIGINT.
    """
    set_up_logs(log_format, log_level)
    if options["resilient"] or options["standby"]:
        from fusemig.cli.resilient import hold

        hold(options["mountpoint"], options["lane"], is_resilient=options["resilient"], has_standby=options["standby"])
    from fusemig.cli.serve import ServeRequest, begin, go_on, load_rest
    from fusemig.handover.agreement import answer
    from fusemig.succession.fdstore import STANDBY, open_store

    if STANDBY in os.environ:
        load_rest()
    if not answer(os.environ):  # a candidate of an upgrade
        sys.exit(EXIT_CODES["failed"])
    store = open_store(os.environ)  # where a standby waits
    try:
        estate = begin(ServeRequest(**options), store)
    except FusemigError as exc:
        sys.exit(fail(str(exc), exc.kind))
    sys.exit(go_on(estate))
