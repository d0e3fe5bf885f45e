"""Imports go one way: commands, studies and analysis, runs, pipeline, stages, model, leaves."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mgvq"
STAGES = (
    "calibration",
    "curvature",
    "sensitivity",
    "grouping",
    "allocation",
    "codebook",
    "compensation",
    "transform",
    "prefix",
    "tuning",
    "checkpoint",
    "evaluation",
)
# Each may import itself and what stands below it.
LAYERS = [["__main__"], ["cli"], ["analysis"], ["studies"], ["runs"], ["quantization"], ["refit", "export"],
          list(STAGES), ["model"], ["protocols"], ["types", "tracker"],
          ["data", "formats", "linalg", "rng", "progress", "ranks"], ["checks", "digest"],
          ["kernels"],
          ["trellis", "lattice", "rotation", "rate_distortion", "distortion"], ["compiled", "errors", "memory"]]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
HYDRA_ALLOWED = ("cli", "studies", "runs")
MODULES = sorted(f for f in PACKAGE.rglob("*.py") if f != PACKAGE / "__init__.py")


def imported(file: Path) -> set[str]:
    """Dotted names of everything that the file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def room(path: str) -> str:
    return path.split(".")[1]


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    here = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert here in RANK, f"{here} has no layer; give it one here"
    for name in imported(file):
        if name.startswith("mgvq."):
            there = room(name)
            assert there == here or RANK[there] > RANK[here], f"{here} imports {name}"
        if name.split(".")[0] in ("hydra", "omegaconf"):
            assert here in HYDRA_ALLOWED, f"{here} imports {name}: configurations stay in {HYDRA_ALLOWED}"


def test_instantiate_is_called_in_one_place() -> None:
    users = [f for f in MODULES if "hydra.utils" in imported(f)]
    assert [f.relative_to(PACKAGE).as_posix() for f in users] == ["runs/build.py"]
