"""Estate: what a daemon has before it does anything, and a successor before its guests are answered again.

    open     what a predecessor left: the state document, the mount
             images, with the gates that their epoch files allow, and the maps of what is written
             is that what the predecessor's guests know? then what it had stopped is stopped again
    adopt    the lane threads, and the kernel is asked to send again         guests are answered from here on

The guests of a daemon that was killed wait for `adopt`, so a successor comes there first and loads the rest of itself
then (`fusemig.cli.serve`). Rules:

1. Nothing here, nor what it imports, loads trio, pyfuse3, TLS, a wire or a migration: a test has the list.
2. A request is answered under the same rules as ever: `adopt` comes after everything in `open` that decides who may
   write, what is marked and what is held.
3. From `adopt` on lane threads use the images, and the mount is not ours to end: an error ends the process at once
   (`give_up`), as a kill would, and the next successor begins anew.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from fusemig.daemon.served import ServedDisk
from fusemig.errors import ConfigError
from fusemig.fuse.export import Exports
from fusemig.fuse.lane_service import LaneService
from fusemig.fuse.preflight import Lane
from fusemig.handover.state import Mount, ServedFile
from fusemig.handover.state_memory import NAME, StateMemory
from fusemig.succession.mount import KeptMount

if TYPE_CHECKING:
    from types import TracebackType

    from fusemig.daemon.serve_options import ServeOptions
    from fusemig.handover.state import State
    from fusemig.succession.fdstore import FdStore

_N_KEPT: Final = 6
"""What is kept beside the files of the disks: fuse, fuse-init, state, control, and where to listen for sources (of IPv4
and IPv6). A file is the image, its map of what is written, an overlay's map; each may have a mark beside it."""


