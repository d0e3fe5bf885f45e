"""Every curvature hands out sound metrics from what it asks for, also where a modality, or the gradient, is missing."""

import itertools
from dataclasses import replace

import pytest
import torch
from variants import everyone

from mgvq.curvature.fusion import mbq_weights
from mgvq.curvature.guided import Guided
from mgvq.curvature.input import Input
from mgvq.curvature.kronecker import KroneckerFisher
from mgvq.errors import UserError
from mgvq.model.passes import Rows
from mgvq.protocols import Curvature
from mgvq.rng import generator
from mgvq.types import Batch, Kronecker, Needs, Site, SiteStats

CURVATURES = everyone("curvature")
each_curvature = pytest.mark.parametrize("curvature", CURVATURES.values(), ids=CURVATURES.keys())
VISION, LANGUAGE = Site("vision.0", "vision", "fc1", 0, 7, 4), Site("language.0", "language", "o_proj", 0, 5, 6)


def rows(num_tokens, size, *names):
    return torch.randn(num_tokens, size, generator=generator(0, *names))


def stats(site, needs, *, image=9, text=9, importance=1.0):
    """What `needs` asks for, of random tokens; `importance` scales the gradients."""
    num_tokens = {"image": image, "text": 0 if site.tower == "vision" else text}
    x = {m: rows(n, site.in_features, site.name, m, "x") for m, n in num_tokens.items()}
    g = {m: importance * rows(n, site.out_features, site.name, m, "g") for m, n in num_tokens.items()}
    everything, gradients = torch.cat(list(x.values())), torch.cat(list(g.values()))
    runs = gradients.square().chunk(max(1, needs.channel_groups), 1)
    pair = Kronecker(importance * everything.T @ everything, gradients.T @ gradients)
    return SiteStats(
        num_tokens,
        {m: v.T @ v for m, v in x.items()} if needs.gram else {},
        num_answers=3,
        fisher={m: v.T @ v for m, v in g.items()} if needs.fisher else {},
        saliency={m: v.abs().mean().item() for m, v in g.items() if len(v)} if needs.saliency else {},
        channel_gram=torch.stack([(everything * r.mean(1)[:, None]).T @ everything for r in runs])
        if needs.channel_groups
        else None,
        sequence=pair if needs.sequences else None,
        token=pair if needs.power_rounds else None,
    )


def check(site, metric):
    assert all(h.shape == (site.in_features, site.in_features) for h in metric.h_in)
    assert metric.h_out is None or metric.h_out.shape == (site.out_features, site.out_features)
    for factor in (*metric.h_in, *([] if metric.h_out is None else [metric.h_out])):
        assert factor.dtype == torch.float32
        assert torch.linalg.eigvalsh(factor.double()).min() > -1e-5 * max(1.0, factor.norm())
    assert len(torch.empty(site.out_features).chunk(len(metric.h_in))) == len(metric.h_in)


@each_curvature
def test_metrics_have_the_shapes_of_their_layers(curvature) -> None:
    assert isinstance(curvature, Curvature)
    assert curvature.needs
    bank = {s: stats(s, curvature.needs) for s in (VISION, LANGUAGE)}
    for site, metric in curvature.fuse(bank).items():
        check(site, metric)
        assert all(h.diagonal().min() > 0 for h in metric.h_in)


@each_curvature
@pytest.mark.parametrize("missing", [{"image": 0}, {"text": 0}, {"image": 0, "text": 0}, {"importance": 0.0}], ids=str)
def test_what_is_missing_is_zero_and_never_nan(curvature, missing) -> None:
    bank = {s: stats(s, curvature.needs, **missing) for s in (VISION, LANGUAGE)}
    if isinstance(curvature, KroneckerFisher) and (curvature.granularity, curvature.fusion) in (
        ("sequence", "none"),
        ("token", "token"),
    ):
        return  # handed through
    for site, metric in curvature.fuse(bank).items():
        check(site, metric)
        if metric.h_out is not None and missing.get("importance") == 0:
            assert not metric.h_in[0].any()
            assert torch.equal(metric.h_out, torch.eye(site.out_features))


def test_one_modality_is_not_touched_by_the_fusion() -> None:
    needs = Needs(gram=True, fisher=True, saliency=True, gradient=True)
    bank = {VISION: stats(VISION, needs)}
    gram = bank[VISION].gram["image"] / 9
    torch.testing.assert_close(Input(fusion="mbq_ratio").fuse(bank)[VISION].h_in[0], gram)
    found = [
        KroneckerFisher(granularity="token", fusion=f, rounds=None).fuse(bank)[VISION] for f in ("none", "mbq_ratio", "kron")
    ]
    for one, other in itertools.pairwise(found):
        torch.testing.assert_close(one.h_in[0], other.h_in[0])
        torch.testing.assert_close(one.h_out, other.h_out)


def test_mbq_ratio_is_of_mean_gradients_and_at_least_the_median() -> None:
    def layer(index, image, text):
        tokens = {"image": 10, "text": 5}
        saliency = {"image": image / 10, "text": text / 5}
        return Site(f"language.{index}", "language", "o_proj", index, 5, 6), SiteStats(tokens, {}, saliency=saliency)

    bank = dict([layer(0, 1.0, 1.0), layer(1, 0.0, 1.0), layer(2, 8.0, 1.0), layer(3, 1.0, 0.0)])
    ratios = [weights["image"] for weights in mbq_weights(bank).values()]
    assert ratios == pytest.approx([0.5, 0.5, 4.0, 0.5])  # (1/10) / (1/5); the median; (8/10) / (1/5); no ratio: the median


