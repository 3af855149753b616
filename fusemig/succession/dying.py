"""May a successor begin while threads of its predecessor are still there?

Until a process is wholly dead, a thread of it may be inside a write to an image, and would overwrite what a successor
has written there since. So a successor begins when waitpid(2) has returned. But a killed thread may wait for an answer
of the very file system that its process served: one that has the kernel drop cached pages waits until guests' pages
were pushed out to us, and one that looks at the mount waits for us. Nobody can answer but a successor, and no kill
ends such a wait (fs/fuse/dev.c, request_wait_answer, after the request was read).

The rule: every thread that is left
  - has SIGKILL pending, so that it never runs another instruction of its program, and begins no other system call;
  - and is inside a call that cannot change an image: a write(2) to /dev/fuse, or one of the stat family. Our writes to
    images are pwrite(2) and its like.
A thread that runs, or waits anywhere else, may be changing an image: wait. Threads cannot appear, because a thread
with a signal pending cannot make one. On a processor whose system call numbers are not listed nothing fits the rule.

Stdlib only; reads /proc and changes nothing.
"""

from __future__ import annotations

import os

# write; and stat, fstat, lstat, statfs, fstatfs, newfstatat, statx (arch/x86/entry/syscalls, asm-generic/unistd.h)
_WRITE = {"x86_64": 1, "aarch64": 64, "riscv64": 64}
_HARMLESS = {
    "x86_64": frozenset({4, 5, 6, 137, 138, 262, 332}),
    "aarch64": frozenset({43, 44, 79, 80, 291}),
    "riscv64": frozenset({43, 44, 79, 80, 291}),
}
_SIGKILL_BIT = 1 << 8
_DEAD = ("Z", "X")


def waits_only_for_us(pid: int, proc: str = "/proc", machine: str = "") -> bool:
    """Tell whether what is left of a killed process can change no image any more, and needs a successor to end."""
    machine = machine or os.uname().machine
    tasks = f"{proc}/{pid}/task"
    is_left = False
    try:
        for thread in os.listdir(tasks):
            status = _status(f"{tasks}/{thread}")
            if status["State"].startswith(_DEAD):
                continue
            is_left = True
            pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
            if not pending & _SIGKILL_BIT or not _is_harmless(f"{tasks}/{thread}", machine):
                return False
    except (OSError, KeyError, ValueError):
        return False  # it has just ended, or may not be looked at: waitpid decides
    return is_left


def _status(thread: str) -> dict[str, str]:
    with open(f"{thread}/status") as file:
        pairs = (line.partition(":") for line in file)
        return {name: value.strip() for name, _, value in pairs}


def _is_harmless(thread: str, machine: str) -> bool:
    with open(f"{thread}/syscall") as file:
        fields = file.read().split()
    number = int(fields[0])  # "running" and "-1", not in a call, fit nothing
    if number == _WRITE.get(machine, -2):
        return os.readlink(f"{thread}/fd/{int(fields[1], 16)}") == "/dev/fuse"
    return number in _HARMLESS.get(machine, ())
