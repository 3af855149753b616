"""What the docs tell people to type works as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fusemig.qmp import schema
from support.hosts import MIB, write_random
from support.pages import ROOT, blocks, calls, outlines, pages, run_script, script, unknown_words

if TYPE_CHECKING:
    from types import ModuleType

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and loop devices need root")

NOT_RUN = {
    "apt install fuse3 libfuse3-dev pkg-config gcc python3-dev python3-venv": "tools/try_in_root does the same",
    "fusemig completion bash > /etc/bash_completion.d/fusemig": "writes outside; tests/cli/test_man.py, test_cli.py",
    "fusemig serve /run/vm/mnt --disk vda=/srv/vda.img --control /run/vm/control": "tests/interop/test_guest.py",
    "truncate -s 64G /srv/vda.img": "tests/interop/test_guest.py",
    "ssh -N -L /run/vm/migrator-there:/run/vm/migrator DESTINATION &": "tests/interop/test_guest.py, without ssh",
    "# pause-vm": "needs KVM; its protocol with a process for a VM: tests/e2e/test_guest_commands.py",
    "# resume-vm": "needs KVM; its protocol with a process for a VM: tests/e2e/test_guest_commands.py",
    "fusemig migrate /run/vm/control tcp:DESTINATION:4444 --tls-creds /etc/fusemig/pki \\": "needs KVM, as the former",
    "jq -c 'select(.migration == \"3f2a91c0\") | [.timestamp, .phase, .event]' source.log destination.log": "jq's own",
    "fusemig serve /mnt/disks --disk vda=/images/vm1.img,base=/images/golden.img --control /run/fusemig.sock": (
        "tests/e2e/test_overlay.py"
    ),
    "fusemig serve /run/vm/disks --disk vda=/var/lib/vm/vda.img --control /run/vm/control": "tests/interop",
    "install -D -m 755 tools/libvirt-hook/qemu /etc/libvirt/hooks/qemu": (
        "needs libvirt; the hook itself: tests/e2e/test_libvirt_hook.py"
    ),
    "fusemig serve /mnt --disk vda=/var/lib/vm/vda.img --control /run/vm.sock --resilient --standby": (
        "tests/e2e/test_resilience.py"
    ),
    "install -m 644 tools/systemd/fusemig@.service /etc/systemd/system/": "needs systemd; tests/e2e/test_systemd.py",
}
"""Blocks of commands that no test runs as they stand, by their first line: why, or which test does the same."""


@pytest.mark.fuse
@needs_root
def test_the_tutorial_can_be_followed(place: Path) -> None:
    """From two hosts to the last command; the disk has every line, and nothing is left."""
    try:
        done = run_script(script("docs/tutorial.md", "tutorial"), place)
        assert done.returncode == 0, done.stdout
        assert "completed in" in done.stdout
        assert "ok    peer tcp:10.99.0.2:4444: answers within" in done.stdout
    finally:
        for mount in ("host1/fs", "host2/fs", "host1/disks", "host2/disks"):
            subprocess.run(["umount", "-l", place / mount], check=False, capture_output=True)
        for host in ("tutorial1", "tutorial2"):
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)


HOSTS = """
ip link set lo up
ip address add 10.0.0.1/32 dev lo
ip address add 10.0.0.2/32 dev lo
for host in host1 host2; do
    mkdir "$host"
    cp -a /etc "$host/etc"
    mkdir -p "$host/etc/fusemig/pki"
    printf '10.0.0.1 host1.example\\n10.0.0.2 host2.example\\n127.0.0.1 localhost\\n' > "$host/etc/hosts"
    # Each sees its own /etc, /run and /var/lib; the rest of the machine they share.
    unshare --mount bash -c 'mount --bind $0/etc /etc && mount -t tmpfs $0 /run && mount -t tmpfs $0 /var/lib &&
        mkdir -p /run/vm /var/lib/vm && touch $0/ready && exec sleep infinity' "$host" &
    echo $! > "$host/pid"
    until [ -e "$host/ready" ]; do sleep 0.02; done
