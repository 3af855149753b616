"""Fail if every test marked ``fuse`` was skipped.

    pytest -q --collect-only -m fuse | python .ci/fuse_was_tested.py RESULTS.xml

RESULTS.xml is pytest's JUnit file. Silent when all is well.
"""

from __future__ import annotations

import sys
from xml.etree import ElementTree as ET


def main(results: str) -> None:
    """Compare the collected tests with the results."""
    marked = {_address(line.strip()) for line in sys.stdin if "::" in line}
    ran = {
        (case.get("classname", ""), case.get("name", ""))
        for case in ET.parse(results).iter("testcase")  # noqa: S314  (pytest wrote it a moment ago)
        if case.find("skipped") is None
    }
    n_ran = len(marked & ran)
    if not n_ran:
        sys.exit(f".ci/run: none of the {len(marked)} tests with a real mount ran: is /dev/fuse usable here?")


def _address(node: str) -> tuple[str, str]:
    """Return the class name and the name under which pytest's JUnit file has a test."""
    path, _, rest = node.partition("::")
    # Parameters may hold "::" themselves.
    plain, bracket, parameters = rest.partition("[")
    *classes, name = plain.split("::")
    return ".".join([path.removesuffix(".py").replace("/", "."), *classes]), name + bracket + parameters


if __name__ == "__main__":
    main(sys.argv[1])
