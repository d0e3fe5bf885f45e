"""Two runs side by side: only what differs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgvq.analysis.runs.listed import NOTHING, ListedRun, flat

_OWN = ("checkpoint_sha256", "schema_version", "flags")  # of metrics.json: no measurements


def settings_that_differ(a: ListedRun, b: ListedRun) -> list[list[str]]:
    """Name, value of `a` and value of `b` of every setting in which the runs differ."""
    return _differing(a.flat, b.flat)


def provenance_that_differs(a: ListedRun, b: ListedRun) -> list[list[str]]:
    """The same of code, packages and machine."""
    return _differing(provenance_of(a.folder.path), provenance_of(b.folder.path))


def metrics_that_differ(a: ListedRun, b: ListedRun) -> list[list[str]]:
    """Name, both values, and `b` minus `a` of every metric in which the runs differ; flags as they are."""
    lines = []
    for name in _names(a.metrics, b.metrics):
        first, second = a.metrics.get(name), b.metrics.get(name)
        if first != second and name not in _OWN:
            difference = NOTHING
            if isinstance(first, int | float) and isinstance(second, int | float):
                difference = f"{second - first:+.4g}"
            lines.append([name, shown(first), shown(second), difference])
    flags = [sorted(set(run.metrics.get("flags", ()))) for run in (a, b)]
    if flags[0] != flags[1]:
        lines.append(["flags", *(", ".join(own) or NOTHING for own in flags), NOTHING])
    return lines


def provenance_of(run: Path) -> dict[str, Any]:
    """`provenance.json` of a run by dotted names; empty where it has none."""
    file = run / "provenance.json"
    return dict(flat(json.loads(file.read_text(encoding="utf-8")))) if file.is_file() else {}


def shown(value: Any) -> str:
    """A value in a cell: numbers to six digits, a list or a mapping as JSON."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    return value if isinstance(value, str) else json.dumps(value)


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[list[str]]:
    return [[name, shown(a.get(name)), shown(b.get(name))] for name in _names(a, b) if a.get(name) != b.get(name)]


def _names(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*a, *b]))
