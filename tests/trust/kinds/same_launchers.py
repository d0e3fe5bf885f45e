"""The same settings wherever they are started: two local processes, Slurm's and Ray's workers, joblib's under Hydra's multirun,
and, block by block, with `memory=streamed`. All have the bytes of a run that was started by itself."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import yaml
from compared import CALIBRATED, PLAIN, QUICK, differing, number_equal, run_files
from forks import RUN, shared_forks
from trials import Outcome

KMEANS = (*QUICK, "method=kmeans", "codebook.sample=64")
PREFIX = (*CALIBRATED[:-1], "calibration.heldout_images=4", "compensation=hessian", "prefix=quantized")
METHODS = (PLAIN, CALIBRATED, KMEANS, PREFIX)
STUDY = {
    "name": "everywhere",
    "question": "is it the same everywhere?",
    "common": list(QUICK),
    "arms": {str(number): list(words[len(QUICK) :]) for number, words in enumerate(METHODS)},
    "seeds": [0],
}
# By the package that a launcher needs: its name, and its settings.
OF_STUDIES = {"joblib": ("local", {}), "submitit": ("slurm", {"cluster": "local"}), "ray": ("ray", {"cpus": 1})}
OF_MULTIRUNS = {"hydra_plugins.hydra_joblib_launcher": "mgvq_joblib"}
WHOLE, SAMPLE = len(OF_STUDIES) + len(OF_MULTIRUNS) + 1, 0  # `make test` has the launchers: tests/e2e/test_launchers.py


def missing() -> str:
    return ""


def trials(scratch: Path, number: int) -> Iterator[Outcome]:
    wanted = _alone(scratch / "alone")
    (study := scratch / "study.yaml").write_text(yaml.safe_dump(STUDY))
    every = [
        *(_study(package, launcher, settings, study, wanted) for package, (launcher, settings) in OF_STUDIES.items()),
        *(_multirun(package, launcher, scratch, wanted) for package, launcher in OF_MULTIRUNS.items()),
    ]
    yield from every[:number]
    if number > len(every):
        yield _compared("streamed, block by block", _alone(scratch / "streamed", "memory=streamed"), wanted)


def _alone(results: Path, *further: str) -> dict[str, str]:
    for words in METHODS:
        if (ended := shared_forks().run((*words, *further), results)).status:
            raise RuntimeError(ended.output)
    return run_files(results)


def _study(package: str, launcher: str, settings: Mapping[str, object], study: Path, wanted: Mapping[str, str]) -> Outcome:
    case = f"a study's runs, launcher {launcher}"
    if find_spec(package) is None:
        return Outcome(case, not_run=f"{package} is not installed.")
    (file := study.with_name(f"{launcher}.yaml")).write_text(yaml.safe_dump(dict(settings)))
    results = study.with_name(launcher)
    given = ["--launcher", launcher, *(["--launcher-config", str(file)] if settings else []), "--jobs", "2"]
    _started("mgvq.cli.study", [str(study), *given], results)
    return _compared(case, run_files(results), wanted)


def _multirun(package: str, launcher: str, scratch: Path, wanted: Mapping[str, str]) -> Outcome:
    case = f"a multirun, hydra/launcher={launcher}"
    if find_spec(package) is None:
        return Outcome(case, not_run=f"{package} is not installed.")
    results = scratch / launcher
    for words in METHODS:
        _started(RUN, ["-m", f"hydra/launcher={launcher}", *words], results)
    return _compared(case, run_files(results), wanted)


def _started(module: str, words: list[str], results: Path) -> None:
    environment = {**os.environ, "MGVQ_RESULTS": str(results), "RAY_worker_niceness": "0"}
    subprocess.run([sys.executable, "-m", module, *words], env=environment, capture_output=True, check=True)


def _compared(case: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> Outcome:
    return Outcome(case, compared=len(wanted), equal=number_equal(found, wanted), wrong=differing(found, wanted))
