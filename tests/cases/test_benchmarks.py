"""Rows of benchmarks that are not what a task asks for: told before a model is loaded. A new input is a line in a table."""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(ROOT / "tests" / "e2e"))
from hub_copies import ROWS, write

from mgvq.errors import UserError
from mgvq.evaluation.suite import Suite
from mgvq.model.generate import Reply
from mgvq.model.image import Question, Unaskable

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


def put(column: str, value: Any, row: int = 3) -> Callable[[pd.DataFrame], Any]:
    def change(rows: pd.DataFrame) -> None:
        rows.at[row, column] = value

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


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("image", [b"", b"no image", b"\x89PNG\r\n\x1a\n\x00\x00"], ids=["empty", "text", "cut"])
def test_an_image_that_cannot_be_read_costs_its_question(
    image: bytes, row: int, copies: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        hurt(copies, tmp_path, put("image", {"bytes": image, "path": None}, row)).check()
    assert f"mmstar: 1 of {ROWS} questions will count as not answered" in caplog.text
    assert f"the first is row {row}" in caplog.text


first_image = put("image", {"bytes": b"no image", "path": None}, 0)


def every_image(rows: pd.DataFrame) -> None:
    rows["image"] = [{"bytes": b"no image", "path": None}] * len(rows)


@pytest.mark.parametrize(("change", "number"), [(first_image, 1), (every_image, ROWS)], ids=["first", "all"])
def test_questions_whose_images_cannot_be_read_are_not_answered(
    change: Callable[[pd.DataFrame], Any], number: int, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are, whichever comes first."""

    def replies(_: Any, __: Any, asked: Sequence[Question], *___: Any) -> list[Reply]:
        found = []
        for at in range(len(asked)):
            try:
                found.append(Reply("A" if asked[at] else ""))
            except Unaskable as error:
                found.append(Reply("", refused=str(error)))
        return found

    monkeypatch.setattr("mgvq.evaluation.harness.generate", replies)
    hurt_suite = hurt(copies, tmp_path, change)
    hurt_suite.check()
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    nobody = LlamaForCausalLM(LlamaConfig(**sizes))
    result = hurt_suite(nobody, None, None, "no weights")
    assert result.flags == (f"unanswered:{TASK}:{number}",)
    assert (result.samples.prediction == "A").sum() == ROWS - number


def test_a_column_of_images_under_another_name_is_refused_though_the_first_image_is_damaged(copies: Path, tmp_path: Path) -> None:
    chosen = hurt(copies, tmp_path, first_image)
    file = next((tmp_path / DATASET).rglob("*.parquet"))
    table = pq.read_table(file)
    schema = json.loads(table.schema.metadata[b"huggingface"])
    schema["info"]["features"] = {("picture" if k == "image" else k): v for k, v in schema["info"]["features"].items()}
    table = table.rename_columns(["picture" if name == "image" else name for name in table.column_names])
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(schema)}), file)
    with pytest.raises(UserError, match=r"mmstar reads .*KeyError: 'image'"):
        chosen.check()


def test_other_data_in_the_place_of_what_was_read_is_read_anew(copies: Path, tmp_path: Path) -> None:
    """The library knows datasets by their README, and would give what it has read elsewhere, or before."""
    asked = {}
    for text in ("first?", "other?", "first?"):
        shutil.rmtree(tmp_path / DATASET, ignore_errors=True)
        task = hurt(copies, tmp_path, put("question", text))._load(TASK)
        asked[text] = [doc["question"] for doc, _ in task.rows()][3]
    assert asked == {"first?": "first?", "other?": "other?"}
