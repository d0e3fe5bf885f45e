"""The same runs, wherever they happen: equal checkpoints under every launcher of studies and of Hydra's multirun."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, run_command, sampled

COMMON = (
    "model=tiny_internvl",
    "scope=language_projector",
    "evaluation.num_questions=40",
    "evaluation.answers=forced",
    "method=rtn",
)
STUDY = f"""
name: tiny
question: is it the same everywhere?
common: [{", ".join(COMMON)}]
arms: {{two bits: [budget.bits_per_weight=2], three bits: [budget.bits_per_weight=3]}}
seeds: [0]
"""


@pytest.fixture(autouse=True)
def _not_nice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers run at niceness 15, which next to another test means hardly at all."""
    monkeypatch.setenv("RAY_worker_niceness", "0")


def digests(results: Path) -> dict[str, str]:
    """The digests of the checkpoints and the answers of all finished runs, by run."""
    found = {}
    for done in sorted(results.glob("runs/*/DONE")):
        written = json.loads(done.read_text())
        found |= {f"{done.parent.name}/{name}": written[name] for name in ("checkpoint/mgvq.safetensors", "samples.parquet")}
    return found


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (file := tmp_path_factory.mktemp("tiny") / "study.yaml").write_text(STUDY)
    return file


@pytest.fixture(scope="module")
def expected(study: Path) -> dict[str, str]:
    """Two local studies, started at once on one folder: each run is done by one of them."""
    results = study.parent / "results"
    command = [sys.executable, "-m", "mgvq.cli.study", str(study), "--jobs", "2"]
    both = [
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, "MGVQ_RESULTS": str(results)}, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0].split("\n\n", 1)[1] == outputs[1][0].split("\n\n", 1)[1], "the same table"
    assert sum(errors.count(" done after ") for _, errors in outputs) == 2, outputs
    found = digests(results)
    assert len(found) == 4
    return found


def needs(package: str, extra: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'mgvq[{extra}]'")


@pytest.mark.parametrize(
    ("launcher", "package", "settings"),
    [("slurm", "submitit", "cluster: local"), pytest.param("ray", "ray", "cpus: 1", marks=pytest.mark.trust)],
)
def test_a_study(launcher: str, package: str, settings: str, study: Path, expected: dict[str, str], tmp_path: Path) -> None:
    needs(package, launcher)
    (tmp_path / "settings.yaml").write_text(settings)
    words = ("--launcher", launcher, "--launcher-config", str(tmp_path / "settings.yaml"), "--jobs", "2")
    run_command("mgvq.cli.study", str(study), *words, results=tmp_path)
    assert digests(tmp_path) == expected


@pytest.mark.parametrize(("launcher", "extra"), sampled([("joblib", "joblib"), ("submitit_local", "slurm"), ("ray", "ray")], 1))
def test_a_multirun(launcher: str, extra: str, expected: dict[str, str], tmp_path: Path) -> None:
    needs(f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher", extra)
    words = ("-m", f"hydra/launcher=mgvq_{launcher}", *COMMON, "budget.bits_per_weight=2,3")
    done = run_command("mgvq.cli.run", *words, results=tmp_path)
    assert digests(tmp_path) == expected
    assert "Warning" not in done.stderr
