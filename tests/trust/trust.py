"""`make trust`: what takes too long for `make test`. Tries every kind at full length, and writes results/tables/trust.md.

    python tests/trust/trust.py [--only KIND ...] [--share .1]

The table is written after every trial. With `--only` the other kinds keep what was found before, with their commit; with
`--share` less is tried, and the table is printed alone. The exit status is 1 where something does not hold.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from trials import Outcome, holds, kinds, summary, table

from mgvq.runs.places import results_folder
from mgvq.runs.provenance import provenance

RECORD = "records/trust.json"


def tried(
    name: str, kind: ModuleType, share: float, keep: Callable[[dict[str, Any]], None] = lambda record: None
) -> dict[str, Any]:
    """The record of one kind. A trial that raises ends the kind and stands in the record as one that does not hold.

    `keep` is given the record after every trial, so that one that is stopped tells how far it came.
    """
    if reason := kind.missing():
        return summary(kind, [], 0.0, reason)
    number = math.ceil(share * kind.WHOLE)
    outcomes: list[Outcome] = []
    since = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for outcome in kind.trials(Path(scratch), number):
                outcomes.append(outcome)
                state = "holds" if outcome.holds else f"DOES NOT HOLD: {outcome}"
                print(f"{name}, {len(outcomes)}, {outcome.case}: {outcome.not_run or state}", flush=True)
                stopped = f"stopped after trial {len(outcomes)} of {number}."
                keep(summary(kind, outcomes, time.monotonic() - since, stopped))
        except Exception as error:
            traceback.print_exc()
            outcomes.append(Outcome("a trial that did not end", wrong=f"{type(error).__name__}: {str(error)[:300]}"))
    return summary(kind, outcomes, time.monotonic() - since)


def write(record: Mapping[str, Any], results: Path) -> None:
    """Write the record, and the table that is made of it."""
    for file, text in ((RECORD, json.dumps(record, indent=1) + "\n"), ("tables/trust.md", table(record))):
        (results / file).parent.mkdir(parents=True, exist_ok=True)
        (results / file).write_text(text)


def before(results: Path) -> dict[str, Any]:
    """What was found of each kind before; of one that was never tried, that."""
    file = results / RECORD
    found = json.loads(file.read_text())["kinds"] if file.is_file() else {}
    nothing = {"commit": "none", "cores": 0}
    return {name: found.get(name) or summary(kind, [], 0.0, "not tried yet.") | nothing for name, kind in kinds().items()}


def main() -> int:
    """Try, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="KIND", default=list(kinds()), choices=list(kinds()), help="these alone")
    parser.add_argument("--share", type=float, default=1.0, help="of the trials of each kind (default: 1)")
    arguments = parser.parse_args()
    origin = provenance()
    where = {
        "commit": f"{(origin['commit'] or 'unknown')[:7]}{' with changes' if origin['dirty'] else ''}",
        "cores": os.cpu_count(),
    }
    found: dict[str, Any] = {}

    def keep(name: str, record: dict[str, Any]) -> None:
        found[name] = record | where
        if arguments.share == 1:
            write({"kinds": before(results_folder()) | found}, results_folder())

    for name in arguments.only:
        keep(name, tried(name, kinds()[name], arguments.share, partial(keep, name)))
    print(table({"kinds": found}))
    return 0 if holds({"kinds": found}) else 1


if __name__ == "__main__":
    sys.exit(main())
