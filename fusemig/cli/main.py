"""The commands and their options: the contract that scripts rely on."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from fusemig import __version__
from fusemig.cli.config_file import VARIABLE, ConfiguredCommand, find
from fusemig.cli.exits import EXIT_CODES, fail, run
from fusemig.cli.logs import LEVELS, set_up_logs
from fusemig.core.units import parse_duration, parse_size
from fusemig.errors import ConfigError, FusemigError


class _Rate(click.ParamType[int]):
    """Bytes per second, such as 100M."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ConfigError as exc:
            self.fail(str(exc), param, ctx)


class _Time(click.ParamType[float]):
    """Seconds, written as 300ms or 2s."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_duration(value)
        except ConfigError as exc:
            self.fail(str(exc), param, ctx)


class _Mountpoint(click.ParamType[Path]):
    """A path that is not looked at: if it is a mount to be taken over, nobody answers there yet (click.Path stats)."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return Path(value)


SOCKET = click.argument("socket", type=click.Path(path_type=Path))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fusemig")
def cli() -> None:
    """Serve VM disk images as files and move them to another host while they are being written."""


@cli.command(cls=ConfiguredCommand)
@click.argument("mountpoint", type=_Mountpoint())
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


@cli.command(cls=ConfiguredCommand)
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
@click.option("--max-bandwidth", type=_Rate(), metavar="RATE", help="Bytes per second, such as 100M; 0 is unlimited.")
@click.option("--downtime-limit", type=_Time(), metavar="TIME", help="Longest expected freeze, such as 300ms.")
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
    type=_Time(),
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
@click.option("--command-deadline", type=_Time(), metavar="TIME", help="For each of the two (default: 30s).")
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


@cli.command()
@SOCKET
@click.argument("uri", required=False)
@click.option(
    "--link", type=_Rate(), metavar="RATE", help="What the way to URI carries, such as 100M (default: measure it)."
)
@click.option("--disk", "disks", multiple=True, metavar="NAME", help="Move this disk only; may be repeated.")
@click.option("--downtime-limit", type=_Time(), metavar="TIME", help="Longest expected freeze, such as 300ms.")
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
@click.option("--interval", type=_Time(), default="1s", show_default=True, metavar="TIME", help="Look so often.")
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
@click.option("--size", type=_Rate(), default="256M", show_default=True, help="Size of the disk that moves.")
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


def print_json(value: Any) -> None:
    """Print one JSON object as a line of its own, at once."""
    print(json.dumps(value), flush=True)
