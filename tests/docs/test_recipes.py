"""The recipes of the documentation (docs/how_to) work as they are written: files are written, commands run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, documented_columns, sampled

HOW_TO = ROOT / "docs" / "how_to"
RECIPES = sorted(page for page in HOW_TO.glob("*.md") if page.stem != "index")
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COPIED = ("mgvq", "conf", "tests", "experiments", "results/records")


@dataclass(frozen=True)
class Block:
    """A fenced block: a file where it has a title, commands where it is `bash`, a script where it is `python`."""

    language: str
    file: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*groups) for groups in BLOCK.findall(page.read_text())]


def copy_of_the_repository(place: Path) -> Path:
    """What a recipe may read and write; large files are linked, not copied."""

    def link(source: str, target: str) -> None:
        if Path(source).stat().st_size > 100_000:
            Path(target).symlink_to(source)
        else:
            shutil.copy(source, target)

    for name in COPIED:
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"), copy_function=link)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, place)
    return place


def command(words: list[str]) -> list[str]:
    """`mgvq-run` and its sisters, and pytest, of this Python."""
    program, *arguments = words
    if program.startswith("mgvq-"):
        return [sys.executable, "-m", f"mgvq.cli.{program.removeprefix('mgvq-')}", *arguments]
    if program == "pytest":
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("page", sampled(RECIPES, 1), ids=lambda page: page.stem)
def test_a_recipe_works_as_it_is_written(page: Path, tmp_path: Path) -> None:
    place = copy_of_the_repository(tmp_path / "copy")
    kept = {name: value for name, value in os.environ.items() if name not in ("MGVQ_RESULTS", "PYTEST_ADDOPTS")}
    environment = {**kept, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}

    def run(words: list[str]) -> None:
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    for block in blocks(page):
        if block.file:
            (place / block.file).parent.mkdir(parents=True, exist_ok=True)
            assert not (place / block.file).exists(), f"{block.file} is there already"
            (place / block.file).write_text(block.text)
        elif block.language == "python":
            run([sys.executable, "-c", block.text])
        elif block.language == "bash":
            for line in block.text.splitlines():
                run(command(shlex.split(line)))
    for table in place.glob("results/runs/*/*.parquet"):
        assert list(pd.read_parquet(table).columns) == documented_columns(table.name), f"docs/run_folder.md: {table.name}"


def test_every_recipe_does_something() -> None:
    assert len(RECIPES) >= 6
    for page in RECIPES:
        languages = {block.language for block in blocks(page) if not block.file}
        assert languages & {"bash", "python"}, f"{page.name} runs nothing"
        assert any(block.file for block in blocks(page)), f"{page.name} writes nothing"
    index = (HOW_TO / "index.md").read_text()
    assert all(f"({page.name})" in index for page in RECIPES)
