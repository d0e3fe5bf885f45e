"""The notebooks run from top to bottom, and are committed without what they print."""

from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, sampled
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


@pytest.mark.slow
@pytest.mark.parametrize("file", sampled(NOTEBOOKS, 1), ids=lambda file: file.stem)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # jupyter's sockets
def test_a_notebook_runs_headless(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MGVQ_RESULTS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(file.parent)}}).execute()
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


@each
def test_a_notebook_is_committed_stripped(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count, cell.metadata) == ([], None, {}), "clear all outputs, then save"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


def test_there_are_notebooks() -> None:
    assert [file.stem[:2] for file in NOTEBOOKS] == ["01", "02", "03", "04"]
