"""Text is UTF-8 whatever the locale: no file is read or written in that of the machine, and umlauts may stand anywhere."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from made import copy

from mgvq.runs.store import RunFolder

SOURCES = [f for room in ("mgvq", "experiments", "benchmarks", "docs/hooks") for f in sorted((ROOT / room).rglob("*.py"))]


def without_encoding(text: str) -> list[str]:
    """The calls that read or write text in the encoding of the machine."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and _lacks(node)]


def _lacks(call: ast.Call) -> bool:
    given = {word.arg: word.value for word in call.keywords}
    if "encoding" in given:
        return False
    of_an_object = isinstance(call.func, ast.Attribute)
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text") and of_an_object:
        return True
    if name in ("run", "Popen", "check_output") and "text" in given:
        return True
    modes = [
        node.value for node in (*call.args, *given.values()) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    short = [mode for mode in modes if set(mode) <= set("rwaxbt+")]
    return name == "open" and any("b" not in mode for mode in short)


@pytest.mark.parametrize(
    "text",
    ["f.read_text(None)", "f.write_text(x)", "open(f, 'w')", "f.open('a')", "f.open(mode='r')", "run(c, text=True)",
     "f.read_text(errors='replace')"],
)  # fmt: skip
def test_what_lacks_an_encoding_is_found(text: str) -> None:
    assert without_encoding(text)
    assert not without_encoding(text.replace(")", ", encoding='utf-8')"))


@pytest.mark.parametrize("text", ["f.open('rb')", "f.read_bytes()", "os.open(f, os.O_RDONLY)", "launcher.open(logs)"])
def test_bytes_have_none(text: str) -> None:
    assert not without_encoding(text)


def test_every_text_file_is_read_and_written_as_utf_8() -> None:
    assert len(SOURCES) > 200
    found = {
        str(file.relative_to(ROOT)): calls for file in SOURCES if (calls := without_encoding(file.read_text(encoding="utf-8")))
    }
    assert not found


STUDY = """\
name: umlaut
question: L\u00e4uft es?
common: [model=local, 'model.path="{model}"', method=rtn, evaluation.num_questions=26, evaluation.answers=forced]
arms:
  gr\u00f6\u00dfer \u4e2d: []
seeds: [0]
"""


def studied(place: Path, *options: str) -> str:
    """What `mgvq-study` prints of a study whose paths and texts have umlauts, in the locale C."""
    study = place / "\u00fcbung.yaml"
    study.write_text(STUDY.format(model=copy(place / "gr\u00f6\u00dfe")), encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT), "MGVQ_RESULTS": str(place / "r")}
    command = [sys.executable, "-m", "mgvq", "study", str(study), *options]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode("utf-8")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "\u00fcberall").mkdir()
    return tmp_path / "\u00fcberall"


def test_a_study_is_planned_in_a_locale_that_knows_no_umlaut(place: Path) -> None:
    said = studied(place, "--dry")
    assert "L\u00e4uft es?" in said
    assert f"missing {place}/r/runs/" in said
    assert f'model.path="{place}/gr\u00f6\u00dfe"' in said


@pytest.mark.trust
def test_a_study_and_its_run_stand_a_locale_that_knows_no_umlaut(place: Path) -> None:
    assert "gr\u00f6\u00dfer \u4e2d" in studied(place)
    (done_file,) = (place / "r" / "runs").glob("*/DONE")
    RunFolder(done_file.parent).verify()