def test_mbq_ratios_are_of_layers_whose_gradients_have_seen_both_modalities() -> None:
    """Where the Gram alone has seen images, a layer takes the median of the others; tokens weigh alike where there is none."""
    both = SiteStats({"image": 10, "text": 5}, {}, saliency={"image": 0.3, "text": 0.1})
    unseen = SiteStats({"image": 10, "text": 5}, {}, saliency={"text": 0.1})
    sites = [replace(LANGUAGE, name=name) for name in "ab"]
    assert [w["image"] for w in mbq_weights(dict(zip(sites, (both, unseen), strict=True))).values()] == pytest.approx([3.0, 3.0])
    assert mbq_weights({LANGUAGE: unseen})[LANGUAGE]["image"] == 1.0


@pytest.mark.parametrize("clip", [None, 2.0])
def test_the_clip_is_asked_of_the_gram_and_two_clips_are_not_one(clip) -> None:
    for curvature in (Input(fusion="none", clip=clip), kronecker(clip=clip)):
        assert curvature.needs.gram
        assert (Needs(gram=True) | curvature.needs).clip == clip
    with pytest.raises(ValueError, match=r"clip of 2\.0 and of 3\.0 cannot be collected together"):
        Needs(clip=2.0) | Needs(clip=3.0)


def test_mbq_weighs_the_image_tokens_of_a_gram() -> None:
    bank = {LANGUAGE: stats(LANGUAGE, Needs(gram=True, fisher=True, saliency=True, gradient=True), image=9, text=4)}
    one = bank[LANGUAGE]
    ratio = one.saliency["image"] / one.saliency["text"]
    expected = (ratio * one.gram["image"] + one.gram["text"]) / (ratio * 9 + 4)
    torch.testing.assert_close(Input(fusion="mbq_ratio").fuse(bank)[LANGUAGE].h_in[0], expected)
    plain = (one.gram["image"] + one.gram["text"]) / 13
    torch.testing.assert_close(Input(fusion="none").fuse(bank)[LANGUAGE].h_in[0], plain)


def kronecker(**settings):
    return KroneckerFisher(**(dict(granularity="token", fusion="kron", rounds=None) | settings))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Input(fusion="kron"), "curvature.fusion must be none, mbq_ratio or mbq_squared"),
        (lambda: Guided(num_groups=0), "curvature.num_groups must be a whole number >= 1, got 0"),
        (lambda: kronecker(granularity="layer"), "curvature.granularity must be token or sequence"),
        (lambda: kronecker(fusion="mean"), "curvature.fusion must be none, mbq_ratio, kron or token"),
        (lambda: kronecker(granularity="sequence"), "curvature.fusion=kron has no effect with curvature.granularity=sequence"),
        (lambda: kronecker(fusion="none", rounds=2), "curvature.rounds=2 has no effect with curvature.fusion=none"),
        (lambda: kronecker(granularity="sequence", fusion="none", rounds=2), "curvature.rounds=2 has no effect"),
        (lambda: Input(fusion="none", clip=0.0), "curvature.clip must be a number > 0, .* or null; got 0.0"),
        (lambda: Input(fusion="none", clip=float("inf")), "curvature.clip must be a number > 0"),
        (lambda: kronecker(clip=-1.0), "curvature.clip must be a number > 0"),
        (lambda: kronecker(fusion="token", clip=2.0), "curvature.clip=2.0 has no effect with curvature.fusion=token"),
        (
            lambda: kronecker(granularity="sequence", fusion="none", clip=2.0),
            "curvature.clip=2.0 has no effect with curvature.granularity=sequence",
        ),
        (lambda: kronecker(rounds=0), "curvature.rounds must be a whole number >= 1 or null, got 0"),
    ],
)
def test_bad_settings_are_named(build, message) -> None:
    with pytest.raises(UserError, match=message):
        build()


def two_samples(pixels, image_tokens):
    image = torch.arange(12)[None] < torch.tensor(image_tokens)[:, None]
    return Rows.of(Batch({"pixel_values": pixels}, image, ~image, torch.ones_like(image), ("a", "b")))


def test_tiles_stay_with_their_sample() -> None:
    flat = two_samples(torch.zeros(4, 3, 8, 8), (3, 9))  # three tokens a tile
    assert [len(v) for v in flat.by_sample(VISION, torch.zeros(4, 5, 7))] == [5, 15]
    stacked = two_samples(torch.zeros(2, 2, 3, 8, 8), (3, 9))
    assert [len(v) for v in stacked.by_sample(VISION, torch.zeros(4, 5, 7))] == [10, 10]
    for unclear, tiles in ((stacked, 3), (two_samples(torch.zeros(3, 3, 8, 8), (3, 10)), 3)):
        with pytest.raises(UserError, match=r"curvature\.granularity=token"):
            unclear.by_sample(VISION, torch.zeros(tiles, 5, 7))