done
on() { nsenter --mount="/proc/$(cat "$1/pid")/ns/mnt" --wdns="$PWD" bash -euo pipefail -c "$2"; }
"""


def typed(page: str) -> list[str]:
    """Return what is typed at the hosts of a page; a daemon in front has a terminal of its own."""
    lines = []
    for block in blocks(page):
        if block.mark not in {"host1", "host2"}:
            continue
        on = f"on {block.mark} {shlex.quote(block.text)}"
        control = re.search(r"fusemig serve .*--control (\S+)", block.text)
        lines.append(
            f"{on} &\nuntil on {block.mark} 'fusemig status {control[1]}'; do sleep 0.1; done" if control else on
        )
    return lines


@pytest.mark.fuse
@needs_root
def test_what_the_readme_says_moves_a_disk(place: Path) -> None:
    """Its commands, with the certificates of docs/security.md, on two hosts; `doctor` as on its page in between."""
    image = write_random(place / "vda.img", 16 * MIB)
    serve, receive, migrate = typed("README.md")
    authority = script("docs/security.md", "authority")
    steps = [
        HOSTS,
        f"mkdir authority && (cd authority\n{authority}\n)",
        "cp authority/ca-cert.pem authority/client-*.pem host1/etc/fusemig/pki",
        "cp authority/ca-cert.pem authority/server-*.pem host2/etc/fusemig/pki",
        "on host1 'cp vda.img /var/lib/vm/vda.img'",
        serve,
        receive,
        *typed("docs/doctor.md"),
        migrate,
        "on host2 'cp /run/vm/disks/vda moved.img; fusemig status /run/vm/control'",
        "if on host1 'dd if=/dev/zero of=/run/vm/disks/vda bs=512 count=1 conv=notrunc'; then exit 1; fi",
    ]
    done = run_script("\n".join(steps), place, network=True)
    assert done.returncode == 0, done.stdout
    assert "ok    peer tcp:host2.example:4444: answers within" in done.stdout
    assert "Read-only file system" in done.stdout
    assert (place / "moved.img").read_bytes() == image.read_bytes()


@pytest.mark.fuse
@needs_root
@pytest.mark.parametrize(
    "recipe",
    [
        "loop",
        "qcow2",
        pytest.param(
            "postgres",
            marks=[
                pytest.mark.nightly,
                pytest.mark.skipif(not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")), reason="no postgresql"),
            ],
        ),
    ],
)
def test_a_recipe_can_be_followed(recipe: str, place: Path) -> None:
    """Its commands end well, its checks included."""
    place.chmod(0o755)
    text = script("docs/recipes.md", recipe)
    assert text
    done = run_script(text, place)
    assert done.returncode == 0, done.stdout


def test_every_command_is_run_or_has_a_reason() -> None:
    """Each block is run by a test above, or is in `NOT_RUN`, which names nothing that is gone."""
    run = {
        "docs/tutorial.md": {"tutorial"},
        "README.md": {"host1", "host2"},
        "docs/doctor.md": {"host1"},
        "docs/security.md": {"authority"},
        "docs/recipes.md": {"loop", "qcow2", "postgres", "image", "container"},  # these two: tests/release
    }
    left = set(NOT_RUN)
    for page in pages():
        for block in blocks(page):
            if block.mark:
                assert block.mark in run.get(page, set()), f"{page}: no test runs the blocks of {block.mark}"
            else:
                assert block.first in NOT_RUN, f"{page}: {block.first}"
                left.discard(block.first)
    assert not left, "these are on no page any more"


DESIGNS = {"--group"}
"""Options that a page proposes."""


def test_every_call_in_the_docs_is_one_that_the_program_knows() -> None:
    """Its commands and options exist, in blocks, outlines and text; a misspelt one would be seen."""
    assert unknown_words(next(calls("fusemig migrate S URI --tls-cred DIR"))) == ["--tls-cred"]
    assert unknown_words(next(calls("x; fusemig mgirate S"))) == ["mgirate"]
    n_seen = 0
    for page in pages():
        texts = [block.text for block in blocks(page)] + list(outlines(page))
        for words in (words for text in texts for words in calls(text)):
            n_seen += 1
            unknown = [word for word in unknown_words(words) if word not in DESIGNS]
            assert not unknown, f"{page}: fusemig {' '.join(words)}: {unknown}"
    assert n_seen > 150


def test_the_container_files_call_the_program_as_it_is() -> None:
    """Dockerfile's head and docs/compose.yaml use options that exist."""
    head, _, _ = (ROOT / "Dockerfile").read_text().partition("\nFROM")
    services = (ROOT / "docs" / "compose.yaml").read_text()
    composed = re.findall(r"^    command:(.*?)(?=^    \w|^  \w|\Z)", services, re.M | re.S)
    words_of = (re.findall(r"(?<![^\s\[])[\w/-][^\s,\]]*", re.sub(r"^ *- ", "", one, flags=re.M)) for one in composed)
    commands = [*calls(head.replace("\n#", "\n")), *words_of]
    assert [words[0] for words in commands] == ["serve", "migrate", "serve", "serve"]
    for words in commands:
        assert unknown_words(words) == []


def load_tool(name: str) -> ModuleType:
    """Import a tool, which has no suffix."""
    loader = SourceFileLoader(name, str(ROOT / "tools" / name))
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_every_error_has_its_entry_in_troubleshooting() -> None:
    """As tools/messages finds them; it sees a page that lacks one, and one that tells of what is gone."""
    tool: Any = load_tool("messages")
    messages, kinds = tool.all_messages()
    assert len(messages) > 300
    phrases = tool.phrases(tool.PAGE.read_text())
    assert tool.check(messages, kinds, phrases) == []
    lacking = [one for one in phrases if one != "has an I/O error and cannot be trusted"]
    assert any("has an I/O error" in problem for problem in tool.check(messages, kinds, lacking))
    assert any("nothing says" in problem for problem in tool.check(messages, kinds, [*phrases, "nobody says this"]))


def first_cells(page: str, heading: str) -> set[str]:
    """Return what the first column of the first table under a heading has in backticks."""
    _, found, rest = page.partition(f"\n### {heading}\n")
    assert found
    table = re.search(r"(?:^\|.*\n)+", rest, re.M)
    assert table is not None
    return {name for row in table[0].splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_every_command_and_event_of_qmp_is_on_its_page() -> None:
    """The tables of docs/qemu.md name all that there is, and nothing that is not."""
    page = (ROOT / "docs" / "qemu.md").read_text()
    assert first_cells(page, "Commands") == set(schema.COMMANDS)
    assert first_cells(page, "Events") == set(schema.EVENTS)


def test_links_between_pages_lead_somewhere() -> None:
    """Every relative link of README and docs names a file that is there."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
