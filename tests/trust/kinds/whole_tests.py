"""The tests of which `make test` runs a seeded sample of cases: the other cases. Each has to pass as it stands.

A test says so itself, with `sampled` (tests/conftest.py) or `@pytest.mark.trust`.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from trials import Outcome

ROOT = Path(__file__).parents[3]
FOLDERS = sorted({file.parent for file in (ROOT / "tests").glob("*/test_*.py")})
WHOLE, SAMPLE = len(FOLDERS), 0  # the sample is what make test runs anyway
NONE_FOUND = 5


def missing() -> str:
    return ""


def trials(scratch: Path, number: int) -> Iterator[Outcome]:
    """The tests of the first `number` folders, each in a process."""
    for folder in FOLDERS[:number]:
        report = scratch / f"{folder.name}.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-q",
            "-m",
            "trust",
            f"--junit-xml={report}",
            str(folder),
        ]
        environment = {**os.environ, "MGVQ_CHECKED_CALLS": "1000000000"}  # all of them: tests/checked_calls.py
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1, NONE_FOUND) or not report.is_file():
            raise RuntimeError(f"pytest {folder.name} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
        for test in ElementTree.parse(report).iter("testcase"):
            yield outcome_of(test)


def outcome_of(test: ElementTree.Element) -> Outcome:
    """The tests of one function are one case."""
    case = f"{test.attrib['classname'].removeprefix('tests.').replace('.', '/')}.py, {test.attrib['name'].partition('[')[0]}"
    for child in test:
        if child.tag == "skipped":
            return Outcome(case, not_run=child.attrib.get("message", "skipped"))
        if child.tag in ("failure", "error"):
            return Outcome(case, wrong=f"{test.attrib['name']}: {child.attrib.get('message', '')[:300]}")
    return Outcome(case)
