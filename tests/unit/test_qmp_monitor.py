"""`human-monitor-command`: QEMU's texts for three kinds of info."""

from __future__ import annotations

import pytest

from fusemig.qmp import block, monitor, schema


class Queries:
    """A daemon with two disks, one of which is still to come."""

    def __init__(self, *, status: schema.RunState = schema.RunState.RUNNING, info: schema.MigrationInfo) -> None:
        self._status = status
        self._info = info

    def blocks(self) -> list[block.BlockInfo]:
        image = block.ImageInfo(filename="/d.img", virtual_size=4 << 20, actual_size=1536)
        node = block.BlockDeviceInfo(file="/d.img", ro=True, image=image, node_name="vda")
        return [block.BlockInfo(device="vda", inserted=node), block.BlockInfo(device="vdb")]

    def status(self) -> schema.StatusInfo:
        return schema.StatusInfo(running=self._status is schema.RunState.RUNNING, status=self._status)

    def migration(self) -> schema.MigrationInfo:
        return self._info


NONE = Queries(info=schema.MigrationInfo())
FAILED = Queries(
    status=schema.RunState.PAUSED,
    info=schema.MigrationInfo(
        status=schema.MigrationStatus.FAILED,
        error_desc="no route",
        total_time=12,
        disk=schema.MigrationStats(transferred=2048, remaining=1024, total=4096, dirty_sync_count=3),
    ),
)
BLOCK = "vda (vda): /d.img (raw, read-only)\r\n    Cache mode:       writeback\r\n"


@pytest.mark.parametrize(
    ("line", "queries", "text"),
    [
        ("info status", NONE, "VM status: running\r\n"),
        ("  info   status ", FAILED, "VM status: paused\r\n"),
        ("info block", NONE, f"{BLOCK}\r\nvdb: [not inserted]\r\n"),
        ("info block vda", NONE, BLOCK),
        ("info block nosuch", NONE, ""),
        (
            "info block -v vda",
            NONE,
            (
                f"{BLOCK}\r\nImages:\r\nimage: /d.img\r\nfile format: raw\r\nvirtual size: 4 MiB (4194304 bytes)\r\n"
                "disk size: 1.5 KiB\r\n"
            ),
        ),
        ("info migrate", NONE, ""),
        (
            "info migrate",
            FAILED,
            (
                "Migration status: failed (no route)\r\ntotal time: 12 ms\r\nthroughput: 0.00 mbps\r\n"
                "dirty sync count: 3\r\ntransferred disk: 2 kbytes\r\nremaining disk: 1 kbytes\r\n"
                "total disk: 4 kbytes\r\n"
            ),
        ),
        (
            "info migrate x",
            NONE,
            'migrate: extraneous characters at the end of line\r\nTry "help info migrate" for more information\r\n',
        ),
        ("info nosuch", NONE, "unknown command: 'info nosuch'\r\n"),
        ("nosuch at all", NONE, "unknown command: 'nosuch'\r\n"),
        ("", NONE, ""),
        ("help", NONE, "".join(f"{line}\r\n" for line in monitor.HELP)),
        ("help info status", NONE, f"{monitor.HELP[2]}\r\n"),
        ("help migrate", NONE, ""),
    ],
)
def test_answers(line: str, queries: Queries, text: str) -> None:
    """In QEMU's words, as seen on QEMU 7.2; what is not understood is said in a text."""
    assert monitor.answer(line, queries) == text
