"""The page of checks has every refusal of the code, once, at a moment that is the right one."""

import re
import sys
from collections import Counter

from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs" / "hooks"))
import checks

FOUND = checks.checks(ROOT)


def test_every_refusal_of_the_code_is_on_the_page_once() -> None:
    """Counted by the letters of the code, not by its grammar."""
    written = Counter[str]()
    for file in (ROOT / "mgvq").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        number = len(re.findall(r"(?<!class )(?<!def )\b(?:UserError|SharedFault|whole_number|told_as)\(", text))
        number += len(re.findall(r"raise (?:\w+\.)?(?:error|refusal|_not_here|_unclear|_unfit)\(", text))
        if number and file.name != "checks.py":
            written[".".join(file.relative_to(ROOT / "mgvq").with_suffix("").parts)] = number
    assert Counter(check.module for check in FOUND) == written
    (page,) = checks.pages(ROOT)
    assert sum(line.startswith("| ") for line in page.text.splitlines()) == len(FOUND) + len(checks.MOMENTS)


def test_every_refusal_has_a_moment_and_every_moment_a_refusal() -> None:
    used = {checks.moment_of(check) for check in FOUND}
    assert used == set(checks.MOMENTS)
    starts = [start for starts in checks.MOMENTS.values() for start in starts]
    assert len(starts) == len(set(starts))
    for start in starts:
        assert any(f"{check.module}.{check.scope}.".startswith(f"{start}.") for check in FOUND), f"{start} refuses nothing"


def test_functions_that_make_errors_are_known() -> None:
    """Whoever raises what is no class calls a maker, or hands on what another has said."""
    raised = set()
    for file in (ROOT / "mgvq").rglob("*.py"):
        raised |= set(re.findall(r"raise (?:\w+\.)?([a-z_]\w*)\(", file.read_text(encoding="utf-8")))
    assert raised == checks.MAKERS | {"below_smallest"}  # which takes no text


def test_a_refusal_says_something() -> None:
    """Or it hands on what another says."""
    handed_on = {"*what* (*its words*). *advice*", "*no such setting*", "*known**setup*", "*error*", "*overrides*: *error*"}
    handed_on |= {
        "*source*, *where*: *text*",
        "*group*.*wrong*.",
        "*words*: *text*",
        "*why*",
    }  # the last: a reason of mgvq/export/codes.py
    assert not [c for c in FOUND if c.says not in handed_on and not re.search("[a-z]{2}", re.sub(r"\*[^*]*\*", "", c.says))]
