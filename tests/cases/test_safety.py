"""What code and data may not do: unpickle, reach out, run what somebody wrote, leave the results folder."""

import ast
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT
from made_up_study import STUDY, plan, with_names

from mgvq.analysis.html import write_html
from mgvq.analysis.records.collect import collect
from mgvq.analysis.records.layers import collect_layers
from mgvq.analysis.report import write_figures, write_tables
from mgvq.errors import UserError

MODULES = sorted((ROOT / "mgvq").rglob("*.py"))
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
EXCHANGED = {"ranks/gloo.py": {"pickle"}}  # what processes of one run, which were started together, tell each other
NETWORK = {"socket", "urllib", "http", "ftplib", "smtplib", "requests", "httpx", "aiohttp"}
ASKED = {"tracker/wandb.py": {"requests"}}  # tracker=wandb sends where somebody is logged in
CODE = {"eval", "exec", "compile", "__import__"}
OWN = {"runs/early.py": {"exec", "__import__"}}  # modules of this package, apart from those of the process
UNSAFE = {"torch.load", "torch.save", "numpy.load", "np.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"}


def imported(tree: ast.AST) -> set[str]:
    found = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    found += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_pickles_reaches_out_or_runs_texts(file: Path) -> None:
    tree, name = ast.parse(file.read_text()), str(file.relative_to(ROOT / "mgvq"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {ast.unparse(call.func) for call in calls}
    words = {f"{keyword.arg}={ast.unparse(keyword.value)}" for call in calls for keyword in call.keywords}
    assert imported(tree) & PICKLES <= EXCHANGED.get(name, set())
    assert imported(tree) & NETWORK <= ASKED.get(name, set())
    assert called & CODE <= OWN.get(name, set())
    assert not called & UNSAFE
    assert not words & {"shell=True", "allow_pickle=True", "weights_only=False"}


HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"&{{7*7}}"


class Tags(HTMLParser):
    """What a browser takes for tags and their handlers, and for texts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, value in attrs if name.startswith("on") or (value or "").startswith("javascript:")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_report_takes_no_name_for_html(tmp_path: Path) -> None:
    pages = []
    for names in (("full", "base", "better"), (f"full {HOSTILE}", f"base {HOSTILE}", f"better {HOSTILE}")):
        study, results = replace(with_names(*names), question=f"is it {names[0]}?"), tmp_path / str(len(pages))
        runs = plan(results, study)
        record = collect(study, runs)
        write_figures("made_up", record, collect_layers(runs, record), results)
        (page := Tags()).feed(write_html("made_up", study, record, results / "page").read_text())
        pages.append(page)
    plain, hostile = pages
    assert hostile.tags == plain.tags, "the names have added no tag"
    assert hostile.handlers == plain.handlers == []
    assert any(HOSTILE in text for text in hostile.texts), "and are shown as they are"


@pytest.mark.parametrize("name", ["../out", "a/b", "..", "/tmp/out", "a\\b", "a\0b", "-rf", "", "a" * 81, "~", "a\n"])
def test_the_name_of_a_study_leads_nowhere(name: str) -> None:
    with pytest.raises(UserError, match="its name is the name of its files"):
        replace(STUDY, name=name)


@pytest.mark.parametrize("arm", ["../../out", "/etc/passwd", "..", "a/../../b", "~root", "nul\\..\\x"])
def test_the_name_of_an_arm_leads_nowhere(arm: str, tmp_path: Path) -> None:
    """A baseline's name is part of names of files."""
    results = tmp_path / "inner" / "results"
    study = replace(with_names("full", "base", arm), baseline=["base", arm], primary=None)
    runs = plan(results, study)
    record = collect(study, runs)
    written = [*write_tables("made_up", record, results), write_html("made_up", study, record, results / "page")]
    write_figures("made_up", record, collect_layers(runs, record), results)
    assert all(file.resolve().is_relative_to(results) for file in written)
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]
    assert [path.name for path in (tmp_path / "inner").iterdir()] == ["results"]
    assert all(re.fullmatch(r"[\w.-]+", file.name) for file in written)
