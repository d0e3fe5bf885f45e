"""What holds for every variant in conf/sensitivity, also on layers that have next to nothing to say."""

import copy

import pytest
import torch
from variants import built, everyone, variants

from mgvq.errors import UserError
from mgvq.protocols import Sensitivity
from mgvq.sensitivity.taylor import Taylor
from mgvq.types import MODALITIES, Needs, Site, SiteStats

CASES = everyone("sensitivity")
each_case = pytest.mark.parametrize("metric", CASES.values(), ids=CASES.keys())


def draw(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(name) + sum(map(ord, name))))


def layer(name: str, out: int, into: int, *, image: int = 20, text: int = 10, dtype: torch.dtype = torch.float32):
    """A site with a weight and statistics of so many tokens a modality."""
    counts = dict(zip(MODALITIES, (image, text), strict=True))
    inputs = {m: draw(name + m, n, into) for m, n in counts.items()}
    gradients = {m: draw(name + m + "g", n, out) for m, n in counts.items()}
    stats = SiteStats(
        num_tokens=counts,
        gram={m: x.T @ x for m, x in inputs.items()},
        num_answers=5,
        fisher={m: g.T @ g for m, g in gradients.items()},
        saliency=dict.fromkeys(MODALITIES, 1.0),
        gradient=draw(name + "G", out, into),
    )
    return Site(name, "language", "q_proj", 0, out, into), draw(name + "w", out, into).to(dtype), stats


def zeroed(stats: SiteStats, *fields: str) -> SiteStats:
    changed = {f: {m: torch.zeros_like(t) for m, t in getattr(stats, f).items()} for f in fields}
    kept = {name: getattr(stats, name) for name in SiteStats.__slots__}
    return SiteStats(**{**kept, **changed})


def model():
    """Ordinary layers, and every odd one that we could think of."""
    plain, narrow, single = layer("plain", 6, 9), layer("narrow", 1, 4), layer("single", 4, 1)
    rows = [plain, narrow, single, layer("one of each", 1, 1), layer("bfloat16", 4, 6, dtype=torch.bfloat16)]
    rows += [layer("few tokens", 8, 30, image=2, text=1), layer("vision", 4, 6, text=0), layer("text", 4, 6, image=0)]
    rows += [layer("no tokens", 4, 6, image=0, text=0)]
    site, weight, stats = layer("zero weights", 4, 6)
    rows += [(site, torch.zeros_like(weight), stats)]
    for fields in (("gram",), ("fisher",), ("gram", "fisher")):
        site, weight, stats = layer(f"zero {fields}", 4, 6)
        rows += [(site, weight, zeroed(stats, *fields))]
    site, weight, stats = layer("dead channel", 4, 6)
    for gram in stats.gram.values():
        gram[2], gram[:, 2] = 0, 0
    rows += [(site, weight, stats)]
    return {s: w for s, w, _ in rows}, {s: st for s, _, st in rows}


def stripped(stats: SiteStats, needs: Needs) -> SiteStats:
    """Only what was asked for, as the collection hands it over."""
    return SiteStats(
        stats.num_tokens,
        stats.gram if needs.gram else {},
        stats.num_answers,
        fisher=stats.fisher if needs.fisher else {},
        gradient=stats.gradient if needs.gradient else None,
    )


@each_case
def test_scores_are_finite_and_not_negative_whatever_the_layer(metric: Sensitivity) -> None:
    assert isinstance(metric, Sensitivity)
    weights, bank = model()
    kept = copy.deepcopy((weights, bank))
    scores = metric(weights, {s: stripped(st, metric.needs) for s, st in bank.items()})
    assert list(scores) == list(weights)
    for site, score in scores.items():
        assert score.shape == (site.in_features,), site.name
        assert score.dtype == torch.float32
        assert score.isfinite().all(), site.name
        assert (score >= 0).all(), site.name
    assert scores[next(iter(weights))].sum() > 0
    again = metric(weights, bank)
    assert all(torch.equal(scores[s], again[s]) for s in scores)
    for site in weights:
        assert torch.equal(weights[site], kept[0][site])
        for name in ("gram", "fisher"):
            assert all(torch.equal(t, getattr(kept[1][site], name)[m]) for m, t in getattr(bank[site], name).items())
        assert torch.equal(bank[site].gradient, kept[1][site].gradient)


@each_case
def test_without_data_a_score_by_data_is_zero(metric: Sensitivity) -> None:
    weights, bank = model()
    silent = [s for s in weights if s.name in ("no tokens", "zero ('gram', 'fisher')")]
    zero = {s: zeroed(bank[s], "gram", "fisher") for s in silent}
    for score in metric({s: weights[s] for s in silent}, zero).values():
        # Taylor's first term stands on the gradient, which is given here against all reason.
        assert (score == 0).all() == bool(metric.needs and not isinstance(metric, Taylor))


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("variant", variants("sensitivity"))
def test_each_variant_by_data_takes_one_modality(variant: str, modality: str) -> None:
    if not built("sensitivity", variant).needs:
        return
    weights, bank = model()
    scores = built("sensitivity", variant, f"modality={modality}")(weights, bank)
    assert all(score.isfinite().all() and (score >= 0).all() for score in scores.values())
    plain = next(iter(weights))
    assert not torch.equal(scores[plain], built("sensitivity", variant)(weights, bank)[plain])


@pytest.mark.parametrize(
    ("variant", "override"),
    [
        ("wanda", "modality=sound"),
        ("global_local", "modality=sound"),
        ("obs", "damping=0.0"),
        ("obs", "damping_of=row"),
        ("global_local", "damping_of=row"),
        ("layer_scope", "damping=-1.0"),
        ("riemann", "damping=2.0"),
        ("global_local", "damping=0.0"),
        ("global_local", "reading=aloud"),
        ("global_local", "reading=split"),
        ("global_local", "alpha=1.5"),
        ("global_local", "alpha=null"),
    ],
)
def test_a_bad_setting_is_named(variant: str, override: str) -> None:
    named = "alpha" if override.endswith("split") else override.split("=")[0]
    with pytest.raises(UserError, match=rf"sensitivity\.{named}"):
        built("sensitivity", variant, override)
