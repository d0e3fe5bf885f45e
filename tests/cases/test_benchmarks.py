"""Rows of benchmarks that are not what a task asks for: told before a model is loaded. A new input is a line in a table."""

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "e2e"))
from hub_copies import ROWS, write

from mgvq.errors import UserError
from mgvq.evaluation.suite import Suite

TASK, DATASET = "mmstar", "Lin-Chen/MMStar"


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hub"))


def hurt(copies: Path, folder: Path, change: Callable[[pd.DataFrame], Any]) -> Suite:
    """The task on a copy of its dataset in which something is wrong with row 3."""
    shutil.copytree(copies / DATASET, folder / DATASET)
    file = next((folder / DATASET).rglob("*.parquet"))
    table = pq.read_table(file)
    rows = table.to_pandas()
    change(rows)
    pq.write_table(pa.Table.from_pandas(rows, schema=table.schema), file)  # the schema says which column is of images
    return Suite(tasks=[TASK], max_new_tokens={TASK: 8}, limit=None, seed=0, batch_size=4, data=str(folder))


def put(column: str, value: Any) -> Callable[[pd.DataFrame], Any]:
    def change(rows: pd.DataFrame) -> None:
        rows.at[3, column] = value

    return change


ENDS = {
    "no image": (put("image", None), "row 3: .*image"),
    "no bytes": (put("image", {"bytes": None, "path": None}), "row 3: .*image"),
    "an empty question": (put("question", "  "), "row 3: "),
    "no question": (put("question", None), "row 3: "),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_row_that_would_end_the_evaluation_is_refused_before(case: str, copies: Path, tmp_path: Path) -> None:
    change, named = ENDS[case]
    with pytest.raises(UserError, match=rf"mmstar reads .*{named}"):
        hurt(copies, tmp_path, change).check()


@pytest.mark.parametrize("image", [b"", b"no image", b"\x89PNG\r\n\x1a\n\x00\x00"], ids=["empty", "text", "cut"])
def test_an_image_that_cannot_be_read_costs_its_question(
    image: bytes, copies: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        hurt(copies, tmp_path, put("image", {"bytes": image, "path": None})).check()
    assert f"mmstar: 1 of {ROWS} questions will count as not answered" in caplog.text
    assert "the first is row 3" in caplog.text


def test_other_data_in_the_place_of_what_was_read_is_read_anew(copies: Path, tmp_path: Path) -> None:
    """The library knows datasets by their README, and would give what it has read elsewhere, or before."""
    asked = {}
    for text in ("first?", "other?", "first?"):
        shutil.rmtree(tmp_path / DATASET, ignore_errors=True)
        task = hurt(copies, tmp_path, put("question", text))._load(TASK)
        asked[text] = [doc["question"] for doc, _ in task.rows()][3]
    assert asked == {"first?": "first?", "other?": "other?"}
