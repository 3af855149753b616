"""fusemig, driven through its command line as a user would.

fusemig serve MNT --disk NAME=PATH --control SOCK [--incoming tcp:127.0.0.1:PORT]
fusemig migrate SOCK tcp:HOST:PORT --progress json
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trustme

from benchlib import images
from benchlib.measure import BenchError, Sample
from benchlib.stage import file_system_of, free_port, is_listening, unmount

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from benchlib.measure import Usage
    from benchlib.program import Program
    from benchlib.settings import Settings
    from benchlib.stage import Stage

_READY_S = 30.0


def why_missing(settings: Settings) -> str:
    """Return why fusemig cannot be measured; empty if it can."""
    if shutil.which(settings.fusemig[0]) is None:
        return f"not installed: {settings.fusemig[0]}"
    try:
        done = subprocess.run(
            [*settings.fusemig, "serve", "--help"], check=False, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"`fusemig serve --help` failed: {error}"
    if done.returncode:
        return f"`fusemig serve --help` failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}"
    return ""


def side_name(lane: str | None) -> str:
    """Return the name that our side has in the tables."""
    return "fusemig" if lane is None else f"fusemig {lane} lane"


class Daemon:
    """One `fusemig serve`."""

    def __init__(
        self,
        stage: Stage,
        disks: Mapping[str, Path],
        *,
        lane: str | None = None,
        incoming: str = "",
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
        base: Path | None = None,
        goes_on: bool = False,
    ) -> None:
        """Start it and wait until it is ready; it ends with the stage.

        All disks are overlays over ``base``, if there is one; what an earlier daemon left beside them counts if it
        ``goes_on``.

        Raises:
            BenchError: it did not become ready.
        """
        self.mountpoint = stage.path("m")
        self.mountpoint.mkdir()
        self.control = stage.path("c")
        stage.defer(unmount, self.mountpoint)
        words = [*prefix, *stage.settings.fusemig, "serve", str(self.mountpoint), "--control", str(self.control)]
        for name, path in disks.items():
            for state in () if goes_on else path.parent.glob(f"{path.name}.fusemig*"):
                state.unlink()  # our own image, which an earlier round handed over
            words += ["--disk", f"{name}={path}" + (f",base={base}" if base else "")]
        words += ["--incoming", incoming, *_in_the_open(incoming)] if incoming else []
        words += ["--lane", lane] if lane else []
        words += options
        self.program: Program = stage.start(*words)
        self._last = self.mountpoint / list(disks)[-1]
        self.program.wait_ready(self._is_ready, _READY_S)
        port = incoming.rpartition(":")[2]
        if port.isdigit() and not prefix:
            self.program.wait_ready(lambda: is_listening(int(port)), _READY_S)

    def _is_ready(self) -> bool:
        with suppress(OSError):
            return file_system_of(self._last).startswith("fuse") and self._last.exists()
        return False

    def file(self, name: str = "disk") -> Path:
        """Return where a disk is mounted."""
        return self.mountpoint / name


def _in_the_open(uri: str) -> list[str]:
    """Return what allows plain text to an address that is not this host's own: the links here are."""
    return [] if uri.startswith(("tcp:127.", "unix:")) else ["--insecure"]


@dataclass
class Migration:
    """A `fusemig migrate` that was started."""

    program: Program
    started: float
    wall_s: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)

    def is_copying(self) -> bool:
        """Tell whether the bulk phase has begun."""
        return any(line.get("status") not in (None, "none", "setup") for line in self._lines())

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        for line in self.program.stdout.read_text().splitlines():
            with suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    lines.append(value)
        return lines

    def finish(self, timeout_s: float) -> Migration:
        """Wait for success.

        Raises:
            BenchError: it failed or took too long.
        """
        self.program.check(timeout_s)
        self.wall_s = time.monotonic() - self.started
        lines = self._lines()
        if not lines:
            raise BenchError("`migrate --progress json` printed no JSON object")
        self.report = lines[-1]
        return self

    @property
    def seconds(self) -> float:
        """The engine's own time, as QEMU gives it; the command's wall time if it does not say."""
        total_ms = self.report.get("total-time")
        return total_ms / 1000 if isinstance(total_ms, int | float) and total_ms > 0 else self.wall_s

    def number(self, *names: str) -> float | None:
        """Return the first member of the report that is there, at the top or under ``disk``."""
        for name in names:
            for place in (self.report, self.report.get("disk") or {}):
                if isinstance(place.get(name), int | float):
                    return float(place[name])
        return None

    @property
    def wire_bytes(self) -> float | None:
        """What went over the wire."""
        return self.number("x-fusemig-wire-bytes", "wire-bytes", "transferred")

    @property
    def bytes_dirtied(self) -> float | None:
        """What guests wrote in the meantime."""
        return self.number("x-fusemig-bytes-dirtied", "bytes-dirtied")


