"""Channel groups: equal sizes, sorted, shared by layers that read the same; table groups gather what shares a table."""

import pytest
import torch
from conftest import layer_problems

from mgvq.codebook.kmeans import KMeans
from mgvq.errors import UserError
from mgvq.grouping.modality import Modality, image_share
from mgvq.grouping.one import One
from mgvq.grouping.score import Score
from mgvq.quantization.codebooks import CodebookCache, rate_table
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.types import Site, SiteStats

Q, K = (Site(f"b.0.{kind}", "language", kind, 0, rows, 10, "b.0.qkv") for kind, rows in (("q_proj", 8), ("k_proj", 4)))
DOWN = Site("b.1.down_proj", "language", "down_proj", 1, 8, 7)
SCORES = {
    Q: torch.arange(10.0),
    K: 20 * torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    DOWN: torch.tensor([3.0, 1, 2, 1, 5, 4, 0]),
}


def k_means(**settings):
    defaults = dict(vector_length=2, share="layer", table="fp16", weight_power=0.0, iterations=5, sample=None, seed=0)
    return KMeans(**(defaults | settings))


def test_groups_are_equal_runs_of_the_ranking_of_summed_scores() -> None:
    groups = Score(num_groups=2)(SCORES, {})
    assert torch.equal(groups[Q], groups[K]), "they read the same activations"
    assert groups[Q].tolist() == [1, 0, 0, 0, 0, 0, 1, 1, 1, 1], "channel 0 is the most sensitive one, by K"
    assert groups[DOWN].tolist() == [1, 0, 0, 0, 1, 1, 0], "equal scores in the order of the channels"


@pytest.mark.parametrize("num_groups", [2, 3, 4])
def test_group_sizes_differ_by_one_at_most(num_groups: int) -> None:
    for group in Score(num_groups=num_groups)(SCORES, {}).values():
        sizes = torch.bincount(group)
        assert len(sizes) == num_groups
        assert sizes.max() - sizes.min() <= 1


def test_fewer_channels_than_groups_make_as_many_groups() -> None:
    narrow = Site("n", "projector", "n", None, 4, 3)
    assert Score(num_groups=4)({narrow: torch.tensor([5.0, 1, 3])}, {})[narrow].tolist() == [2, 0, 1]


def test_one_group_is_one() -> None:
    assert all(not g.any() and len(g) == s.in_features for s, g in One()(SCORES, {}).items())


def test_channels_by_dominating_modality() -> None:
    image, text = torch.diag(torch.tensor([8.0, 1, 4, 0])), torch.diag(torch.tensor([1.0, 1, 2, 0]))
    site, visual = Site("x", "language", "x", 0, 4, 4), Site("v", "vision", "v", 0, 4, 4)
    bank = {
        site: SiteStats({"image": 4, "text": 1}, {"image": image, "text": text}),
        visual: SiteStats({"image": 4, "text": 0}, {"image": image, "text": 0 * text}),
    }
    share = image_share(bank[site])
    assert share is not None
    assert share.tolist() == pytest.approx([2 / 3, 0.2, 1 / 3, 0.5])
    groups = Modality(num_groups=2)({site: torch.ones(4), visual: torch.ones(4)}, bank)
    assert groups[site].tolist() == [1, 0, 0, 1]
    assert not groups[visual].any(), "the vision tower sees pictures only"


@pytest.mark.parametrize("number", [1, 0, 17])
def test_a_number_that_makes_no_groups_is_named(number) -> None:
    for variant in (Score, Modality):
        with pytest.raises(UserError, match=r"grouping\.num_groups"):
            variant(num_groups=number)


def test_table_groups_gather_slices_that_share_a_table() -> None:
    groups = Score(num_groups=2)(SCORES, {})
    problems = layer_problems(SCORES, scores=SCORES, groups=groups)
    own, shared = cut_table_groups(problems, k_means()), cut_table_groups(problems, k_means(share="input"))
    assert [len(u.slices) for u in own] == [1] * 6
    assert [len(u.slices) for u in shared] == [2, 2, 1, 1]
    for table_groups in (own, shared):
        assert sum(u.info.num_weights for u in table_groups) == sum(s.num_weights for s in SCORES)
        assert sum(u.info.score for u in table_groups) == pytest.approx(sum(float(s.sum()) for s in SCORES.values()))
        assert all(torch.equal(p.columns, p.columns.sort().values) for u in table_groups for p in u.slices)
        assert {u.info.depth for u in table_groups} == {0.0, 1.0}
        assert sorted({u.info.quantile for u in table_groups})[0] == 0.0
    lower, upper = shared[:2]
    assert lower.info.quantile < upper.info.quantile, "group 1 holds the more sensitive channels"


def test_measured_losses_are_the_weighted_errors_of_the_fits() -> None:
    groups = Score(num_groups=2)(SCORES, {})
    draws = torch.Generator().manual_seed(0)
    weights = {s: torch.randn(s.out_features, s.in_features, generator=draws) for s in SCORES}
    weights[DOWN][:, 3] = 0
    codebook = k_means()
    problems = layer_problems(SCORES, weights=weights, scores=SCORES, groups=groups)
    cache = CodebookCache(cut_table_groups(problems, codebook), codebook, problems)
    table = rate_table(cache, "measured")
    assert table.bits.shape == table.loss.shape == (6, len(codebook.rates()))
    assert [r.index_bits for r in table.rates] == sorted(r.index_bits for r in table.rates)
    for u, table_group in enumerate(cache.table_groups):
        for r in (0, 2):
            (channel_slice,), (fitted,) = table_group.slices, cache(u, table.rates[r])[0]
            weight = weights[channel_slice.site][:, channel_slice.columns]
            padded = torch.nn.functional.pad(weight, (0, weight.shape[1] % 2))
            stored = fitted.weight(fitted.encode(padded.unflatten(1, (-1, 2)), 0, None)[0]).decode()
            relative = (stored - weight).square().sum(0) / weight.square().sum(0).clamp(min=1e-30)
            relative[weight.square().sum(0) == 0] = 0
            expected = float((SCORES[channel_slice.site][channel_slice.columns] * relative).sum())
            assert float(table.loss[u, r]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
            stored_bytes = sum(
                t.nbytes for t in fitted.weight(fitted.encode(padded.unflatten(1, (-1, 2)), 0, None)[0]).tensors().values()
            )
            assert int(table.bits[u, r]) == 8 * stored_bytes
    modelled = rate_table(cache, "gaussian")
    assert float(modelled.loss[0, 0]) == pytest.approx(cache.table_groups[0].info.score * 4.0 ** -table.rates[0].index_bits)
    assert not rate_table(cache, None).loss.any()
