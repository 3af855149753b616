"""The daemon: disks, mount, control socket, incoming migrations and the outgoing one, in one trio program.

    Daemon.run
      ├ control socket (QMP)            fusemig.control.server with the table of fusemig.daemon.commands
      ├ metrics                         fusemig.net.http_server with the page of fusemig.daemon.metrics, if asked for
      ├ the web page                    fusemig.net.http_server with fusemig.daemon.web, if asked for
      ├ mount                           fusemig.fuse
      ├ Inbound                         the listener of --incoming, one task per connection: IncomingMigration
      ├ Migrator                        the OutgoingMigration, if one runs
      ├ supervise                       tells a service manager (fusemig.daemon.supervision)
      ├ Doubts                          asks what became of disks that were handed off
      ├ the watch over heat             ends an epoch every second (fusemig.core.heat)
      └ signals, unmount from outside   both ask for an orderly end

The end: a migration that can still be called off is cancelled, one that is committed runs out; then every gate is open
or read-only, so no write is parked when the file system is unmounted, and the images are synced and closed.
"""

from __future__ import annotations

import signal
from collections import defaultdict
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import structlog
import trio

from fusemig.control.server import EventHub, serve_control
from fusemig.core.heat import EPOCH_S
from fusemig.core.phase import MigrationPhase
from fusemig.daemon.announcer import Announcer
from fusemig.daemon.block_info import block_stats
from fusemig.daemon.chunk_map_info import ChunkMaps
from fusemig.daemon.commands import command_table
from fusemig.daemon.continuation import Continuation
from fusemig.daemon.dialer import Dialer
from fusemig.daemon.doubt import Doubts
from fusemig.daemon.estate import Estate
from fusemig.daemon.history import History
from fusemig.daemon.inbound import Inbound
from fusemig.daemon.info import Totals, daemon_status
from fusemig.daemon.inheritance import Inheritance
from fusemig.daemon.metrics import PATH, Metrics
from fusemig.daemon.migration_info import incoming_migration_info, outgoing_info
from fusemig.daemon.migrator import Migrator
from fusemig.daemon.pause import Pause
from fusemig.daemon.security import Security, check_address
from fusemig.daemon.supervision import ask_mount, supervise
from fusemig.daemon.upgrade import Upgrade
from fusemig.daemon.web import Web, token_path
from fusemig.disk.overlay_file import OverlayFile
from fusemig.disk.tracked import Gate
from fusemig.errors import DiskError, FusemigError
from fusemig.fuse.lanes import open_lane
from fusemig.fuse.preflight import MountOptions
from fusemig.net.http_server import Site, serve_http
from fusemig.net.listener import listening
from fusemig.net.transport import parse_uri
from fusemig.qmp import schema
from fusemig.succession.fdstore import FdStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from fusemig.daemon.serve_options import ServeOptions
    from fusemig.daemon.served import ServedDisk
    from fusemig.fuse.lanes import AnyMount
    from fusemig.migration.incoming import IncomingMigration
    from fusemig.migration.outgoing import OutgoingMigration
    from fusemig.net.listener import Listener

Served = TypeVar("Served")

log = structlog.get_logger(__name__)


