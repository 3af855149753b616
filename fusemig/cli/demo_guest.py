"""``fusemig demo --guest``: move a running VM between two QEMUs, and its disk between two mounts, on this machine.

    Linux ─ virtio disk ─ QEMU ─> source mount ═ native wire ═> destination mount <─ QEMU -incoming
                            └──────────── memory and devices, by QEMU itself ─────────────┘

The guest writes numbered records to its disk without pause and says on its console which of them are durable. What is
checked afterwards rests on its console and on the images alone.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from fusemig.cli.demo import (
    VERIFY_DEADLINE_S,
    check_options,
    only_one_writable,
    say,
    until_interrupted,
    wait_status,
)
from fusemig.cli.demo_records import last_durable, lost_records, read_console
from fusemig.cli.demo_report import Check, page
from fusemig.cli.demo_stage import DemoError, command, daemon, fill_with_random, in_thread, place
from fusemig.cli.guest import downtime, timeline
from fusemig.control.client import open_control
from fusemig.core.units import format_size
from fusemig.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fusemig.cli.demo_stage import Place, Program

QEMU: Final = "qemu-system-x86_64"
MEMORY_MIB: Final = 256
BOOT_DEADLINE_S: Final = 120.0
"""Without KVM, so that the demo runs inside VMs, too."""
_SPARE_BYTES: Final = 16 << 20
_POLL_S: Final = 0.05


async def demo_guest_command(size: int, seconds: float, directory: Path | None, guest: Path) -> int:
    """Run the demo; return 0 only if everything held.

    Raises:
        FusemigError: a step failed, so that there was nothing to check.
    """
    check_options(size, seconds)
    for part in ("vmlinuz", "initrd"):
        if not await trio.Path(guest / part).exists():
            raise ConfigError(f"--guest {guest}: there is no {part} in it; `tools/make_guest {guest}` makes it")
    return await until_interrupted(partial(_demo, size, seconds, directory, guest))


class _Vm:
    """A QEMU of the demo, and what its guest says."""

    def __init__(self, qemu: Program, console: Path, control: Path) -> None:
        self.qemu = qemu
        self.control = control
        self._console = console

    async def console(self) -> str:
        return await trio.Path(self._console).read_text(errors="replace")

    async def wait_writing(self, n_more: int) -> None:
        """Wait until its guest has made ``n_more`` records durable from now on."""
        target = last_durable(await self.console()) + n_more
        try:
            with trio.fail_after(BOOT_DEADLINE_S):
                while last_durable(await self.console()) < target:
                    self.qemu.check_alive()
                    await trio.sleep(_POLL_S)
        except trio.TooSlowError as exc:
            said = (await self.console())[-500:]
            raise DemoError(f"the guest does not write after {BOOT_DEADLINE_S:g} s; it said: {said}") from exc


@asynccontextmanager
async def _vm(name: str, where: Place, guest: Path, disk: Path, *options: str) -> AsyncIterator[_Vm]:
    console, control = where.work / f"{name}.console", where.work / f"{name}.qmp"
    console.touch()
    arguments = ["-M", "q35,accel=tcg", "-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config", "-no-reboot"]
    arguments += ["-display", "none", "-serial", f"file:{console}", "-qmp", f"unix:{control},server=on,wait=off"]
    arguments += ["-kernel", str(guest / "vmlinuz"), "-initrd", str(guest / "initrd")]
    arguments += ["-append", "console=ttyS0 quiet panic=-1"]
    arguments += ["-drive", f"if=none,id=vda,file={disk},format=raw,cache=none", "-device", "virtio-blk-pci,drive=vda"]
    async with command(f"QEMU at the {name}", where.work / f"{name}.qemu.log", QEMU, *arguments, *options) as qemu:
        yield _Vm(qemu, console, control)


async def _demo(size: int, seconds: float, directory: Path | None, guest: Path) -> int:
    async with place(directory, 2 * size + _SPARE_BYTES) as where:
        image, copy = where.images / "source.img", where.images / "destination.img"
        say(f"making a disk of {size >> 20} MiB, two daemons and two QEMUs; a Linux boots on the first, without KVM")
        await in_thread(fill_with_random, image, size, deadline_s=VERIFY_DEADLINE_S)
        await in_thread(_make_empty, copy, size)
        async with AsyncExitStack() as daemons:
            _, destination_control, arrived = await daemons.enter_async_context(
                daemon("destination", where, copy, "--incoming", "tcp:127.0.0.1:0")
            )
            _, source_control, left = await daemons.enter_async_context(daemon("source", where, image))
            async with open_control(destination_control) as control:
                uri = (await control.execute("x-fusemig-status"))["incoming"]["uri"]
            async with AsyncExitStack() as vms:
                here = await vms.enter_async_context(_vm("source", where, guest, left))
                there = await vms.enter_async_context(
                    _vm("destination", where, guest, arrived, "-incoming", f"unix:{where.work}/memory")
                )
                await here.wait_writing(1)
                say(f"the guest writes; it moves after {seconds:g} s")
                await trio.sleep(seconds)
                before = last_durable(await here.console())
                info = await _move(source_control, uri, here, there)
                say("the guest has moved; it writes on for a second")
                await there.wait_writing(1)
                await trio.sleep(1)
            consoles = await here.console(), await there.console()
            is_single = Check(*await in_thread(only_one_writable, left, arrived))
        account = read_console(*consoles)
        n_here = len(read_console(consoles[0]).numbers)
        lost = await in_thread(lost_records, copy, account, deadline_s=VERIFY_DEADLINE_S)
        checks = [
            Check(account.is_one_guest, f"it is the same boot, {account.boots[0]}, and its numbering has no gap"),
            Check(
                len(account.numbers) > n_here, f"it wrote on there: {len(account.numbers) - n_here:,} records so far"
            ),
            Check(
                not lost,
                f"{len(lost):,} records that it had reported durable are missing or torn there"
                if lost
                else f"all {len(account.numbers):,} records that it reported durable are there, none is torn",
            ),
            is_single,
        ]
    for line in _report(size, info, before, len(account.numbers), checks):
        print(line)
    return 0 if all(check.is_ok for check in checks) else 1


async def _move(control_path: Path, uri: str, here: _Vm, there: _Vm) -> dict[str, Any]:
    """Move disk and guest; return ``query-migrate``."""
    async with open_control(control_path) as control:
        guest = {"x-fusemig-guest": f"qmp:{here.control}", "x-fusemig-guest-destination": f"qmp:{there.control}"}
        await control.execute("migrate", {"uri": uri, "blk": True, **guest})
        info = await wait_status(control, "completed")
    if error := info["x-fusemig"]["guest"].get("error"):
        raise DemoError(error)
    return info


def _make_empty(path: Path, size: int) -> None:
    """Make an image full of holes: QEMU asks for a disk's size when it starts."""
    with path.open("wb") as stream:
        stream.truncate(size)


def _report(size: int, info: dict[str, Any], before: int, n_records: int, checks: list[Check]) -> list[str]:
    own = info["x-fusemig"]
    steps = timeline(own["guest"])
    rows = [
        ("guest", f"Linux on QEMU, {MEMORY_MIB} MiB of memory; it writes 4 KiB records, each with an fdatasync"),
        ("disk", f"{format_size(size)}, full of random data, on the mount of a fusemig"),
        ("records", f"{n_records:,} reported durable, {n_records - before:,} of them since the move began"),
        ("moved in", f"{info['total-time'] / 1000:.2f} s, {own['pass']} passes"),
        (
            "sent",
            f"{format_size(own['wire-bytes'])} of the disk, {format_size(own['bytes-dirtied'])} dirtied meanwhile",
        ),
        ("stood still", downtime(own["guest"])),
        *(("timeline" if not number else "", step) for number, step in enumerate(steps)),
    ]
    return page("A running VM moved from one QEMU to another while it was writing to its disk", rows, checks)
