"""Each score against its definition, spelled out token by token or with dense Kronecker algebra on a tiny layer."""

import itertools
from dataclasses import replace

import pytest
import torch

from mgvq.sensitivity.activation import Activation
from mgvq.sensitivity.fisher_diag import FisherDiag
from mgvq.sensitivity.global_local import GlobalLocal
from mgvq.sensitivity.gram_diag import GramDiag
from mgvq.sensitivity.layer_scope import LayerScope
from mgvq.sensitivity.model_scope import ModelScope
from mgvq.sensitivity.obs import Obs
from mgvq.sensitivity.random import Random
from mgvq.sensitivity.riemann import Riemann
from mgvq.sensitivity.taylor import Taylor
from mgvq.sensitivity.wanda import Wanda
from mgvq.sensitivity.weight_norm import WeightNorm
from mgvq.sensitivity.weight_stats import WeightStats
from mgvq.types import MODALITIES, Site, SiteStats

OUT, IN, ANSWERS = 3, 5, 7
DOUBLE = torch.float64
LAYER, OTHER = (Site(name, "language", "q_proj", 0, OUT, IN) for name in ("layer", "other"))
EVERY = [
    *(kind(modality="both") for kind in (GramDiag, Activation, Wanda, FisherDiag, Taylor, ModelScope)),
    *(kind(modality="both", damping=0.05) for kind in (Riemann, Obs, LayerScope)),
    GlobalLocal(reading="scope", alpha=0.5, modality="both", damping=0.01),
    GlobalLocal(reading="split", alpha=None, modality="both", damping=0.01),
    WeightNorm(),
    WeightStats(),
]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def tokens(seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and gradients of the tokens of each modality; within it every input meets every gradient: they are independent."""
    parts = {}
    for number, (modality, size) in enumerate(zip(MODALITIES, (6, 4), strict=True)):
        inputs = draw(seed + 10 * number, size, IN) @ draw(seed + 10 * number + 1, IN, IN) * (3 - 2 * number)
        gradients = draw(seed + 10 * number + 2, 3 + number, OUT) @ draw(seed + 10 * number + 3, OUT, OUT) * (1 + number)
        pairs = list(itertools.product(inputs, gradients))
        parts[modality] = torch.stack([x for x, _ in pairs]), torch.stack([g for _, g in pairs])
    return parts


def stats_of(parts: dict[str, tuple[torch.Tensor, torch.Tensor]], gradient: torch.Tensor) -> SiteStats:
    return SiteStats(
        num_tokens={m: len(x) for m, (x, _) in parts.items()},
        gram={m: x.T @ x for m, (x, _) in parts.items()},
        num_answers=ANSWERS,
        fisher={m: g.T @ g for m, (_, g) in parts.items()},
        gradient=gradient,
    )


@pytest.fixture
def weight() -> torch.Tensor:
    return draw(0, OUT, IN)


@pytest.fixture
def gradient() -> torch.Tensor:
    return draw(1, OUT, IN) / 10


@pytest.fixture
def stats(gradient: torch.Tensor) -> SiteStats:
    return stats_of(tokens(2), gradient)


def chosen(modality: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [part for m, part in tokens(2).items() if modality in ("both", m)]


def inputs_of(modality: str) -> torch.Tensor:
    return torch.cat([x for x, _ in chosen(modality)])


def increase(error: torch.Tensor, modality: str) -> float:
    """`1/2 sum_t (g_t^T D x_t)^2 / answers`: the second-order increase of the mean answer loss, tokens independent."""
    return sum(float(g @ error @ x) ** 2 for xs, gs in chosen(modality) for x, g in zip(xs, gs, strict=True)) / ANSWERS / 2


def in_channel(column: torch.Tensor, channel: int) -> torch.Tensor:
    error = torch.zeros(OUT, IN, dtype=DOUBLE)
    error[:, channel] = column
    return error


def dense_fisher(stats: SiteStats, modality: str) -> torch.Tensor:
    """Of vec(W), rows first: channel c of output r is number r * IN + c."""
    terms = [torch.kron(stats.fisher[m], stats.gram[m] / stats.num_tokens[m]) for m in MODALITIES if modality in ("both", m)]
    return sum(terms, torch.zeros(OUT * IN, OUT * IN, dtype=DOUBLE)) / ANSWERS


def check(metric, weight: torch.Tensor, stats: SiteStats, expected: list[float]) -> None:
    score = metric({LAYER: weight}, {LAYER: stats})[LAYER]
    torch.testing.assert_close(score, torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("modality", ["both", "image", "text"])
def test_model_scope_is_the_expected_increase_of_the_loss(weight, stats, modality) -> None:
    expected = []
    for c in range(IN):
        # Errors of the energy of the channel along each axis and against it: their mean outer product is s^2 I exactly.
        sigma = [sign * weight[:, c].norm() * axis for axis in torch.eye(OUT, dtype=DOUBLE) for sign in (-1, 1)]
        expected.append(sum(increase(in_channel(e, c), modality) for e in sigma) / len(sigma))
    check(ModelScope(modality=modality), weight, stats, expected)


def test_model_scope_is_the_mean_over_random_errors(weight, stats) -> None:
    errors = draw(3, 2000, OUT)
    errors *= weight[:, 2].norm() / errors.norm(dim=1, keepdim=True)  # on the sphere: a relative squared error of exactly 1
    sampled = torch.tensor([increase(in_channel(e, 2), "both") for e in errors])
    score = ModelScope(modality="both")({LAYER: weight}, {LAYER: stats})[LAYER][2]
    assert abs(sampled.mean() - score) < 4 * sampled.std() / len(sampled) ** 0.5 < 0.1 * score


@pytest.mark.parametrize("modality", ["both", "image", "text"])
def test_taylor_is_the_change_when_the_channel_is_lost(weight, stats, gradient, modality) -> None:
    lost = [in_channel(weight[:, c], c) for c in range(IN)]
    expected = [abs(float((gradient * w).sum())) + increase(w, modality) for w in lost]
    check(Taylor(modality=modality), weight, stats, expected)
    flat = [w.flatten() for w in lost]
    dense = dense_fisher(stats, modality)
    torch.testing.assert_close([float(v @ dense @ v) / 2 for v in flat], [increase(w, modality) for w in lost])


@pytest.mark.parametrize("modality", ["both", "image", "text"])
def test_fisher_diag_adds_up_losing_the_weights_one_by_one(weight, stats, modality) -> None:
    expected = [0.0] * IN
    for r, c in itertools.product(range(OUT), range(IN)):
        one = torch.zeros(OUT, dtype=DOUBLE)
        one[r] = weight[r, c]
        expected[c] += increase(in_channel(one, c), modality)
    check(FisherDiag(modality=modality), weight, stats, expected)


@pytest.mark.parametrize(("modality", "rtol"), [("both", 1e-2), ("image", 1e-5), ("text", 1e-5)])
def test_riemann_is_the_damped_natural_gradient_energy(weight, stats, gradient, modality, rtol) -> None:
    dense = dense_fisher(stats, modality).view(OUT, IN, OUT, IN)
    # The nearest Kronecker product is the best rank-one matrix of the rearranged Fisher (Van Loan and Pitsianis 1993).
    u, s, v = torch.linalg.svd(dense.permute(0, 2, 1, 3).reshape(OUT * OUT, IN * IN), full_matrices=False)
    h_out, h_in = u[:, 0].view(OUT, OUT) * u[:, 0].sum().sign(), v[0].view(IN, IN) * v[0].sum().sign() * s[0]
    h_out, h_in = (h * h.trace().sign() for h in (h_out, h_in))
    h_out, h_in = (h + 0.05 * h.diagonal().mean() * torch.eye(len(h), dtype=DOUBLE) for h in (h_out, h_in))
    blocks = torch.kron(h_out, h_in).view(OUT, IN, OUT, IN)
    columns = [(gradient[:, c], blocks[:, c, :, c]) for c in range(IN)]
    expected = torch.tensor([float(g @ torch.linalg.solve(block, g)) / 2 for g, block in columns])
    score = Riemann(modality=modality, damping=0.05)({LAYER: weight}, {LAYER: stats})[LAYER]
    torch.testing.assert_close(score, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("modality", ["both", "image", "text"])
def test_obs_is_the_error_after_the_best_compensation(weight, stats, modality) -> None:
    """Remove a channel, fit all others by least squares, look at what is left of the output error."""
    inputs, damping = inputs_of(modality), 0.05
    importance = inputs.square().sum() / len(inputs) / IN
    rows = torch.cat([inputs / len(inputs) ** 0.5, (damping * importance).sqrt() * torch.eye(IN, dtype=DOUBLE)])
    expected = []
    for c in range(IN):
        others = [i for i in range(IN) if i != c]
        error = rows[:, [c]] @ weight[:, c][None, :]
        fitted = torch.linalg.lstsq(rows[:, others], error).solution
        left = (error - rows[:, others] @ fitted).square().sum()
        expected.append(float(left / ((inputs @ weight.T).square().sum() / len(inputs))))
    check(Obs(modality=modality, damping=damping), weight, stats, expected)
    mean = torch.tensor(expected).log().mean().exp()
    check(LayerScope(modality=modality, damping=damping), weight, stats, [float(e / mean) for e in expected])


def test_obs_by_channel_does_not_see_how_channels_are_scaled(weight, stats) -> None:
    """Inputs times s and columns over s are the same layer; and with the mean one massive channel leaves the others `|W_c|^2`."""
    scale = torch.ones(IN, dtype=DOUBLE)
    scale[1] = 300.0

    def scored(of, weight, scale):
        scaled = replace(stats, gram={m: (scale[:, None] * g * scale).to(g.dtype) for m, g in stats.gram.items()})
        return Obs(modality="both", damping=0.05, damping_of=of)({LAYER: weight / scale}, {LAYER: scaled})[LAYER]

    plain, others = torch.ones(IN, dtype=DOUBLE), [c for c in range(IN) if c != 1]
    torch.testing.assert_close(scored("channel", weight, scale), scored("channel", weight, plain), rtol=1e-3, atol=0)
    spreads = {}
    for of in ("mean", "median", "channel"):
        over_norm = scored(of, weight, scale)[others] / weight[:, others].double().square().sum(0)
        spreads[of] = float(over_norm.max() / over_norm.min())
    assert spreads["mean"] < 1.1 < 1.5 < min(spreads["median"], spreads["channel"])


@pytest.mark.parametrize("modality", ["both", "image", "text"])
def test_activations_and_weights_spelled_out(weight, stats, modality) -> None:
    inputs = inputs_of(modality)
    power = [sum(float(v) ** 2 for v in inputs[:, c]) / len(inputs) for c in range(IN)]
    lost = [sum(float(v) ** 2 for v in torch.outer(inputs[:, c], weight[:, c]).flatten()) / len(inputs) for c in range(IN)]
    check(GramDiag(modality=modality), weight, stats, power)
    check(Activation(modality=modality), weight, stats, [p**0.5 for p in power])
    check(Wanda(modality=modality), weight, stats, lost)
    check(WeightNorm(), weight, stats, [sum(float(v) ** 2 for v in weight[:, c]) for c in range(IN)])


def test_weight_stats_is_the_energy_of_a_gaussian_layer_and_more_in_its_tail() -> None:
    site = Site("layer", "language", "q_proj", 0, 20000, 3)
    weight = draw(4, 20000, 3)
    norm, stats = (metric({site: weight}, {})[site] for metric in (WeightNorm(), WeightStats()))
    torch.testing.assert_close(stats, norm, rtol=0.05, atol=0)
    weight[:, 0] *= weight[:, 0].abs()  # a heavier tail
    weight[:, 0] *= weight[:, 1].norm() / weight[:, 0].norm()  # at equal energy
    norm, stats = (metric({site: weight}, {})[site] for metric in (WeightNorm(), WeightStats()))
    assert stats[0] / norm[0] > 2 * stats[1] / norm[1]


@pytest.fixture
def model(weight, stats, gradient):
    """Two layers, the second with other weights, tokens of one modality only and an unused channel."""
    other = {"image": tokens(50)["image"], "text": (torch.zeros(0, IN, dtype=DOUBLE), torch.zeros(0, OUT, dtype=DOUBLE))}
    other["image"][0][:, 3] = 0
    return {LAYER: weight, OTHER: draw(5, OUT, IN) / 9}, {LAYER: stats, OTHER: stats_of(other, gradient / 2)}


def test_scope_reading_is_a_geometric_mean_of_model_and_layer_scope(model) -> None:
    whole, local = ModelScope(modality="both")(*model), Obs(modality="both", damping=0.01)(*model)
    fused = GlobalLocal(reading="scope", alpha=0.3, modality="both", damping=0.01)(*model)
    everything = torch.cat([whole[s] for s in model[0]])
    mean = everything[everything > 0].log().mean().exp()
    for s in model[0]:
        layer = local[s] / local[s].log().mean().exp()
        torch.testing.assert_close(fused[s], (whole[s] / mean) ** 0.3 * layer**0.7, rtol=1e-4, atol=0)
    assert fused[OTHER][3] == 0


def test_the_ends_of_the_scope_reading_are_the_two_scopes(model) -> None:
    first = GlobalLocal(reading="scope", alpha=1.0, modality="both", damping=0.01)(*model)
    last = GlobalLocal(reading="scope", alpha=0.0, modality="both", damping=0.01)(*model)
    whole, local = ModelScope(modality="both")(*model), LayerScope(modality="both", damping=0.01)(*model)
    ratio = float(first[LAYER][0] / whole[LAYER][0])
    for s in model[0]:
        torch.testing.assert_close(first[s], whole[s] * ratio, rtol=1e-5, atol=0)
        torch.testing.assert_close(last[s], local[s], rtol=1e-5, atol=0)


def test_split_reading_deals_out_the_layers_global_total_locally(model) -> None:
    whole, local = ModelScope(modality="both")(*model), Obs(modality="both", damping=0.01)(*model)
    fused = GlobalLocal(reading="split", alpha=None, modality="both", damping=0.01)(*model)
    for s in model[0]:
        torch.testing.assert_close(fused[s].sum(), whole[s].sum())
        torch.testing.assert_close(fused[s] / fused[s].sum(), local[s] / local[s].sum())


@pytest.mark.parametrize("metric", EVERY, ids=repr)
def test_reordered_channels_have_reordered_scores(metric, model) -> None:
    order = [3, 0, 4, 2, 1]
    weights = {s: w[:, order] for s, w in model[0].items()}
    bank = {
        s: replace(st, gram={m: g[order][:, order] for m, g in st.gram.items()}, gradient=st.gradient[:, order])
        for s, st in model[1].items()
    }
    before, after = metric(*model), metric(weights, bank)
    for s in weights:
        torch.testing.assert_close(after[s], before[s][order], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("metric", EVERY, ids=repr)
def test_twice_the_same_data_is_the_same_score(metric, model) -> None:
    """Sums are divided by the right counts: twice the samples are twice the sums; the gradient is a mean."""
    twice = {
        s: replace(
            st,
            num_tokens={m: 2 * n for m, n in st.num_tokens.items()},
            gram={m: 2 * g for m, g in st.gram.items()},
            fisher={m: 2 * f for m, f in st.fisher.items()},
            num_answers=2 * st.num_answers,
        )
        for s, st in model[1].items()
    }
    before, after = metric(*model), metric(model[0], twice)
    for s in model[0]:
        torch.testing.assert_close(after[s], before[s], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("metric", EVERY, ids=repr)
def test_a_layer_without_the_chosen_modality_is_scored_on_what_it_has(metric, model) -> None:
    if hasattr(metric, "modality"):
        text, image = (replace(metric, modality=m)(*model) for m in ("text", "image"))
        if not isinstance(metric, GlobalLocal):  # whose scores of one layer depend on all layers
            torch.testing.assert_close(text[OTHER], image[OTHER])
        assert not torch.allclose(text[LAYER] / text[LAYER].sum(), image[LAYER] / image[LAYER].sum())


def test_random_scores_are_spread_evenly_and_named_by_layer_and_seed() -> None:
    wide = [Site(name, "language", "q_proj", 0, 1, 4000) for name in ("a", "b")]
    weights = {s: torch.ones(1, 4000) for s in wide}
    one, other = Random(seed=0)(weights, {}), Random(seed=1)(weights, {})
    logs = one[wide[0]].log()
    assert abs(logs.mean()) < 0.06
    assert abs(logs.std() - 1) < 0.05
    assert not torch.equal(one[wide[0]], one[wide[1]])
    assert not torch.equal(one[wide[0]], other[wide[0]])
    assert torch.equal(Random(seed=0)({wide[1]: weights[wide[1]]}, {})[wide[1]], one[wide[1]])
