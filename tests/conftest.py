"""Small models and one finished run, shared by the tests that need them."""

import hashlib
import json
import os
import random
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import checked_calls
import pandas as pd
import pytest
import torch
from forks import shared_forks

from mgvq.model.source import SHIPPED
from mgvq.runs.places import register_resolvers

FAMILIES = tuple(sorted(f.parent.name for f in SHIPPED.glob("*/model.safetensors")))
ROOT = Path(__file__).parents[1]

register_resolvers()
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Annotations are checked at the first calls in every test."""
    checked_calls.new_test()


def sampled(cases: Iterable[Any], number: int) -> list[Any]:
    """All cases for `parametrize`, of which `make test` runs a seeded sample and `make trust` the others (-m trust)."""
    whole = [case if isinstance(case, tuple) else (case,) for case in cases]
    kept = set(random.Random(0).sample(range(len(whole)), min(number, len(whole))))
    return [pytest.param(*case, marks=() if at in kept else pytest.mark.trust) for at, case in enumerate(whole)]


def documented_columns(table: str) -> list[str]:
    """The columns of a file of a run folder, `blocks.parquet` say, in the order in which docs/run_folder.md explains them."""
    section = (ROOT / "docs" / "run_folder.md").read_text().split(f"\n## {table} ")[1].split("\n## ")[0]
    return [name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]


def run_command(module: str, *arguments: str, results: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments` with its results in `results`; with `check` it has to succeed.

    It is a fork of a process that has imported everything, as are the runs that a study starts.
    """
    done = subprocess.run(
        [str(shared_forks().python), "-m", module, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MGVQ_RESULTS": str(results)},
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def declare_done(folder: Path) -> None:
    """Write DONE as a run does last of all: the digests of the files beside it."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "DONE"]
    digests = {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (folder / "DONE").write_text(json.dumps(digests))


def write_finished_run(
    folder: Path, samples: pd.DataFrame, metrics: Mapping[str, Any], identity: str = "{}", **tables: pd.DataFrame
) -> None:
    """Write a run folder that counts as finished: samples, metrics, and further `tables` by the names of their files.

    What most made-up runs have in common need not be among the metrics: 2 bits, seconds, no flags.
    """
    common = {"bits/quantized_layers": 2.0, "bits/model": 3.0, "time/quantize_s": 20.0, "time/evaluate_s": 30.0}
    folder.mkdir(parents=True)
    for name, table in {"samples": samples, **tables}.items():
        table.to_parquet(folder / f"{name}.parquet")
    (folder / "metrics.json").write_text(json.dumps({**common, "rate": "2x16", "flags": [], **metrics}))
    (folder / "identity.json").write_text(identity)
    (folder / "config.yaml").write_text("scope: all\n")
    declare_done(folder)


def layer_problems(sites, *, weights=None, metrics=None, scores=None, groups=None):
    """A `LayerProblem` for every site; what is not given is zeros, no metric, and one group."""
    from mgvq.types import LayerProblem

    problems = {}
    for s in sites:
        weight = torch.zeros(()).expand(s.out_features, s.in_features) if weights is None else weights[s]
        score = torch.zeros(s.in_features) if scores is None else scores[s]
        group = torch.zeros(s.in_features, dtype=torch.long) if groups is None else groups[s]
        metric = (metrics or {}).get(s)
        problems[s] = LayerProblem(site=s, weight=weight, target=weight, metric=metric, score=score, groups=group)
    return problems


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each shipped model in turn."""
    return request.param


@pytest.fixture(scope="session")
def loaded(family: str):
    """The family's model with its processor."""
    from mgvq.model.load import load
    from mgvq.model.source import SHIPPED, Source

    source = Source(name=family, path=str(SHIPPED / family), revision=None, dtype="float32")
    return load(source, torch.device("cpu"))


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a finished k-means run with 52 test questions, for each shipped model; one process has run all."""
    results = tmp_path_factory.mktemp("finished")
    words = (f"model={','.join(FAMILIES)}", "method=kmeans", "evaluation.num_questions=52")
    run_command("mgvq.cli.run", "-m", *words, results=results)
    folders = [file.parent for file in results.glob("runs/*/DONE")]
    return {json.loads((folder / "identity.json").read_text())["model"]["name"]: folder for folder in folders}


@pytest.fixture(scope="session")
def finished(family: str, finished_runs: dict[str, Path]) -> Path:
    """The folder of a finished k-means run of the model with 52 test questions."""
    return finished_runs[family]
