"""What `promtool check metrics` complains of, as far as it can be told from the text (client_golang's promlint)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_OTHER_UNITS = (
    "milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days", "kilobytes", "kibibytes", "megabytes",
    "mebibytes", "gigabytes", "bits", "percent", "ms", "us", "ns", "sec", "secs", "kb", "mb", "mib",
)  # fmt: skip
_TYPES = ("gauge", "counter", "summary", "histogram", "info")
_RESERVED = ("_count", "_sum", "_bucket")


def families(text: str) -> dict[str, Metric]:
    """Parse a page; return its families by name."""
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(text: str, name: str, **labels: str) -> float:
    """Return the one sample of this name and these labels."""
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    ]
    assert len(found) == 1, f"{name} {labels}: {found}"
    return float(found[0])


def problems(text: str) -> list[str]:
    """Return what is wrong with a page of metrics in Prometheus' text format."""
    found = []
    seen: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
    for family in text_string_to_metric_families(text):
        # The parser takes `_total` from a counter's name; each sample has its own.
        names = {sample.name for sample in family.samples} or {family.name}
        if not family.documentation:
            found.append(f"{family.name}: no help text")
        for name in names:
            found += [f"{name}: {problem}" for problem in _problems_of_name(name, family.type)]
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            if key in seen:
                found.append(f"{sample.name}: {sample.labels} is there twice")
            seen.add(key)
            if any(re.search("[A-Z]", label) for label in sample.labels):
                found.append(f"{sample.name}: camelCase label")
            if "le" in sample.labels and family.type != "histogram":
                found.append(f"{sample.name}: label le without a histogram")
    return found


def _problems_of_name(name: str, kind: str) -> list[str]:
    found = []
    words = name.split("_")
    if not re.fullmatch("[a-z_][a-z0-9_]*", name):
        found.append("not snake_case")
    if kind == "counter" and not name.endswith("_total"):
        found.append("a counter's name should end in _total")
    if kind != "counter" and name.endswith("_total"):
        found.append("only a counter's name should end in _total")
    if kind not in ("histogram", "summary") and name.endswith(_RESERVED):
        found.append("a suffix that is reserved for histograms")
    found += [f"unit {unit}: use the base unit" for unit in _OTHER_UNITS if unit in words]
    found += [f"the type {type_name} is in the name" for type_name in _TYPES if type_name in words[:-1]]
    return found
