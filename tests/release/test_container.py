"""The image that `Dockerfile` builds, in containers that the commands of `docs/recipes.md` start.

Needs podman (with crun and catatonit), which stands in for docker, and debootstrap, which makes what the registry calls
debian:bookworm-slim. Everything lies in the test's directory, and runs in namespaces that end with the shell.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest

from support.pages import ROOT, run_script, script

AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
"""What this machine trusts, where it has it in one file: its network may sign for the package index."""

BASE = "docker.io/library/debian:bookworm-slim"
NEEDED = ("podman", "crun", "catatonit", "debootstrap")

OWN_STATE = """
for state in /run/crun /run/libpod /var/lib/containers; do
    mkdir -p $state && mount -t tmpfs engine $state
done
"""
"""What the engine keeps outside of the directories that it is told."""

STAND_IN = f"""
debootstrap --variant=minbase bookworm base
tar --create --directory base . | docker import - {BASE}
rm -rf base
"""

DOCKER = """#!/bin/sh
# podman by docker's name, with its storage here and what this machine's network asks for
command=$1
shift
case $command in
build) set -- --isolation chroot --pull=never {volumes} "$@" ;;
run) set -- --cgroups disabled "$@" ;;
esac
exec podman --root {place}/storage --runroot {place}/run --cgroup-manager cgroupfs --events-backend file "$command" "$@"
"""


def install_docker(place: Path) -> Path:
    """Put a program ``docker`` into a directory, and return that."""
    volumes = ""
    if AUTHORITIES.exists():
        # Not by its own name, which the package ca-certificates writes.
        (place / "pip.conf").write_text("[global]\ncert = /etc/pip.pem\n")
        volumes = f"--volume {AUTHORITIES}:/etc/pip.pem:ro --volume {place}/pip.conf:/etc/pip.conf:ro"
    directory = place / "bin"
    directory.mkdir()
    (directory / "docker").write_text(DOCKER.format(place=place, volumes=volumes))
    (directory / "docker").chmod(0o755)
    return directory


@pytest.mark.nightly
@pytest.mark.fuse
@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.geteuid() != 0, reason="roots and containers need root")
@pytest.mark.skipif(
    any(shutil.which(program) is None for program in NEEDED), reason=f"needs {', '.join(NEEDED)} (apt install)"
)
def test_a_disk_moves_from_one_container_to_another(tmp_path: Path) -> None:
    """The image is built, serves a disk to the host, moves it to a second container and ends in order."""
    docker = f"PATH={shlex.quote(str(install_docker(tmp_path)))}:$PATH"
    image = f"(cd {shlex.quote(str(ROOT))}\n{script('docs/recipes.md', 'image')})"
    authority = f"mkdir authority && (cd authority\n{script('docs/security.md', 'authority')})"
    steps = [
        docker,
        OWN_STATE,
        "ip link set lo up",
        "umount /sys/fs/cgroup/unified 2> /dev/null || true",  # crun refuses a hybrid of v1 and v2; no cgroup is used
        "mkdir -p host1/pki host2/pki",
        authority,
        "cp authority/ca-cert.pem authority/client-*.pem host1/pki",
        "cp authority/ca-cert.pem authority/server-*.pem host2/pki",
        script("docs/recipes.md", "container"),
    ]
    try:
        built = run_script(f"{docker}\n{OWN_STATE}\n{STAND_IN}\n{image}", tmp_path, deadline_s=900)
        assert built.returncode == 0, built.stdout
        moved = run_script("\n".join(steps), tmp_path, network=True)
    finally:
        shutil.rmtree(tmp_path)
    assert moved.returncode == 0, moved.stdout
    assert "completed in" in moved.stdout
    assert moved.stdout.rstrip().endswith("both are unmounted")
