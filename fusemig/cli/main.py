"""The commands and their options: the contract that scripts rely on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from fusemig import __version__
from fusemig.cli.config_file import VARIABLE, find
from fusemig.cli.exits import EXIT_CODES, fail, run
from fusemig.cli.logs import set_up_logs
from fusemig.cli.migrate_options import migrate
from fusemig.cli.output import print_json
from fusemig.cli.parameters import SOCKET, Rate, Time
from fusemig.cli.serve_options import serve
from fusemig.errors import ConfigError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fusemig")
def cli() -> None:
    """Serve VM disk images as files and move them to another host while they are being written."""


cli.add_command(serve)
cli.add_command(migrate)


@cli.command()
@SOCKET
@click.argument("uri", required=False)
@click.option(
    "--link", type=Rate(), metavar="RATE", help="What the way to URI carries, such as 100M (default: measure it)."
)
@click.option("--disk", "disks", multiple=True, metavar="NAME", help="Move this disk only; may be repeated.")
@click.option("--downtime-limit", type=Time(), metavar="TIME", help="Longest expected freeze, such as 300ms.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def estimate(socket: Path, uri: str | None, **options: Any) -> None:
    """Say what `migrate SOCKET URI` would take if it began now; nothing is started.

    The daemon watches what guests write all the time: the longer it has, the better the estimate. Without --link it
    sends to URI for a second to see how fast the way there is; with it, URI may be left out. A migration that
    would not converge is named with what would make it.
    """
    from fusemig.cli.estimate import EstimateRequest, estimate_command

    sys.exit(run(estimate_command, EstimateRequest(socket=socket, uri=uri, **options)))


@cli.command()
@SOCKET
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(socket: Path, as_json: bool) -> None:
    """Show the disks, the gates and the migration of the daemon at SOCKET."""
    from fusemig.cli.status import status_command

    sys.exit(run(status_command, socket, as_json))


@cli.command()
@click.argument("sockets", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="SOCKET...")
@click.option("--interval", type=Time(), default="1s", show_default=True, metavar="TIME", help="Look so often.")
@click.option("--once", is_flag=True, help="Show the present moment and end; so it does where stdout is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="Once, one JSON object a line for each socket.")
def top(sockets: tuple[Path, ...], **options: Any) -> None:
    """Show daemons live in the terminal: a map of each disk's chunks, rates, passes, what is to come; q quits.

    A daemon that goes away is waited for. Signs and colours can be told apart by everybody; NO_COLOR is heeded.
    """
    from fusemig.cli.top import TopRequest, top_command

    sys.exit(run(top_command, TopRequest(sockets=sockets, **options)))


@cli.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    default="-",
    metavar="FILE",
    help="Write there (default: stdout).",
)
@click.option("--migration", default="", metavar="ID", help="The one whose session begins so (default: the last).")
@click.option("--json", "as_json", is_flag=True, help="All of them as data, one JSON object a line.")
def report(target: Path, **options: Any) -> None:
    """Write a report of a migration as one HTML page: timeline, passes, rates, downtime, digests, outcome.

    TARGET is the control socket of a daemon, which remembers its last 16 migrations until it ends, or a file that
    `report SOCKET --json` wrote.
    """
    from fusemig.cli.report import ReportRequest, report_command

    sys.exit(run(report_command, ReportRequest(target=target, **options)))


@cli.command()
@SOCKET
def cancel(socket: Path) -> None:
    """Call the running migration off; the disks stay where they are."""
    from fusemig.cli.status import cancel_command

    sys.exit(run(cancel_command, socket))


@cli.command("continue")
@SOCKET
def continue_(socket: Path) -> None:
    """Let a migration that waits at pre-switchover switch over."""
    from fusemig.cli.status import continue_command

    sys.exit(run(continue_command, socket))


@cli.command()
@SOCKET
def postcopy(socket: Path) -> None:
    """Have the running migration hand over at once, whatever was sent; the destination fetches the rest.

    Until it has, both hosts hold the disks, and it cannot be cancelled (docs/postcopy.md).
    """
    from fusemig.cli.status import postcopy_command

    sys.exit(run(postcopy_command, socket))


@cli.command()
@SOCKET
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def upgrade(socket: Path, as_json: bool) -> None:
    """Have the fusemig that is installed now take over from the daemon at SOCKET; guests only wait a moment.

    The daemon must have been started with --resilient. It goes on as if nothing had happened if the new version cannot
    take over.
    """
    from fusemig.cli.upgrade import upgrade_command

    sys.exit(run(upgrade_command, socket, as_json))


@cli.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--disk", "disks", multiple=True, metavar="NAME", help="Of the daemon at a socket; may be repeated.")
@click.option("--ask", metavar="URI", help="Ask the destination there, and from now on.")
@click.option("--owner", type=click.Choice(["source", "destination"]), help="The side that owns it.")
@click.option("--i-have-fenced-the-other", "is_other_fenced", is_flag=True, help="The other side can write it no more.")
@click.option("--state-dir", type=click.Path(path_type=Path, file_okay=False), help="Where an image's epoch file is.")
def resolve(target: Path, **options: Any) -> None:
    """Say who owns a disk that is in doubt, or where to ask, or take back one that was handed off.

    With --ask, a destination that is at another address now is asked there, which settles it without anybody's word.

    TARGET is the control socket of a running daemon, or the image of a stopped one. A source that lost its destination
    in the moment of the hand-off asks it by itself; this is for a destination that is gone for good, and for wires
    without an answer. Nothing checks what you say: first make sure that the other side cannot write the disk.

    \b
    on the source       --owner source        handed-off, pledged, released, lending: writable here again
                        --owner destination   handed-off, pledged, lending: released
    on the destination  --owner destination   prepared: writable here
                        --owner source        prepared: waits for the source again
    """  # noqa: D301  (\b is click's mark for lines that stay as they are)
    set_up_logs()
    from fusemig.cli.resolve import ResolveRequest, resolve_command

    sys.exit(run(resolve_command, ResolveRequest(target=target, **options)))


@cli.command()
@click.option("--size", type=Rate(), default="256M", show_default=True, help="Size of the disk that moves.")
@click.option("--seconds", type=float, default=3.0, show_default=True, help="How long to write before it moves.")
@click.option("--directory", type=click.Path(path_type=Path), help="Where to put the images (default: temporary).")
@click.option(
    "--guest",
    type=click.Path(path_type=Path, file_okay=False),
    help="Move a running VM; DIRECTORY holds its vmlinuz and initrd (tools/demo --guest makes them).",
)
def demo(size: int, seconds: float, directory: Path | None, guest: Path | None) -> None:
    """Move a busy disk between two mounts on this machine and show what happened."""
    from fusemig.cli.demo import demo_command
    from fusemig.cli.demo_guest import demo_guest_command

    if guest is not None:
        sys.exit(run(demo_guest_command, size, seconds, directory, guest))
    sys.exit(run(demo_command, size, seconds, directory))


@cli.command()
@click.argument("socket", type=click.Path(path_type=Path), required=False)
@click.option("--peer", metavar="URI", help="Look whether a destination answers there; its log tells of the visit.")
@click.option(
    "--tls-creds", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Look at these credentials."
)
@click.option("--tls-hostname", metavar="NAME", help="Name in the peer's certificate, if it is not URI's host.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: subject, level, text, remedy.")
def doctor(as_json: bool, **options: Any) -> None:
    """Look at this machine, at the daemon at SOCKET and at a peer; say how to mend what is amiss.

    Without SOCKET it is the disks of fusemig.toml that are looked at. Exits 1 if something does not work.
    """
    from fusemig.cli.config import effective
    from fusemig.cli.doctor import DoctorRequest, doctor_command

    try:
        serve_values = {key: value for key, (value, _) in effective(find(None), cli)["serve"].items()}
    except ConfigError as exc:
        sys.exit(fail(str(exc), exc.kind))
    sys.exit(run(doctor_command, DoctorRequest(as_json=as_json, configured=serve_values, **options)))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what completes fusemig's commands and options in SHELL; docs/cli.md says where to put it."""
    from click.shell_completion import get_completion_class

    complete = get_completion_class(shell)
    assert complete is not None
    print(complete(cli, {}, "fusemig", "_FUSEMIG_COMPLETE").source())