def start_migration(stage: Stage, source: Daemon, uri: str, *options: str) -> Migration:
    """Start a migration of everything that ``source`` serves."""
    words = [*stage.settings.fusemig, "migrate", str(source.control), uri, "--progress", "json"]
    words += [*_in_the_open(uri), *options]
    started = time.monotonic()
    return Migration(stage.start(*words), started)


class Pair:
    """A source and a destination, meters running."""

    def __init__(  # the ends' prefixes put them into network namespaces
        self,
        stage: Stage,
        source: Path,
        destination: Path,
        *,
        lane: str | None = None,
        host: str = "127.0.0.1",
        options: Sequence[str] = (),
        prefixes: tuple[Sequence[str], Sequence[str]] = ((), ()),
    ) -> None:
        """Serve ``source`` and make ``destination`` incoming, both as ``disk``; ``options`` are the destination's."""
        self.stage = stage
        self.uri = f"tcp:{host}:{free_port()}"
        self.source = Daemon(stage, {"disk": source}, lane=lane, prefix=prefixes[0])
        self.destination = Daemon(
            stage, {"disk": destination}, lane=lane, incoming=self.uri, options=options, prefix=prefixes[1]
        )
        self._meters = self.source.program.meter(), self.destination.program.meter()

    def start(self, *options: str) -> Migration:
        """Start migrating."""
        return start_migration(self.stage, self.source, self.uri, *options)

    def usage(self, migration: Migration) -> tuple[Usage, Usage]:
        """Return what each end cost since the pair was made; the `migrate` command counts for the source."""
        source, destination = (meter() for meter in self._meters)
        return source + migration.program.usage(), destination

    def stop(self) -> None:
        """End both daemons, the source first."""
        self.source.program.stop()
        self.destination.program.stop()


@dataclass(frozen=True)
class Secrets:
    """Credentials for one move over TLS."""

    source: Path
    destination: Path
    identity: str
    """Of the source, which the destination admits."""


def make_secrets(directory: Path) -> Secrets:
    """Have an authority sign both sides of a connection to 127.0.0.1; the layout is in docs/security.md."""
    authority, host = trustme.CA(), "source.example"
    for end, name in (("client", host), ("server", "127.0.0.1")):
        place = directory / end
        place.mkdir(parents=True)
        issued = authority.issue_cert(name, common_name=name)
        (place / "ca-cert.pem").write_bytes(authority.cert_pem.bytes())
        (place / f"{end}-key.pem").write_bytes(issued.private_key_pem.bytes())
        (place / f"{end}-cert.pem").write_bytes(b"".join(one.bytes() for one in issued.cert_chain_pems))
    return Secrets(directory / "client", directory / "server", f"DNS:{host}")


def copy(
    stage: Stage,
    source: Path,
    destination: Path,
    *,
    lane: str | None = None,
    secrets: Secrets | None = None,
    timeout_s: float = 120,
) -> Sample:
    """Move an idle disk and return the seconds; ``wall_s`` beside it is the whole `migrate` command.

    Raises:
        BenchError: it failed.
    """
    there = ["--tls-creds", str(secrets.destination), "--tls-authz", secrets.identity] if secrets else []
    here = ["--tls-creds", str(secrets.source)] if secrets else []
    pair = Pair(stage, source, destination, lane=lane, options=there)
    images.warm(source, destination)
    migration = pair.start(*here).finish(timeout_s)
    usages = pair.usage(migration)
    extra = {"wall_s": migration.wall_s}
    if (wire := migration.wire_bytes) is not None:
        extra["wire_bytes"] = wire
    pair.stop()
    return Sample(migration.seconds, *usages, extra)
