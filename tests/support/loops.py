"""Loop devices and file systems on images, as context managers that leave nothing behind."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE_S = 60.0


def run(*command: object, check: bool = True) -> str:
    """Run a program; return its stdout and stderr."""
    done = subprocess.run(
        [str(part) for part in command],
        check=False,
        timeout=DEADLINE_S,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert not check or done.returncode == 0, f"{command} exited with {done.returncode}: {done.stdout}"
    return done.stdout


def loops_of(directory: Path) -> list[str]:
    """Return the loop devices whose backing file lies in ``directory``, deleted or not."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = path.read_text()
        except OSError:  # detached meanwhile, by another test
            continue
        if backing.startswith(f"{directory}/"):
            found.append(f"/dev/{path.parts[3]}")
    return found


@contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    """Give a loop device on a file."""
    device = Path(run("losetup", "--show", "--find", path).strip())
    try:
        yield device
    finally:
        run("losetup", "--detach", device, check=False)


@contextmanager
def mounted(device: Path | str, directory: Path, kind: str = "ext4", options: str = "defaults") -> Iterator[Path]:
    """Mount a file system on ``directory``, which is created."""
    directory.mkdir(exist_ok=True)
    run("mount", "-t", kind, "-o", options, device, directory)
    try:
        yield directory
    finally:
        run("umount", directory)


def check_ext4(path: Path) -> None:
    """Assert that an ext4 file system is whole, without changing it."""
    run("e2fsck", "-fn", path)