class Daemon:
    """A serving daemon; `run` is its life."""

    def __init__(self, options: ServeOptions, estate: Estate | None = None) -> None:
        """Keep the options, and what `run` closes in the end: an ``estate`` that a successor has opened already."""
        self.options = options
        self.estate = Estate(options, FdStore()) if estate is None else estate
        self.store = self.estate.store
        self.disks = self.estate.disks
        self.chunk_maps: defaultdict[str, ChunkMaps] = defaultdict(ChunkMaps)
        """Of the disks that somebody looked at, by name; not in them, because trio is loaded later than they are."""
        self.security = Security(
            options.tls,
            options.tls_identities,
            client=options.tls_client,
            unloaded=options.tls_unloaded,
            is_destination=options.incoming is not None,
            is_insecure=options.is_insecure,
        )
        self.events = EventHub(lambda: schema.MigrationCapability.EVENTS in self.migrator.capabilities)
        self.pause = Pause(self.disks.values(), self._push_out)
        announcer = Announcer(self.events, self.pause)
        self.totals = Totals()
        self.history = History()
        self.dialer = Dialer(self.security)
        self.migrator = Migrator(
            self.disks,
            self.pause,
            self.security,
            self.dialer,
            announcer,
            self._count_requests,
            self._show_outgoing,
            self._note_outgoing_over,
            self._note_outgoing_change,
            is_destination=options.incoming is not None,
        )
        self.inbound = Inbound(
            self.disks,
            options.incoming,
            options.wire,
            self.security,
            announcer,
            self._push_out,
            self._show_size,
            self._note_incoming_phase,
            self._note_incoming_over,
            self.store,
        )
        self.continuation = Continuation(self.migrator, self.disks, self.security, self.dialer)
        self.doubts = Doubts(self.disks, self.dialer.dial, self.continuation.settled)
        self.shown: OutgoingMigration | IncomingMigration | None = None
        """What ``query-migrate`` tells of: the last one that began, but an outgoing one until it is over."""
        self.mount: AnyMount | None = None
        self.metrics: Listener | None = None
        """Where metrics are asked for."""
        self.web: Web | None = None
        """The web page, if one is served."""
        self.stop_reason = ""
        self.inheritance = Inheritance(self)
        self.upgrade = Upgrade(self)
        self._control_scope = trio.CancelScope()
        self._control_ended = trio.Event()
        self._ready = trio.Event()
        self._stop = trio.Event()

    async def run(self) -> None:
        """Serve until asked to stop; on return nothing is mounted, listening or open.

        Raises:
            FusemigError: it could not be started, and why.
        """
        with closing(self.store), self.estate:
            try:
                await self.security.load()  # what a migration that is taken up needs
                await self.inheritance.restore()
                await self._serve()
            except BaseException as exc:
                self.estate.give_up(exc)
                if isinstance(exc, BaseExceptionGroup):
                    raise _most_telling(exc) from exc
                raise

    async def _serve(self) -> None:
        # Heard from before the mount until after it, so that no signal ends us with the mount left behind.
        if not self.options.heeds_signals:
            await self._serve_until_stopped(None)
            return
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            await self._serve_until_stopped(signals)

    async def _serve_until_stopped(self, signals: AsyncIterator[int] | None) -> None:
        async with trio.open_nursery() as control:
            if signals is not None:
                control.start_soon(self._watch_signals, signals)
            # Both sockets exist before the files of the mount do, so whoever waits for a file finds them.
            await control.start(self._serve_control)
            if self.options.metrics is not None:
                await control.start(self._serve_metrics, self.options.metrics)
            if self.options.web is not None:
                await control.start(self._serve_web, self.options.web)
            options = self.options
            mount_options = MountOptions(allow_other=options.allow_other, write_back=options.write_back)
            async with (
                self.inbound.listening(),
                open_lane(
                    options.lane,
                    options.mountpoint,
                    self.estate.exports,
                    mount_options,
                    options.lane_threads,
                    self.estate.kept,
                    self.estate.service,
                ) as self.mount,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(self._watch_mount)
                nursery.start_soon(
                    supervise, self.store.notifier, partial(daemon_status, self), partial(ask_mount, options.mountpoint)
                )
                nursery.start_soon(self.doubts.watch)
                nursery.start_soon(self.security.load_later)
                nursery.start_soon(self._watch_heat)
                nursery.start_soon(self._prove_bases)
                await nursery.start(self.migrator.run)
                await self.inheritance.take_up()
                await nursery.start(self.inbound.run)
                self.inheritance.keep()
                self._ready.set()
                self.store.ready()
                log.info("serving", mountpoint=str(self.options.mountpoint), disks=sorted(self.disks))
                try:
                    await self._stop.wait()
                    if self.upgrade.is_agreed:
                        self._control_scope.cancel()
                        await self._control_ended.wait()
                        await self.upgrade.leave()
                finally:
                    with trio.CancelScope(shield=True):
                        await self._wind_down()
                nursery.cancel_scope.cancel()
            control.cancel_scope.cancel()

    @asynccontextmanager
    async def _beside(self, what: str, opened: AbstractAsyncContextManager[Served]) -> AsyncIterator[Served | None]:
        """Open what is served beside the disks; None if it cannot be and guests wait: they do not for a picture."""
        async with AsyncExitStack() as stack:
            served = None
            try:
                served = await stack.enter_async_context(opened)
            except FusemigError as exc:
                if not self.store.has_mount:
                    raise
                log.error(what, reason=str(exc))
            yield served

    async def _serve_metrics(self, uri: str, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with self._beside("no metrics are answered", self._open_metrics(uri)) as self.metrics:
            task_status.started()
            if self.metrics is None:
                return
            page = Metrics(
                partial(daemon_status, self), lambda: [block_stats(served) for served in self.disks.values()]
            ).page
            log.info("answering Prometheus", uri=str(self.metrics.uri), path=PATH)
            site = Site({PATH: page}, entrance=PATH, has_any_name=self.options.are_metrics_public)
            await serve_http(self.metrics, site)

    @asynccontextmanager
    async def _open_metrics(self, text: str) -> AsyncIterator[Listener]:
        uri = parse_uri(text)
        check_address("--metrics", uri, is_insecure=self.options.are_metrics_public)
        async with listening(uri) as listener:
            yield listener

    async def _serve_web(self, uri: str, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with self._beside("the page is not shown", self._open_web(uri)) as self.web:
            task_status.started()
            if self.web is None:
                with suppress(OSError):
                    token_path(self.options.control).unlink(missing_ok=True)  # the predecessor's, of no use any more
                return
            log.info("showing itself", page=self.web.address, token=str(self.web.token_path))
            await self.web.run()

    @asynccontextmanager
    async def _open_web(self, text: str) -> AsyncIterator[Web]:
        uri = parse_uri(text)
        check_address("--web", uri, is_insecure=self.options.is_web_public)
        async with listening(uri) as listener:
            with Web(self, listener) as web:
                yield web

    async def _serve_control(self, task_status: trio.TaskStatus[None]) -> None:
        with self._control_scope:
            await serve_control(
                self.options.control, command_table(self), self.events, self.store, task_status=task_status
            )
        self._control_ended.set()

    async def wait_ready(self) -> None:
        """Wait until migrations can be started: the control socket is there before the mount is whole."""
        await self._ready.wait()

    async def _watch_signals(self, signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            self.stop("host-signal")

    async def _watch_mount(self) -> None:
        assert self.mount is not None
        await self.mount.wait_unmounted()
        self.stop("unmounted")

    async def _watch_heat(self) -> None:
        while True:
            now = trio.current_time()
            for served in self.disks.values():
                if served.disk is not None:
                    counters = served.disk.statistics()
                    served.disk.heat.tick(now, counters.written_bytes, counters.n_writes)
            self.history.tick(now)
            await trio.sleep_until(now + EPOCH_S)

    async def _prove_bases(self) -> None:
        """Read, beside the guests, the bases that were written under a predecessor: one after the other."""
        for served in self.disks.values():
            image = served.image
            if not isinstance(image, OverlayFile) or image.is_base_proved:
                continue
            log.warning("its base was written while it was served; reading it", disk=served.name)
            try:
                await trio.to_thread.run_sync(image.prove_base, trio.from_thread.check_cancelled)
            except DiskError as exc:
                log.error("the base could not be read", disk=served.name, reason=str(exc))
            else:
                if image.io_error is not None:
                    log.error("the disk is not to be trusted", disk=served.name, reason=str(image.io_error))

    def stop(self, reason: str) -> None:
        """Ask for an orderly end; returns at once."""
        if not self._stop.is_set():
            self.stop_reason = reason
            causes = [cause for cause in schema.ShutdownCause if cause == reason]
            cause = causes[0] if causes else schema.ShutdownCause.HOST_SIGNAL  # QAPI knows no unmount
            self.events.emit("SHUTDOWN", schema.ShutdownEvent(reason=cause))
            self._stop.set()

    def give_way(self, info: schema.UpgradeInfo) -> None:
        """Leave the mount to the successor that was agreed with; returns at once."""
        self.events.emit("X_FUSEMIG_UPGRADE", info)
        self.stop_reason = "upgrade"
        self._stop.set()

    async def _wind_down(self) -> None:
        """Bring migrations to an end and the images to the disk, within deadlines."""
        if self._stop.is_set():
            self.store.ending()
        await self.migrator.wind_down()
        for served in self.disks.values():
            if served.loan is not None:
                served.loan.wants.close()  # what waits for its source is answered EIO
        for served in self.disks.values():
            if served.disk is not None and served.disk.gate is Gate.CLOSED:
                # What was stopped is not written again: its parked writes are answered EROFS.
                served.disk.set_gate(Gate.READ_ONLY if self.pause.is_on else Gate.OPEN)
        for served in self.disks.values():
            if served.disk is not None and not served.is_read_only:
                try:
                    await trio.to_thread.run_sync(served.disk.flush)
                except FusemigError as exc:
                    log.error("the image may not be durable", disk=served.name, reason=str(exc))

    async def _push_out(self, served: ServedDisk) -> None:
        if self.mount is not None:  # what is not mounted is not cached either
            await self.mount.invalidate(served.export)

    def _count_requests(self) -> int:
        assert self.mount is not None
        return self.mount.count_requests()

    def _show_outgoing(self, migration: OutgoingMigration) -> None:
        self.shown = migration
        uri = self.migrator.uri
        self.history.begin(migration, uri, partial(outgoing_info, migration), partial(self.migrator.asked, uri))

    def _note_outgoing_change(self) -> None:
        self.inheritance.keep_anyhow()
        if self.migrator.migration is not None:
            self.history.note(self.migrator.migration, trio.current_time())

    def _note_outgoing_over(self) -> None:
        assert self.migrator.migration is not None
        self.totals.outgoing_over(self.migrator.migration)
        self.doubts.look()

    def _note_incoming_phase(self, migration: IncomingMigration) -> None:
        if migration.phase is MigrationPhase.SETUP:
            if not self.migrator.is_migrating:
                self.shown = migration
            self.history.begin(migration, migration.peer, partial(incoming_migration_info, migration))
        self.history.note(migration, trio.current_time())

    def _note_incoming_over(self, migration: IncomingMigration) -> None:
        self.totals.incoming_over(migration)
        self.history.end(migration)

    async def _show_size(self, served: ServedDisk) -> None:
        assert self.mount is not None
        self.inheritance.keep_anyhow()
        await self.mount.invalidate(served.export, attributes_only=True)


def _most_telling(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that a person should see: ours if there is one, else the first."""
    ours, rest = group.split(FusemigError)
    error: BaseException | None = ours or rest
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return group if error is None else error
