"""Every grouping: each channel in a group, layers that read the same alike, and what it declares is what it looks at."""

from dataclasses import replace

import pytest
import torch
from variants import everyone

from mgvq.protocols import Grouping
from mgvq.types import MODALITIES, Needs, Site, SiteStats, StatsBank

GROUPINGS = everyone("grouping")
each_grouping = pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS.keys())

QUERY, KEY = (Site(f"language.0.{kind}", "language", kind, 0, rows, 12, "language.0.qkv") for kind, rows in (("q", 8), ("k", 4)))
DOWN = Site("language.0.down_proj", "language", "down_proj", 0, 12, 31)
VISION = Site("vision.0.fc1", "vision", "fc1", 0, 9, 5)
NARROW = Site("projector.linear", "projector", "linear", None, 7, 1)
SITES = (QUERY, KEY, DOWN, VISION, NARROW)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_scores(seed: int = 0) -> dict[Site, torch.Tensor]:
    return {site: normal(site.in_features, seed=10 * seed + n).exp() for n, site in enumerate(SITES)}


def some_bank(**missing: int) -> StatsBank:
    """Second moments of 9 tokens of each modality; a vision tower sees images alone, `text=0` leaves none to the others."""
    bank = {}
    for site in SITES:
        count = {"image": 9, "text": 0 if site.tower == "vision" else 9, **missing}
        seeds = {m: sum(map(ord, site.reads or site.name)) + n for n, m in enumerate(MODALITIES)}
        tokens = {m: normal(count[m], site.in_features, seed=seeds[m]) for m in MODALITIES}
        bank[site] = SiteStats(count, {m: x.T @ x for m, x in tokens.items()})
    return bank


def asked_for(grouping: Grouping, bank: StatsBank) -> StatsBank:
    """The bank without what the grouping did not ask for."""
    return {site: stats if grouping.needs.gram else SiteStats(stats.num_tokens, {}) for site, stats in bank.items()}


def same(one, other) -> bool:
    return all(torch.equal(one[site], other[site]) for site in SITES)


@each_grouping
@pytest.mark.parametrize("missing", [{}, {"image": 0}, {"text": 0}, {"image": 0, "text": 0}], ids=str)
@pytest.mark.parametrize("scores", ["drawn", "zero"])
def test_every_channel_has_a_group_of_its_layer(grouping: Grouping, missing: dict[str, int], scores: str) -> None:
    assert isinstance(grouping, Grouping)
    assert isinstance(grouping.needs, Needs)
    given, bank = some_scores(), asked_for(grouping, some_bank(**missing))
    if scores == "zero":
        given = {site: torch.zeros_like(score) for site, score in given.items()}
    kept = {site: score.clone() for site, score in given.items()}
    groups = grouping(given, bank)
    assert list(groups) == list(SITES)
    for site, group in groups.items():
        assert group.shape == (site.in_features,)
        assert not group.is_floating_point()
        number = int(group.max()) + 1
        assert 1 <= number <= min(grouping.num_groups, site.in_features)
        assert set(group.tolist()) == set(range(number)), "no group is empty"
        sizes = torch.bincount(group)
        assert sizes.max() - sizes.min() <= 1, "groups are equal"
    assert torch.equal(groups[QUERY], groups[KEY]), "they read the same activations"
    assert same(groups, grouping(given, bank)), "the same again"
    assert same(given, kept), "nothing is written to"


@each_grouping
def test_it_declares_what_it_looks_at(grouping: Grouping) -> None:
    bank = asked_for(grouping, some_bank())
    groups = grouping(some_scores(), bank)
    assert same(groups, grouping(some_scores(1), bank)) == (not grouping.uses_score)
    swapped = {
        site: replace(
            stats,
            num_tokens=dict(zip(stats.num_tokens, reversed(stats.num_tokens.values()), strict=True)),
            gram=dict(zip(stats.gram, reversed(stats.gram.values()), strict=True)),
        )
        for site, stats in bank.items()
    }
    assert same(groups, grouping(some_scores(), swapped)) == (not grouping.needs_images)
    assert grouping.needs or not grouping.needs_images
