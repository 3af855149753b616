"""What was measured: the versions of everything and the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

_PROGRAMS = {
    "fio": ["fio", "--version"],
    "qemu-system-x86_64": ["qemu-system-x86_64", "--version"],
    "qemu-storage-daemon": ["qemu-storage-daemon", "--version"],
    "qemu-img": ["qemu-img", "--version"],
    "nbdkit": ["nbdkit", "--version"],
    "libnbd": ["nbdcopy", "--version"],
    "libfuse": ["fusermount3", "--version"],
}
_PACKAGES = ("pyfuse3", "trio", "xxhash")


def versions() -> dict[str, str]:
    """Return names and versions, in the order in which they are printed."""
    found = {"fusemig": _fusemig(), "kernel": platform.release(), "machine": _machine()}
    found |= {name: _program(words) for name, words in _PROGRAMS.items()}
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _program(words: list[str]) -> str:
    if shutil.which(words[0]) is None:
        return "not installed"
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=20)
    text = done.stdout.splitlines()
    match = re.search(r"\d+(?:\.\d+)+", text[0]) if text else None
    return match[0] if match else "unknown"


def _fusemig() -> str:
    root = Path(__file__).resolve().parents[2]
    try:
        version = importlib.metadata.version("fusemig")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=20)
    return f"{version} ({done.stdout.strip() or 'no commit'})"


def _machine() -> str:
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{os.cpu_count()} x {model[1] if model else platform.machine()}, {memory:.0f} GiB"