class Estate:
    """The disks of one daemon, the memory of its predecessor, and the mount that it adopts."""

    def __init__(self, options: ServeOptions, store: FdStore) -> None:
        """Look into what ``store`` has of a predecessor, or have it keep an empty memory for a successor.

        Raises:
            StateError: what is in it cannot be read here.
        """
        self.options = options
        self.store = store
        self.exports = Exports()
        self.disks: dict[str, ServedDisk] = {}
        self.memory = _memory(store)
        self.found: State | None = None if self.memory is None else self.memory.read()
        """What the daemon before this one left."""
        self.kept: KeptMount | None = None
        """The mount, if it can outlive this process."""
        self.service: LaneService | None = None
        """What answers the guests of an adopted mount already."""
        self._images = ExitStack()
        self._is_open = False

    def __enter__(self) -> Self:
        """Open it, unless it is."""
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def open(self) -> None:
        """Open the disks as guests may find them, and take the mount that is to be adopted; idempotent.

        Raises:
            ConfigError: a disk cannot be served as asked, or guests know other files than these.
        """
        if self._is_open:
            return
        self._check_room()
        self._open_disks()
        self._compare()
        self._restore_times()
        if self.found is not None and self.found.is_stopped:
            for served in self.disks.values():
                served.set_held(is_held=True)
        if self.store.is_on or self.store.has_mount:
            self.kept = KeptMount(self.store, is_demanded=self.options.is_resilient)
        self._is_open = True

    def adopt(self) -> None:
        """Answer the guests of a predecessor's mount from now on; do nothing where there is none. After `open`.

        Raises:
            FuseUnavailableError: the kernel does not send again what was not answered.
        """
        if self.kept is None or self.kept.device is None or self.options.lane is Lane.PYFUSE3:
            return
        service = LaneService(self.kept.device, self.exports, self.options.lane_threads, self.kept)
        try:
            service.start()
        except BaseException as exc:
            self.kept.leave(exc)
            raise
        self.service = service

    def give_up(self, error: BaseException) -> None:
        """End this process because of an error, if guests are answered already and there will be a successor."""
        if self.service is not None and self.kept is not None:
            self.kept.leave(error)

    def close(self) -> None:
        """Close images and memory; what lives on in the store does so. Idempotent."""
        self._images.close()
        if self.memory is not None:
            self.store.release(NAME)
            self.memory.close()
            self.memory = None

    def _check_room(self) -> None:
        """See that all that a successor needs can be kept, before there are guests who rely on it."""
        n_files = sum(1 + (not disk.is_read_only) + (disk.base is not None) for disk in self.options.disks)
        self.store.reserve(n_files)
        room, needed = self.store.room, _N_KEPT + 2 * n_files
        if room is None or room >= needed or not self.store.is_on or self.store.has_mount:
            return
        step = (
            "serve fewer disks per daemon, or leave --resilient out"
            if self.options.is_resilient
            else f"set FileDescriptorStoreMax={needed} in the unit, or serve fewer disks per daemon"
        )
        raise ConfigError(
            f"{len(self.options.disks)} disks are too many for a mount that outlives its daemon: they need {needed} "
            f"descriptors kept, and there is room for {room}; {step}"
        )

    def _open_disks(self) -> None:
        options = self.options
        if not options.disks:
            raise ConfigError("no disk to serve: give at least one --disk NAME=PATH")
        for spec in options.disks:
            served = ServedDisk(
                spec,
                self.exports,
                options.state_dir,
                is_incoming=options.incoming is not None,
                store=self.store,
                known_size=0 if self.found is None else self.found.sizes.get(spec.name, 0),
                detect_zeroes=options.detect_zeroes,
            )
            self._images.callback(served.close)
            self.disks[served.name] = served
        if self.store.has_mount and self.store.untaken("image-"):
            raise ConfigError(
                f"an image that guests of {options.mountpoint} have open is not at its place any more: put back "
                "what was moved or replaced, or give the mount up"
            )

    def _compare(self) -> None:
        if self.found is None:
            return
        then, now = self.found.mount, self.mount()
        if now != then:
            raise ConfigError(
                f"the mount at {then.mountpoint} lives on and was made with other options "
                f"({difference(then, now)}): start `fusemig serve` with those, or unmount it first"
            )

    def _restore_times(self) -> None:
        if self.found is None or self.found.hints is None:
            return
        for name, times in self.found.hints.times.items():
            served = self.disks.get(name)
            if served is not None and served.image is not None:
                written_ns = served.image.stat().st_mtime_ns
                served.export.restore_times(times.atime_ns, times.mtime_ns, times.changed_ns, written_ns)

    def mount(self) -> Mount:
        """Return what guests know of the mount."""
        options = self.options
        return Mount(
            mountpoint=str(options.mountpoint.absolute()),
            files=tuple(
                ServedFile(
                    name=served.name,
                    inode=served.export.inode,
                    path=str(served.path),
                    base="" if served.base is None else str(served.base),
                    is_read_only=served.is_read_only,
                )
                for served in self.disks.values()
            ),
            is_write_back=options.write_back,
            is_allow_other=options.allow_other,
        )


def _memory(store: FdStore) -> StateMemory | None:
    """Return the memory that goes from daemon to daemon; None where nobody comes after this one."""
    inherited = store.take(NAME)
    if inherited is not None:
        return StateMemory(inherited)
    if not store.is_on:
        return None
    memory = StateMemory.create()
    store.keep(NAME, memory.fd)
    return memory


def difference(then: Mount, now: Mount) -> str:
    """Name what differs first, as it was."""
    if Path(then.mountpoint) != Path(now.mountpoint):
        return f"MOUNTPOINT {then.mountpoint}"
    for old, new in zip(then.files, now.files, strict=False):
        if old != new:
            return (
                f"--disk {old.name}={old.path}"
                + (f",base={old.base}" if old.base else "")
                + (f" --readonly {old.name}" if old.is_read_only else "")
            )
    if len(then.files) != len(now.files):
        return f"{len(then.files)} disks: {', '.join(file.name for file in then.files)}"
    if then.is_write_back != now.is_write_back:
        return f"--cache {'writeback' if then.is_write_back else 'through'}"
    return "with --allow-other" if then.is_allow_other else "without --allow-other"
