"""Processes that share a run: shares and deals, and what real processes tell each other, errors too."""

import itertools
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mgvq.errors import SharedFault, UserError
from mgvq.ranks.gloo import Gloo, _to_bytes
from mgvq.ranks.ranks import ALONE, Ranks
from mgvq.runs import processes
from mgvq.runs.processes import OfTheFirst


class One(Ranks):
    """One of several that speaks to nobody."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def test_shares_one_after_the_other_are_the_whole() -> None:
    for number, size in itertools.product(range(8), range(1, 5)):
        shares = [list(One(rank, size).share(iter(range(number)))) for rank in range(size)]
        assert [item for share in shares for item in share] == list(range(number))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_shares_an_iterator_as_it_is() -> None:
    assert ALONE.share(items := iter(range(3))) is items


def test_the_dearest_process_has_at_most_a_third_more_than_the_best_deal() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (2, 3):
        costs = torch.randint(1, 30, (6,), generator=generator).tolist()

        def dearest(whose: Any, costs: list[int] = costs, size: int = size) -> int:
            return max(sum(c for c, w in zip(costs, whose, strict=True) if w == rank) for rank in range(size))

        best = min(map(dearest, itertools.product(range(size), repeat=6)))
        assert best <= dearest(One(0, size).deal(costs)) <= 4 / 3 * best
        assert One(0, size).deal(costs) == One(size - 1, size).deal(costs)
    assert One(0, 2).deal([1] * 4) == [0, 1, 0, 1]
    assert ALONE.deal([3, 1]) == [0, 0]


def in_processes(work: Callable[[Ranks], Any], size: int = 2) -> list[Any]:
    """What `work` gives, or raises, in each of several processes; None of one that has died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, started = multiprocessing.get_context("fork"), []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        place = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = context.Process(target=_one, args=(place, work, there))
        process.start()
        there.close()
        started.append((process, here))
    found = []
    for process, here in started:
        try:
            found.append(here.recv())
        except EOFError:
            found.append(None)
        process.join()
    return found


def _one(place: dict[str, str], work: Callable[[Ranks], Any], answer: Any) -> None:
    os.environ.update(place)
    ranks = Gloo(int(place["RANK"]), int(place["WORLD_SIZE"]))
    try:
        with ranks.together():
            found = work(ranks)
    except Exception as error:
        found = error
    ranks.leave()
    answer.send(found)


def test_what_is_gathered_and_summed_has_the_order_of_the_processes() -> None:
    tiny, parts = 2.0**-53, torch.tensor([1.0, 2.0**-53, 2.0**-53], dtype=torch.float64)
    assert parts[0] + tiny + tiny == 1 != parts[1:].sum() + 1, "the order counts"

    def work(ranks: Ranks) -> Any:
        sums = {"all": parts[ranks.rank].clone(), f"of {ranks.rank}": torch.full((2,), 1.0 + ranks.rank)}
        found = ranks.total("sums", sums)
        told = ranks.first("word", lambda: f"of {ranks.rank}")
        return {k: v.tolist() for k, v in found.items()}, sums, ranks.gather("numbers", ranks.rank), told

    expected = {"all": 1.0, "of 0": [1.0, 1.0], "of 1": [2.0, 2.0], "of 2": [3.0, 3.0]}
    for found, left, numbers, told in in_processes(work, 3):
        assert (found, left, numbers, told) == (expected, {}, [0, 1, 2], "of 0")


def test_tensors_arrive_as_they_are_and_what_is_one_stays_one() -> None:
    kinds = [torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.int64]
    values = [torch.arange(6).to(kind).reshape(2, 3).T for kind in kinds] + [torch.tensor(1.5), torch.empty(0, 4)]

    def work(ranks: Ranks) -> Any:
        found = ranks.gather("tensors", [*values, values[0]])[1 - ranks.rank]
        same = [a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, values, strict=False)]
        return all(same), found[0] is found[-1]

    assert in_processes(work) == [(True, True)] * 2
    assert len(_to_bytes(torch.zeros(100_000)[:2])) < 1000, "a view goes without what it is a view of"


@pytest.mark.parametrize("kind", [UserError, SharedFault, KeyError])
def test_an_error_of_one_ends_all_with_its_message(kind: type[Exception]) -> None:
    def work(ranks: Ranks) -> None:
        ranks.gather("before", None)
        if ranks.rank == 1:
            raise kind("the layer q_proj is damaged")
        ranks.total("never", {"a": torch.zeros(2)})

    first, second = in_processes(work)
    assert type(second) is kind
    assert type(first) is (RuntimeError if kind is KeyError else kind)
    assert "the layer q_proj is damaged" in str(first)
    assert "process 1 of 2" in str(first)


def test_an_error_behind_the_last_exchange_is_told_too() -> None:
    def work(ranks: Ranks) -> None:
        if ranks.is_first:
            raise UserError("the evaluation has failed")

    assert [str(error).split(" (")[0] for error in in_processes(work)] == ["the evaluation has failed"] * 2


def test_a_process_that_has_died_ends_the_others() -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            os._exit(1)
        ranks.gather("numbers", 0)

    first, second = in_processes(work)
    assert second is None
    assert isinstance(first, SharedFault)
    assert "has ended without a word" in str(first)


def test_processes_that_go_different_ways_are_told_so() -> None:
    errors = in_processes(lambda ranks: ranks.gather(f"way {ranks.rank}", 0))
    assert [str(e) for e in errors] == [f"process {n} of 2 has come to 'way {n}', and others elsewhere" for n in range(2)]


def test_a_mapping_of_the_first_is_read_by_all_and_written_by_it() -> None:
    def work(ranks: Ranks) -> Any:
        own = {"a": 1} if ranks.is_first else {}
        seen = OfTheFirst(ranks, own)
        seen["b"] = 2 + ranks.rank
        return [seen.get(name) for name in "abc"], list(seen), len(seen), own

    both, names = [1, 2, None], ["a", "b"]
    assert in_processes(work) == [(both, names, 2, {"a": 1, "b": 2}), (both, names, 2, {})]


@pytest.mark.parametrize(
    ("size", "named"),
    [("two", "WORLD_SIZE must be a whole number >= 1, got 'two'"), ("2", "RANK, MASTER_ADDR or MASTER_PORT is not set")],
)
def test_an_environment_of_several_processes_that_is_not_whole_is_named(
    size: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    processes._place.cache_clear()
    try:
        with pytest.raises(UserError, match=named):
            processes.ranks.__wrapped__()
    finally:
        processes._place.cache_clear()
        for name in ("WORLD_SIZE", "RANK"):
            os.environ.pop(name, None)
