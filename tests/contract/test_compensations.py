"""Every compensation rounds with every codebook, at any rates of its slices, to codes that are stored and decoded."""

import copy

import pytest
import torch
from variants import built as variant_of
from variants import each, everyone

from mgvq.compensation.none import NoCompensation
from mgvq.protocols import Compensation, FittedSlice
from mgvq.types import ChannelSlice, Metric, Site

VARIANTS = everyone("compensation")
CODEBOOKS = {
    **{name: codebook for name, codebook in each("codebook").items() if not codebook.needs_importance},
    "kmeans": variant_of("codebook", "kmeans"),
    "kmeans of two lengths": variant_of("codebook", "kmeans", "vector_length=[2,3]"),
    "kmeans of shared tables": variant_of("codebook", "kmeans", "vector_length=4", "share=kind", "table=int8"),
    "columns": variant_of("codebook", "columns", "vector_length=3"),
}
KMEANS = CODEBOOKS["kmeans"]
RATES = {"lowest": [0, 0], "highest": [-1, -1], "mixed": [0, 3]}  # of two groups, as an allocation may choose them
SHAPES = [(8, 13), (5, 2), (1, 6)]
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_codebook = pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS.keys())


def built(variant: str) -> Compensation:
    return VARIANTS[variant]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factor(size, seed=0):
    tokens = normal(3 * size, size, seed=seed) @ normal(size, size, seed=seed + 1)
    return tokens.T @ tokens / len(tokens)


def problem(codebook, rates=(1, 1), shape=(8, 13)):
    """A layer in two groups: weight, metric, fitted slices, score."""
    weight, metric = normal(*shape), Metric((factor(shape[1], 10),), factor(shape[0], 20))
    site, slices = Site("layer", "language", "layer", None, *shape), []
    for group, rate in enumerate(rates):
        channel_slice = ChannelSlice(site, group, torch.arange(group, shape[1], 2))
        fitted = codebook.fit(
            "unit", [weight[:, channel_slice.columns]], codebook.rates()[min(rate, len(codebook.rates()) - 1)], [None], []
        )
        slices.append(FittedSlice(channel_slice, fitted[0]))
    return weight, metric, slices, normal(shape[1]).abs()


def decoded(slices, codes, like):
    weight = torch.empty_like(like)
    for fitted, code in zip(slices, codes, strict=True):
        weight[:, fitted.channel_slice.columns] = fitted.codebook.weight(code).decode()
    return weight


@each_variant
def test_it_meets_the_protocol(variant):
    compensation = built(variant)
    assert isinstance(compensation, Compensation)
    assert compensation.needs_metric or not compensation.needs_output_metric


@each_variant
@each_codebook
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rates", RATES.values(), ids=RATES.keys())
def test_the_codes_are_those_of_a_weight_near_the_layer(variant, codebook, rates, shape):
    weight, metric, slices, score = problem(codebook, rates, shape)
    codes = built(variant).round(weight, metric, slices, score, [])
    values = decoded(slices, codes, weight)
    assert values.isfinite().all()
    assert (values - weight).norm() < 3 * weight.norm()
    for fitted, code in zip(slices, codes, strict=True):
        length = fitted.codebook.vector_length
        plain, _ = fitted.codebook.encode(torch.zeros(shape[0], -(-len(fitted.channel_slice.columns) // length), length), 0, None)
        assert code.shape == plain.shape
        assert code.dtype == plain.dtype


@each_variant
@each_codebook
def test_the_same_again_and_nothing_is_written_to(variant, codebook):
    weight, metric, slices, score = problem(codebook)
    before = copy.deepcopy((weight, metric, score))
    first, again = (built(variant).round(weight, metric, slices, score, []) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(weight, before[0])
    assert torch.equal(metric.h_in[0], before[1].h_in[0])
    assert torch.equal(metric.h_out, before[1].h_out)
    assert torch.equal(score, before[2])


@each_variant
def test_it_uses_what_it_says_it_uses(variant):
    """Another output factor, another metric, another score: other codes where they are asked for, the same where not.

    A shift that needs an output factor needs it for its target.
    """
    compensation = built(variant)
    weight, metric, slices, score = problem(KMEANS)

    def codes_of(metric, score):
        aim = weight
        if compensation.shift and compensation.needs_output_metric:
            aim = compensation.shift.target(weight, compensation.shift.direction(metric, normal(*weight.shape, seed=7)), 1.0)
        return torch.cat(compensation.round(aim, metric, slices, score, []), 1)

    codes = codes_of(metric, score)
    changed = {
        "needs_output_metric": (Metric(metric.h_in, factor(8, 60)), score),
        "needs_metric": (Metric((factor(13, 50),), metric.h_out), score),
        "uses_score": (metric, score.flip(0)),
    }
    for use, (other_metric, other_score) in changed.items():
        assert torch.equal(codes, codes_of(other_metric, other_score)) != getattr(compensation, use), use


@each_variant
def test_dead_and_singular_metrics_are_rounded_and_flagged(variant):
    compensation = built(variant)
    weight, _, slices, score = problem(KMEANS)
    token, gradient = normal(13), normal(8)
    token[[2, 5]] = 0
    for metric in (Metric((token.outer(token),), gradient.outer(gradient)), Metric((torch.zeros(13, 13),), torch.zeros(8, 8))):
        flags: list[str] = []
        values = decoded(slices, compensation.round(weight, metric, slices, score, flags), weight)
        assert values.isfinite().all()
        assert (values - weight).norm() < 3 * weight.norm()
        corrects = not isinstance(compensation, NoCompensation)  # plain rounding, of a moved target too, has no use for flags
        assert any(f.startswith("dead_channels:layer:") for f in flags) == corrects


@each_variant
def test_weights_of_half_precision_are_rounded_as_what_they_are(variant):
    weight, metric, slices, score = problem(KMEANS)
    half = weight.bfloat16()
    one, other = (built(variant).round(w, metric, slices, score, []) for w in (half, half.float()))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
