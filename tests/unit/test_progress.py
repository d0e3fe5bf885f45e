"""What a loop tells of itself in a log, and what a study reads of it."""

import logging

import pytest

from mgvq import progress as module
from mgvq.progress import Counted, chained, last_told, peak_gb, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test sets."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: False)
    return now


def test_the_outermost_loop_says_where_it_is_and_what_is_left(clock, caplog) -> None:
    caplog.set_level(logging.INFO)
    for _block in progress(["a", "b", "c", "d"], "blocks"):
        for _layer in progress([1, 2], "layers"):
            clock[0] += 30
    told = [last_told(message) for message in caplog.messages]
    assert [(t.done, t.total, t.what, t.minutes_left) for t in told] == [
        (1, 4, "blocks", 3.0),
        (2, 4, "blocks", 2.0),
        (3, 4, "blocks", 1.0),
    ]
    assert told[0].peak_gb == pytest.approx(peak_gb(), rel=0.5)


def test_a_quick_loop_and_one_of_unknown_length_say_nothing(clock, caplog) -> None:
    caplog.set_level(logging.INFO)
    for _ in progress(range(100), "batches"):
        clock[0] += 0.1
    for _ in progress((n for n in range(3)), "batches"):
        clock[0] += 60
    assert not caplog.messages
    assert last_told("12:00:00 loading a model") is None


def test_what_is_made_item_by_item_may_know_its_number(clock, caplog) -> None:
    caplog.set_level(logging.INFO)
    made = Counted((n for n in range(3)), 3)
    items = []
    for item in progress(chained(made, [3, 4]), "batches"):
        items.append(item)
        clock[0] += 60
    assert items == list(range(5))
    assert [(last_told(m).done, last_told(m).total) for m in caplog.messages] == [(1, 5), (2, 5), (3, 5), (4, 5)]
    caplog.clear()
    for _ in progress(chained(made, (n for n in range(3))), "batches"):
        clock[0] += 60
    assert not caplog.messages


def test_a_loop_that_is_left_early_leaves_room_for_the_next(clock, caplog) -> None:
    caplog.set_level(logging.INFO)
    for _ in progress(range(3), "left early"):
        break
    for _ in progress(range(2), "blocks"):
        clock[0] += 60
    assert [last_told(message).what for message in caplog.messages] == ["blocks"]


def test_the_last_line_of_a_log_counts() -> None:
    lines = [f"12:00:00 so far {i} of 20 blocks in 2 sweeps, about {20 - i}.5 min left, peak memory 1.25 GB\n" for i in (3, 7)]
    assert str(last_told("".join(lines) + "anything else\n")) == "7 of 20 blocks in 2 sweeps, about 13.5 min left, peak 1.25 GB"