@cli.group()
def config() -> None:
    """Look at fusemig.toml, which options may be written in; docs/cli.md describes it."""


@config.command("check")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def config_check(file: Path) -> None:
    """Exit 0 if every command would take FILE, else 2 with what is wrong."""
    from fusemig.cli.config import check

    try:
        check(file, cli)
    except ConfigError as exc:
        sys.exit(fail(str(exc), exc.kind))


@config.command("show")
@click.option(
    "--config", "file", type=click.Path(path_type=Path, dir_okay=False), envvar=VARIABLE, help="Instead of the usual."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object: value and origin by command and key.")
def config_show(file: Path | None, as_json: bool) -> None:
    """Show the values that commands would use, and where each is from: environment, file or default."""
    from fusemig.cli.config import as_toml, effective

    path = find(file)
    try:
        found = effective(path, cli)
        text = as_toml(path, found)
    except ConfigError as exc:
        sys.exit(fail(str(exc), exc.kind))
    if as_json:
        print_json(
            {
                "file": None if path is None else str(path),
                "commands": {
                    name: {key: {"value": value, "origin": origin} for key, (value, origin) in parameters.items()}
                    for name, parameters in found.items()
                },
            }
        )
        return
    print(text)


def main() -> None:
    """Run the command line; click's own usage errors become exit code 2."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as exc:
        if isinstance(exc, click.UsageError) and exc.ctx is not None:
            print(exc.ctx.get_usage(), file=sys.stderr)
        print(f"fusemig: {exc.format_message()}", file=sys.stderr)
        sys.exit(EXIT_CODES["usage"])
