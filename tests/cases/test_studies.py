"""Study files as people write them: what makes no study is refused in one paragraph, and odd names leave tables whole."""

import csv
import io
import random
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from made import copy
from made_up_study import plan, with_names

from mgvq.analysis.html import write_html
from mgvq.analysis.records.collect import collect
from mgvq.analysis.records.layers import collect_layers
from mgvq.analysis.records.records import read_record, write_record
from mgvq.analysis.report import write_figures, write_tables
from mgvq.cli import report
from mgvq.cli.study import _plan
from mgvq.errors import UserError
from mgvq.runs.compose import _composed, composer, with_variants
from mgvq.runs.identity import run_id
from mgvq.runs.overrides import parsed
from mgvq.studies.plan import expand
from mgvq.studies.spec import Study, read_studies, read_study

GOOD = """\
name: quick
question: does it run?
arms:
  first: [method=rtn]
  second: [method=kmeans]
seeds: [0, 1]
"""
TWO_LISTS = 'baseline: [first, "a b", "a_b"]\n'

# A file, and what the refusal names. A new input is a line.
BAD = {
    "empty": ("", "is no study file: it is empty"),
    "only a comment": ("# nothing\n", "it is empty"),
    "a list": ("- name: quick\n", "it is a list"),
    "a word": ("quick\n", "it is a single value"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\x00\xff", "cannot be read as YAML"),
    "null bytes": (b"name: a\x00b\n", "cannot be read as YAML"),
    "UTF-16": (GOOD.encode("utf-16"), "cannot be read as YAML"),
    "a tab": (GOOD.replace("  first", "\tfirst"), "cannot be read as YAML"),
    "cut short": (GOOD[:70], "lacks|cannot be read as YAML"),
    "contains itself": (GOOD + "grid: &x {model: [*x]}\n", "contains itself|recursive"),
    "two arms of one name": (GOOD.replace("second:", "first:"), "'first' stands 2 times as an arm, in lines 4 and 5"),
    "two names": (GOOD + "name: other\n", "'name' stands 2 times as a key, in lines 1 and 7"),
    "a grid key twice": (GOOD + "grid: {model: [a], model: [b]}\n", "'model' stands 2 times as a key, in line 7"),
    "a seed twice": (GOOD.replace("[0, 1]", "[0, 0]"), "'0' stands 2 times as a seed, in line 6"),
    "a seed twice, in lines": (GOOD.replace("[0, 1]", "\n- 0\n- 1\n- 0"), "'0' stands 2 times as a seed, in lines 7 and 9"),
    "a seed twice at a point": (GOOD.replace("[0, 1]", "{a: [0, 0]}") + "grid: {model: [a]}\n", "'0' stands 2 times as a seed"),
    "a seed twice, spelt otherwise": (GOOD.replace("[0, 1]", "[8, 0x8]"), "seeds of the study names 8 twice"),
    "an arm that is a number": (GOOD.replace("first:", "1:"), "arms has 1, but the name of an arm must be text: write '1'"),
    "an arm that is a truth": (GOOD.replace("first:", "on:"), "arms has True, but the name of an arm must be text"),
    "an arm that is nothing": (GOOD.replace("first:", "null:"), "arms has None"),
    "an arm that is a float": (GOOD.replace("first:", "1.5:"), "arms has 1.5"),
    "an arm that is a date": (GOOD.replace("first:", "2026-11-28:"), "must be text"),
    "an arm without a name": (GOOD.replace("first:", "'':"), "must be named by 1 to 200 characters"),
    "an arm with blanks around it": (GOOD.replace("first:", "' a ':"), "without blanks"),
    "an arm of two lines": (GOOD.replace("first:", '"a\\nb":'), "that can be printed"),
    "an arm with a bell": (GOOD.replace("first:", '"a\\x07":'), "that can be printed"),
    "an arm without a list": (GOOD.replace("[method=rtn]", "method=rtn"), "first must be a list"),
    "an override that is a mapping": (GOOD.replace("[method=rtn]", "[method: rtn]"), "first must list overrides KEY=VALUE"),
    "an override that is a number": (GOOD.replace("[method=rtn]", "[3]"), "first must list overrides"),
    "arms in a list": (GOOD.replace("arms:", "arms: []\nother:"), "unknown key 'other'|arms must be a mapping"),
    "no arms": (re.sub(r"arms:(?s:.*)seeds", "seeds", GOOD), "it lacks arms"),
    "a name outside": (GOOD.replace("name: quick", "name: ../../evil"), "letters, digits"),
    "an absolute name": (GOOD.replace("name: quick", "name: /tmp/evil"), "letters, digits"),
    "a name with a backslash": (GOOD.replace("name: quick", "name: a\\b"), "letters, digits"),
    "a name that is an option": (GOOD.replace("name: quick", "name: -rf"), "letters, digits"),
    "a name with a blank": (GOOD.replace("name: quick", "name: my study"), "letters, digits"),
    "no name": (GOOD.replace("name: quick", "name: ''"), "letters, digits"),
    "a long name": (GOOD.replace("name: quick", f"name: {'a' * 300}"), "letters, digits"),
    "a name that is a number": (GOOD.replace("name: quick", "name: 5"), "name must be text, got 5"),
    "a question that is none": (GOOD.replace("does it run?", "''"), "question is empty"),
    "a question that is a list": (GOOD.replace("does it run?", "[]"), "question must be text"),
    "an unknown key": (GOOD.replace("seeds", "sedes"), "unknown key 'sedes'; did you mean seeds?"),
    "seeds that are words": (GOOD.replace("[0, 1]", "[a]"), "seeds must be whole numbers >= 0, got 'a'"),
    "seeds that are a number": (GOOD.replace("[0, 1]", "3"), "seeds must be a list"),
    "seeds below zero": (GOOD.replace("[0, 1]", "[-1]"), "seeds must be whole numbers >= 0, got -1"),
    "seeds that are truths": (GOOD.replace("[0, 1]", "[true]"), "seeds must be whole numbers >= 0, got True"),
    "no seed at one point": (GOOD.replace("[0, 1]", "{a: [], b: [0]}") + "grid: {model: [a, b]}\n", "seeds of a is empty"),
    "a grid that is a list": (GOOD + "grid: [model]\n", "grid must be a mapping"),
    "a grid key that is a number": (GOOD + "grid: {1: [2]}\n", "grid has 1, but the name of a key of the grid must be text"),
    "a grid without lists": (GOOD + "grid: {model: a}\n", "model must be a list"),
    "a grid value twice": (GOOD + "grid: {budget.bits_per_weight: [2, 2.0]}\n", "budget.bits_per_weight names 2.0 twice"),
    "common that is a word": (GOOD + "common: scope=all\n", "common must be a list"),
    "a baseline that is a number": (GOOD + "baseline: 1\n", "baseline must be the name of an arm"),
    "a baseline that is a mapping": (GOOD + "baseline: {first: 1}\n", "baseline must be the name of an arm"),
    "a baseline twice": (GOOD + "baseline: [first, first]\n", "baseline names first twice"),
    "baselines that share files": (GOOD.replace("  second", "  a b: []\n  a_b: []\n  second") + TWO_LISTS, "_vs_a_b: rename"),
    "a primary that is a list": (GOOD + "baseline: first\nprimary: [second]\n", "primary must be"),
    "only that is a list": (GOOD + "only: [second]\n", "only must be a mapping"),
    "only without keys": (GOOD + "only: {second: [2]}\n", "only second must be"),
    "a seed in an arm": (GOOD.replace("[method=rtn]", "[method=rtn, seed=3]"), "the arm 'first' sets seed, which would have no"),
    "a seed in common": (GOOD + "common: [seed=1]\n", "common sets seed, which would have no effect"),
    "a seed in the grid": (GOOD + "grid: {seed: [1, 2]}\n", "grid sets seed, which would have no effect"),
    "a dry arm": (GOOD.replace("[method=rtn]", "[method=rtn, dry=true]"), "the arm 'first' sets dry, which runs nothing"),
    "seeds of two keys": (
        GOOD.replace("[0, 1]", "{2: [0], 3: [1]}") + "grid: {budget.bits_per_weight: [2, 3], codebook.vector_length: [3, 2]}\n",
        "seeds names 2, 3, which budget.bits_per_weight and codebook.vector_length of the grid both have",
    ),
    "seeds of no key": (GOOD.replace("[0, 1]", "{2: [0], 3: [1]}") + "grid: {threads: [2, 4]}\n", "no key of the grid has"),
    "trainings with unlike seeds": (
        GOOD.replace("[0, 1]", "{a: [0, 1], b: [1]}") + "grid: {model: [a, b]}\ntrainings: model\n", "each value needs as many",
    ),
    "seeds that are texts": (GOOD.replace("[0, 1]", "['0', '1']"), "seeds must be whole numbers >= 0, got '0'"),
    "arms of one look": (GOOD.replace("first:", "\u00fc:").replace("second:", "u\u0308:"), "two arms look like"),
    "code": (GOOD.replace("quick", "!!python/object/apply:os.system [ls]"), "could not determine a constructor"),
    "two documents": (GOOD + "---\n" + GOOD, "cannot be read as YAML"),
    "brackets without end": ("name: " + "[" * 3000, "cannot be read as YAML"),
    "spread that is a number": (GOOD + "spread: 1\n", "spread must be text"),
}  # fmt: skip


def test_the_tracker_of_the_command_line_wins_over_the_files() -> None:
    study = Study(name="s", question="?", common=["method=rtn", "tracker=wandb"], arms={"a": []}, seeds=[0])
    for named, found in ((None, "wandb"), ("csv", "csv")):
        plan = _plan(study, Namespace(overrides=[], dry=True, tracker=named, recorded=False))
        assert [run.cfg.variants.tracker for run in plan.runs] == [found]


def test_seeds_are_those_of_the_key_that_has_the_values() -> None:
    """Whatever other keys have."""
    grid = {"codebook.vector_length": [2, 4], "budget.bits_per_weight": [2, 3]}
    study = Study(name="s", question="?", arms={"a": []}, seeds={2: [0, 1, 2], 3: [0]}, grid=grid)
    found = {tuple(point.values()): study.seeds_at(point) for point in study.points()}
    assert found == {(2, 2): [0, 1, 2], (2, 3): [0], (4, 2): [0, 1, 2], (4, 3): [0]}


@pytest.mark.parametrize("content", BAD.values(), ids=list(BAD))
def test_a_study_file_that_lies_is_refused(content: tuple[str | bytes, str], tmp_path: Path) -> None:
    text, named = content
    path = tmp_path / "study.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=named) as caught:
        read_study(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_a_study_file_may_have_a_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").replace("run?", "gr\u00fcn?").encode())
    assert read_study(path).question == "does it gr\u00fcn?"


# What `also` may name wrongly, and what is said of it. A new input is a line.
ALSO: dict[str, tuple[str, str]] = {
    "no list": ("also: other.yaml\n", "also must be a list of study files"),
    "a number": ("also: [1]\n", "also must list study files as text, got 1"),
    "a file that is not there": ("also: [gone.yaml]\n", "gone.yaml is no study file"),
    "itself": ("also: [study.yaml]\n", "study.yaml, which has `also` of its own"),
    "a study of the same name": ("also: [same.yaml]\n", "whose study is called quick too"),
}


@pytest.mark.parametrize("case", ALSO.values(), ids=list(ALSO))
def test_studies_that_do_not_go_together_are_refused(case: tuple[str, str], tmp_path: Path) -> None:
    text, named = case
    (tmp_path / "same.yaml").write_text(GOOD)
    (tmp_path / "study.yaml").write_text(GOOD + text)
    with pytest.raises(UserError, match=named):
        read_studies(tmp_path / "study.yaml")


# Values of a grid that mean something to Hydra's grammar. A new input is a line.
VALUES = (
    "/a/b=c", "[a]", "a, b", "{a: b}", "a(b)", "glob(*)", "~a", "a:b", "", " a ", "it's", '"', "\\", "a\\", 'a\\"b', "C:\\a b\\",
    "\u00fc\u4e2d", "a\tb", "a#b", "50 %", "$x", "*", "a\u2028b", "a|b",
)  # fmt: skip


@pytest.mark.parametrize(
    "value", [*VALUES, list(VALUES), 3, 0.5, 1e-30, True, None, [], [-1, 0.5, None], [["a=b"]], {"a": "b=c"}]
)
def test_a_value_of_a_grid_reaches_the_run_as_it_is(value: object) -> None:
    study = Study(name="s", question="?", arms={"a": []}, seeds=[0], grid={"key": [value]})
    (word,) = study.overrides("a", {"key": value})
    read = parsed(word)
    assert not read.is_sweep_override()
    assert (read.key_or_group, read.value()) == ("key", value)
    assert type(read.value()) is type(value)


def test_a_number_that_yaml_takes_for_text_is_a_number() -> None:
    study = Study(name="s", question="?", arms={"a": []}, seeds=[0], grid={"key": [yaml.safe_load("1e-3")]})
    assert parsed(study.overrides("a", study.points()[0])[0]).value() == 0.001


def test_a_path_of_a_grid_is_that_of_the_run(tmp_path: Path) -> None:
    path, file = str(tmp_path / "a=b, [c] (d)"), tmp_path / "study.yaml"
    text = {"name": "s", "question": "?", "common": ["model=local"], "arms": {"a": ["method=rtn"]}, "seeds": [0]}
    copy(Path(path))
    file.write_text(yaml.safe_dump({**text, "grid": {"model.path": [path]}}))
    (planned,) = expand(read_study(file))
    assert planned.cfg.model.path == path
    file.write_text(yaml.safe_dump({**text, "common": ["model=local", f"model.path={path}"]}))
    with pytest.raises(UserError, match=r"study s, arm a .* cannot be read: .* stands in quotes") as caught:
        expand(read_study(file))
    assert f"'model.path=\"{path}\"'" in str(caught.value)


def test_the_command_refuses_in_one_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(b"\x00\xff")
    monkeypatch.setattr(sys, "argv", ["mgvq-report", str(path)])
    with pytest.raises(SystemExit) as exited:
        report.main()
    assert exited.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"mgvq-report: {path} is no study file")
    assert told.count("\n") == 1


ODD = (
    "1",
    "a|b",
    "**bold** `code`",
    "<script>alert(1)</script>",
    "50 % & {x}_y^2 ~ #1",
    "$x$ and $\\frac$",
    "back\\slash",
    '"quoted", comma',
    "=1+1",
    "\u00fc\u4e2d",
)


@pytest.mark.parametrize("name", ODD)
def test_odd_names_of_arms_leave_tables_whole(name: str, tmp_path: Path) -> None:
    study = with_names("full", name, "other")
    runs = plan(tmp_path, study)
    write_record(collect(study, runs), tmp_path / "records" / "made_up.parquet")
    record = read_record(tmp_path / "records" / "made_up.parquet")
    assert record.arms == ("full", name, "other")
    files = {file.name: file.read_text(encoding="utf-8") for file in write_tables("made_up", record, tmp_path)}
    table = [line for line in files["made_up.md"].splitlines() if line.startswith("|")]
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert len(bars) == 1, "every line has as many cells"
    assert "<script>" not in files["made_up.md"].replace(r"\<script>", "").split("\n\nvs baseline")[0]
    lines = list(csv.DictReader(io.StringIO(files["made_up.csv"])))
    assert [line["arm"] for line in lines] == ["full", name, "other"] * 2
    assert {line["runs"] for line in lines} == {"1", "3"}
    body = [line for line in files["made_up.tex"].splitlines() if line.endswith(r"\\")]
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in body}) == 1
    assert not re.search(r"(?<!\\)[%#~^|]", "".join(body).replace(r"\textasciitilde{}", ""))
    assert write_figures("made_up", record, collect_layers(runs), tmp_path)
    page = write_html("made_up", study, record, tmp_path / "page").read_text(encoding="utf-8")
    assert "<script>alert(1)</script>" not in page


def test_a_large_study_has_the_runs_that_are_composed_one_by_one() -> None:
    """Choices of variants are composed once, and values put into copies: whatever Hydra makes of the whole line is the same."""
    study = Study(
        name="large",
        question="is it the same?",
        common=["model=tiny_internvl", "scope=language", "evaluation.num_questions=8", "tracker=wandb"],
        arms={
            "k-means": ["method=kmeans", "codebook.sample=64"],
            "other": ["method=gptq", "++evaluation.seed=5", "calibration.num_images=4"],
            "table": ["method=kmeans", "codebook=lattice", "threads=2"],
        },
        grid={"budget.bits_per_weight": [2, 3.0], "outliers": [0, 1]},
        seeds=[0, 7, 8],
    )
    runs = expand(study)
    assert len(runs) == 3 * 4 * 3
    with composer():
        for run in random.Random(0).sample(runs, 5):
            whole = with_variants(*_composed(*run.overrides))
            assert run.folder.path.name == run_id(whole)
            assert run.cfg == whole
