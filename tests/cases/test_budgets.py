"""Budgets that cannot be met, or that a codebook leaves unused. A new input is a line in a table."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from variants import built

from mgvq.errors import UserError
from mgvq.quantization.method import Method
from mgvq.quantization.pipeline import quantize
from mgvq.quantization.preflight import predicted_bits
from mgvq.types import Site


def layers(*shapes: tuple[int, int]) -> list[Site]:
    return [Site(f"layer.{i}.linear", "language", "linear", i, *shape) for i, shape in enumerate(shapes)]


ODD = layers(*[(72, 77)] * 2)
ORDINARY = layers(*[(256, 256)] * 2)


def method(codebook: tuple[str, ...], allocation: tuple[str, ...] = ("uniform",), grouping: tuple[str, ...] = ("one",)) -> Method:
    return Method(
        curvature=None,
        sensitivity=built("sensitivity", "uniform"),
        grouping=built("grouping", *grouping),
        allocation=built("allocation", *allocation),
        codebook=built("codebook", *codebook),
        compensation=built("compensation", "none"),
    )


@pytest.mark.parametrize(
    ("codebook", "sites", "budget", "words"),
    [
        (("grid",), ORDINARY, 0.1, "below the smallest rate of this codebook: int1"),
        (("kmeans",), ORDINARY, 0.1, "below the smallest rate of this codebook: 2x2"),
        (("scalar",), ODD, 1.1, "below the smallest rate"),
        (("grid", "group_size=8"), ORDINARY, 1.4, "below the smallest rate"),
        (("grid",), ODD, 2.0, "falls between two rates"),
    ],
)
def test_a_budget_that_no_rate_meets_is_refused_from_the_shapes_alone(codebook, sites, budget, words) -> None:
    with pytest.raises(UserError, match=words):
        predicted_bits(method(codebook, ("uniform", "tolerance=0.0")), sites, budget)


@pytest.mark.parametrize("allocation", ["greedy", "exact", "ratio", "threshold", "transfer", "water_filling"])
def test_so_it_is_by_every_allocation(allocation: str) -> None:
    with pytest.raises(UserError, match="below the smallest rate"):
        predicted_bits(method(("kmeans",), (allocation,), ("score", "num_groups=2")), ORDINARY, 0.1)


def model_of(sites: list[Site]) -> torch.nn.Module:
    """A model that consists of the layers."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    )
    model.layer = torch.nn.ModuleList(
        torch.nn.ModuleDict({"linear": torch.nn.Linear(s.in_features, s.out_features, bias=False)}) for s in sites
    )
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("codebook", "sites", "budget", "unused"),
    [
        (("kmeans",), ORDINARY, 8.4, 0.5),  # the highest rate has 4 index bits
        (("kmeans",), ODD, 2.0, 0.2),
        (("kmeans",), ORDINARY, 2.0, None),
        (("grid",), ORDINARY, 2.02, None),
    ],
)
def test_a_budget_that_is_not_used_is_flagged(codebook, sites, budget: float, unused: float | None) -> None:
    chosen = method((*codebook, *(("vector_length=2",) if codebook[0] == "kmeans" else ())))
    report = quantize(model_of(sites), sites, {}, chosen, budget, None)
    flags = [flag for flag in report.flags if flag.startswith("unused_budget:")]
    share = 1 - report.stored_bits / (budget * sum(s.num_weights for s in sites))
    assert predicted_bits(chosen, sites, budget) == report.stored_bits / sum(s.num_weights for s in sites)
    if unused is None:
        assert not flags
        assert share <= 0.02
    else:
        assert share > unused
        assert flags == [f"unused_budget:{share:.3f}"]


def test_groups_that_depend_on_statistics_are_not_predicted() -> None:
    assert predicted_bits(method(("kmeans",), grouping=("modality",)), ORDINARY, 2.0) is None
