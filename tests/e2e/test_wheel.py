"""The wheel carries configuration and models, runs from anywhere, and its runs say which version they are of."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from conftest import FAMILIES, ROOT

import mgvq

STUDY = (
    "{name: mine, question: 'does it run?', arms: {rtn: [method=rtn]}, seeds: [0], grid: {model: [tiny_internvl, tiny_smolvlm]}}"
)


def test_an_installed_wheel_finds_its_configuration_and_models(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("mgvq-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "mgvq/conf/config.yaml").is_file()
    for family in FAMILIES:
        assert (site / "mgvq/model/tiny" / family / "model.safetensors").is_file()
    code = (
        "import mgvq, sys; from mgvq.runs.places import conf_folder, results_folder; from mgvq.runs.provenance import provenance;"
        "print(mgvq.__file__, conf_folder(), results_folder(), sep='\\n');"
        "print(*(provenance()[key] for key in ('version', 'commit', 'dirty')))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "MGVQ_RESULTS"} | {"PYTHONPATH": str(site)}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": True}
    places = subprocess.run([sys.executable, "-c", code], **run)
    found = [str(site / "mgvq/__init__.py"), str(site / "mgvq/conf"), str(tmp_path / "results")]
    assert places.stdout.split() == [*found, mgvq.__version__, "None", "None"]
    shown = subprocess.run([sys.executable, "-m", "mgvq.cli.run", "method=kmeans", "--cfg", "job", "--resolve"], **run)
    assert f"path: {site}/mgvq/model/tiny/tiny_internvl" in shown.stdout
    (tmp_path / "study.yaml").write_text(STUDY)
    planned = subprocess.run([sys.executable, "-m", "mgvq", "study", "study.yaml", "--dry"], **run)
    assert "2 runs, 0 done, 2 to run" in planned.stdout
    assert planned.stdout.count(f"missing {tmp_path}/results/runs/") == 2
