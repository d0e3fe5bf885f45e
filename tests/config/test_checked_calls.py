"""The suite holds functions to their annotations: at the first calls in every test, and not at 40,000 more."""

from typing import Any

import checked_calls
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from mgvq.linalg import row_runs

WRONG: Any = np.int64(4)  # works as a number of rows, and is no int


def test_a_call_against_the_annotations_is_an_error() -> None:
    with pytest.raises(TypeCheckError, match="row_runs"):
        row_runs(WRONG, 2)


def test_later_calls_of_a_test_go_without_and_the_next_test_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_calls, "CHECKED", 2)
    checked_calls.new_test()
    for _ in range(2):
        with pytest.raises(TypeCheckError):
            row_runs(WRONG, 2)
    assert len(row_runs(WRONG, 2)) == 2
    checked_calls.new_test()
    with pytest.raises(TypeCheckError):
        row_runs(WRONG, 2)
