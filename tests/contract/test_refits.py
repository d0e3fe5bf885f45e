"""Every refit on every codebook that can be refitted: never a worse table, in the form and the bits of the one before."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from variants import built, each, everyone, variants

from mgvq.formats.vector import to_vectors
from mgvq.linalg import damped
from mgvq.protocols import Codebook, CodedSlice, FittedCodebook, FittedSlice, Refit
from mgvq.types import ChannelSlice, Metric, Site

REFITS = everyone("refit")
CODEBOOKS = {name: codebook for name, codebook in each("codebook").items() if codebook.can_be_refitted}
each_refit = pytest.mark.parametrize("refit", REFITS.values(), ids=REFITS.keys())
each_codebook = pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS.keys())
OUT, IN, COLUMNS = 8, 14, torch.tensor([0, 2, 3, 5, 6, 9, 10, 12, 13])


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factor(size: int, seed: int) -> torch.Tensor:
    tokens = normal(3 * size, size, seed=seed)
    return tokens.T @ tokens / len(tokens)


METRICS = {
    "input": Metric((factor(IN, 1),)),
    "runs of rows": Metric((factor(IN, 1), factor(IN, 2))),
    "both sides": Metric((factor(IN, 1),), factor(OUT, 3)),
    "zero": Metric((torch.zeros(IN, IN),)),
}


def coded(codebook: Codebook, metric: Metric, sites: Sequence[Site]) -> list[CodedSlice]:
    """One slice of each site, of one table group, rounded to nearest; in the other columns a tenth of the weight is left."""
    weights = [(n + 1) * normal(OUT, IN, seed=n) for n, _ in enumerate(sites)]
    parts = [weight[:, COLUMNS] for weight in weights]
    importance = [torch.ones(len(COLUMNS))] * len(parts) if codebook.needs_importance else [None] * len(parts)
    slices = []
    for site, weight, tables in zip(
        sites, weights, codebook.fit("group", parts, codebook.rates()[1], importance, []), strict=True
    ):
        codes, _ = tables.encode(to_vectors(weight[:, COLUMNS], tables.vector_length), 0, None)
        target = torch.where(torch.isin(torch.arange(IN), COLUMNS), 1.0, 0.1) * weight
        fitted = FittedSlice(channel_slice=ChannelSlice(site, 0, COLUMNS), codebook=tables)
        slices.append(CodedSlice(fitted=fitted, codes=codes, target=target, metric=metric))
    return slices


def together(codebook: Codebook) -> list[Site]:
    """Layers that share a table under this codebook, or one layer."""
    sites = [Site(f"language.{n}.v_proj", "language", "v_proj", n, OUT, IN) for n in range(3)]
    shared = {codebook.table_group(ChannelSlice(site, 0, COLUMNS)) for site in sites}
    return sites if len(shared) == 1 else sites[:1]


def cost(slices: Sequence[CodedSlice], tables: Sequence[FittedCodebook], refit: Refit) -> float:
    """In the refit's own metric, which may be a damped one."""
    share, total = getattr(refit, "damping", 0.0), 0.0
    for one, table in zip(slices, tables, strict=True):
        error = one.target.double().neg()
        error[:, COLUMNS] += table.weight(one.codes).decode().double()
        runs = zip(error.chunk(len(one.metric.h_in)), one.metric.h_in, strict=True)
        pulled = torch.cat([run @ damped(h, share) for run, h in runs])
        if one.metric.h_out is not None:
            pulled = damped(one.metric.h_out, share) @ pulled
        total += float((pulled * error).sum())
    return total


def tensors(slices: Sequence[CodedSlice], tables: Sequence[FittedCodebook]) -> list[tuple[torch.dtype, torch.Size, bytes]]:
    found = []
    for one, table in zip(slices, tables, strict=True):
        stored = table.weight(one.codes).tensors().values()
        found += [(t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).numpy().tobytes()) for t in stored]
    return found


def test_there_are_some() -> None:
    assert set(REFITS) >= {"closed_form"}
    assert len(CODEBOOKS) >= 3


@each_refit
@each_codebook
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
def test_it_is_never_worse_and_stored_as_before(refit: Refit, codebook: Codebook, metric: Metric) -> None:
    assert isinstance(refit, Refit)
    assert refit.rounds >= 1
    slices = coded(codebook, metric, together(codebook))
    before = [one.fitted.codebook for one in slices]
    kept = tensors(slices, before), [one.target.clone() for one in slices]
    after = refit(slices)
    assert all(isinstance(tables, FittedCodebook) for tables in after)
    reached, start = cost(slices, after, refit), cost(slices, before, refit)
    assert reached <= start * (1 + 1e-9)
    if any(h.any() for h in metric.h_in):
        assert reached < start, "nearest codes of half of a layer leave something to gain"
    found = tensors(slices, after)
    assert [t[:2] for t in found] == [t[:2] for t in kept[0]], "the same tensors, and so the same bits"
    assert found == tensors(slices, refit(slices)), "the same again"
    assert tensors(slices, before) == kept[0], "the tables that came in stay"
    assert all(torch.equal(one.target, target) for one, target in zip(slices, kept[1], strict=True))
    again = [replace(one, fitted=replace(one.fitted, codebook=t)) for one, t in zip(slices, after, strict=True)]
    assert cost(again, refit(again), refit) <= reached * (1 + 1e-9)


@pytest.mark.parametrize("name", variants("refit"))
def test_every_variant_can_be_built(name: str) -> None:
    assert built("refit", name).rounds >= 1
