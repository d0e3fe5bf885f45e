"""Named streams: the same name and seed give the same draws, any other name or seed gives others."""

import itertools

import pytest
import torch

from mgvq.rng import entropy, generator

STREAMS = [
    (0,), (1,), (2**32,), (2**40 + 1,), (0, "a"), (0, "b"), (1, "a"), (0, "a", "b"), (0, "b", "a"), (0, "ab"),
    (0, "a", 1), (0, "a", 2), (0, "a", 1, 2), (0, "a", 2, 1), (0, "a", "1"),
]  # fmt: skip


def test_equal_names_give_equal_draws():
    first, second = (torch.rand(4, generator=generator(3, "fit", "q_proj", 1)) for _ in range(2))
    assert torch.equal(first, second)


def test_streams_leave_the_global_state_alone():
    before = torch.random.get_rng_state()
    torch.rand(4, generator=generator(3, "fit"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_other_seeds_and_names_give_other_draws():
    draws = {stream: torch.rand(1, generator=generator(*stream)).item() for stream in STREAMS}
    assert len(set(draws.values())) == len(STREAMS)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_zero_in_a_name_counts(seed):
    """numpy pads short entropy with zeros, so a name that ends in 0 must not fall together with the name without."""
    names = [(), ("a",), ("a", 0), ("a", 0, 0), (0,), (0, 0)]
    equal = [(x, y) for x, y in itertools.combinations(names, 2) if entropy(seed, *x) == entropy(seed, *y)]
    assert not equal


def test_a_large_seed_is_not_a_small_one_with_a_number():
    """numpy cuts a number of more than 32 bits into words, which must not fall together with a list of them."""
    assert entropy(2**32) != entropy(0, 1)


def test_entropy_uses_63_bits_and_no_more():
    numbers = [entropy(seed, "x") for seed in range(200)]
    assert max(numbers) < 2**63
    seen = 0
    for number in numbers:
        seen |= number
    assert seen == 2**63 - 1


def test_entropy_is_pinned():
    """Results are named by their seed, so a stream must not change with a version of numpy or of this code."""
    assert entropy(0, "kmeans", "q_proj") == 6414839343734339982


def test_a_negative_seed_is_a_stream_of_its_own():
    assert len({entropy(seed, "x") for seed in (-1, 0, 1)}) == 3
