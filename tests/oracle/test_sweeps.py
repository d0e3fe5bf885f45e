"""The block loop on layers whose loss is exactly the quadratic that it assumes, and on losses that are no numbers."""

import math
from dataclasses import replace

import numpy
import pytest
import torch
from conftest import layer_problems
from transformers import PreTrainedConfig, PreTrainedModel

from mgvq.codebook.kmeans import KMeans
from mgvq.compensation.direction import without_own_error
from mgvq.compensation.gradient_hessian import GradientHessian
from mgvq.errors import UserError
from mgvq.quantization import blockwise
from mgvq.quantization.blockwise import blockwise_rounding
from mgvq.quantization.codebooks import CodebookCache
from mgvq.quantization.outliers import find_outliers
from mgvq.quantization.race import HeldoutLoss
from mgvq.quantization.rounding import LayerRounder
from mgvq.quantization.subject import Samples, Subject
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.quantization.teacher import Teacher
from mgvq.types import Metric, Site

STEPS = [0.0, 0.05, 0.1, 0.2, 0.4]
OUT, IN = 32, 48


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factor(size, seed):
    tokens = normal(4 * size, size, seed=seed) @ (normal(size, size, seed=seed + 1) + 2 * torch.eye(size))
    return tokens.T @ tokens / len(tokens)


class Layers(PreTrainedModel):
    def __init__(self, number):
        super().__init__(PreTrainedConfig())
        self.layers = torch.nn.ModuleList(torch.nn.Linear(IN, OUT) for _ in range(number))


class Quadratic(Teacher):
    """Two layers, each a block, whose loss is the sum of `<slope, D> + metric.loss(D)`, D their error; stands in for a teacher.

    The slope is what everything behind a layer adds to its gradient.
    """

    def __init__(self, slope=0.0, unit=1.0, seed=0):
        self.model = Layers(2)
        self.sites = [Site(f"layers.{i}", "language", "layers", i, OUT, IN) for i in range(2)]
        self.source, self.unit, self.losses, self._aside = "kl", unit, [], None
        self.weights, self.metrics, self.slopes = {}, {}, {}
        for i, site in enumerate(self.sites):
            self.weights[site] = normal(OUT, IN, seed=seed + 10 * i)
            self.metrics[site] = Metric((factor(IN, seed + 10 * i + 1),), factor(OUT, seed + 10 * i + 3) / OUT)
            self.slopes[site] = slope * self.metrics[site].gradient(normal(OUT, IN, seed=seed + 10 * i + 5))
            self.model.layers[i].weight.data.copy_(self.weights[site])

    def error(self, site):
        return self.model.layers[site.block].weight.detach() - self.weights[site]

    def gradient(self, sites, *_):
        """In another unit than the metric's, if `unit` says so."""
        return {s: self.unit * (self.slopes[s] + self.metrics[s].gradient(self.error(s))) for s in sites}

    def heldout_loss(self, race=None):
        parts = [float((self.slopes[s] * self.error(s)).sum()) + self.metrics[s].loss(self.error(s)) for s in self.sites]
        self.losses.append(self.unit * sum(parts))
        return HeldoutLoss(self.losses[-1])

    def settle(self, block): ...
    def unsettle(self): ...
    def model_changes(self): ...
    def _carried_on(self, blocks): ...
    def _ends(self, blocks): ...
    def put(self, values):
        return values


def without_outliers(problem, number):
    """The problem less that many weights that are stored exactly."""
    outliers = find_outliers(problem.weight, problem.metric, number)
    rest = problem.weight - outliers.dense()
    return replace(problem, weight=rest, target=rest, outliers=outliers)


def swept(teacher, monkeypatch, sweeps=2, steps=STEPS, outliers=0, start="full_precision"):
    """The trials of the block loop."""
    monkeypatch.setattr(blockwise, "Teacher", lambda *_, **__: teacher)
    gradient = {"source": "kl", "start": start, "refresh": True, "sweeps": sweeps, "steps": steps, "shift_damping": 0.05}
    shift = GradientHessian(damping=0.1, output_damping=None, **gradient)
    codebook = KMeans(vector_length=2, share="layer", table="fp16", weight_power=0.0, iterations=5, sample=None, seed=0)
    scores = {s: teacher.metrics[s].h_in[0].diagonal().clone() for s in teacher.sites}
    problems = layer_problems(teacher.sites, weights=teacher.weights, metrics=teacher.metrics, scores=scores)
    if outliers:
        problems = {site: without_outliers(problem, outliers) for site, problem in problems.items()}
    table_groups = cut_table_groups(problems, codebook)
    rates = [next(r for r in codebook.rates() if r.index_bits == 2.0)] * len(table_groups)
    rounder = LayerRounder(CodebookCache(table_groups, codebook, problems), rates, shift, None, {})
    return blockwise_rounding(Subject(teacher.model, teacher.sites, Samples([], [])), {}, shift, rounder, [])


@pytest.mark.parametrize("unit", [1.0, 100.0])
@pytest.mark.parametrize("outliers", [0, 3])
def test_a_gradient_of_a_layers_own_error_moves_nothing(unit, outliers, monkeypatch) -> None:
    """That error is what rounding leaves at the best target there is: a step along its gradient can only lose."""
    for seed in (0, 100):
        teacher = Quadratic(slope=1e-6, unit=unit, seed=seed)
        for site in teacher.sites:  # of which outliers=3 stores one exactly
            teacher.weights[site][3, 5] = 30.0
            teacher.model.layers[site.block].weight.data.copy_(teacher.weights[site])
        _, trials = swept(teacher, monkeypatch, outliers=outliers)
        later = trials[trials.sweep == 1]
        assert len(later) >= 2
        assert (later.gradient_norm > 0).all()
        assert (later.heldout_loss <= later.heldout_before * 1.02).all()


def test_a_second_sweep_follows_what_others_add_to_the_gradient(monkeypatch) -> None:
    """The first block had no gradient in the first sweep: the second finds its optimum, W less its Newton step."""
    _second_sweep_finds_the_optimum(monkeypatch, sweeps=2)


def test_from_a_rounded_start_the_first_gradients_are_those(monkeypatch) -> None:
    _second_sweep_finds_the_optimum(monkeypatch, sweeps=1, start="rounded")


def _second_sweep_finds_the_optimum(monkeypatch, **settings) -> None:
    for seed in (0, 100):
        teacher = Quadratic(slope=0.3, seed=seed)
        _, trials = swept(teacher, monkeypatch, **settings)
        first = trials[(trials.sweep == 1) & (trials.block == 0)]
        assert (first.heldout_loss < first.heldout_before).all()
        assert first.heldout_loss.is_monotonic_decreasing
        assert first.step.max() >= STEPS[-2], "far out, and nearer to the optimum than the next one"


def test_a_gradient_without_the_own_error_is_that_of_the_others_in_any_unit() -> None:
    error, metric = normal(OUT, IN), Metric((factor(IN, 1), factor(IN, 3)), factor(OUT, 5))
    own = metric.gradient(error)
    other = normal(OUT, IN, seed=7)
    other -= (other * error).sum() / (own * error).sum() * own  # nothing along the error
    for unit in (1.0, 0.01, 100.0):
        found = without_own_error(other + unit * own, metric, error)
        assert (found - other).norm() < 1e-4 * (1 + unit) * own.norm()
    assert torch.equal(without_own_error(other, metric, torch.zeros_like(error)), other)
    against = other - own  # falls along the error: nothing that rounding has done
    assert torch.equal(without_own_error(against, metric, error), against)


def test_the_gradient_of_the_metric_is_the_derivative_of_its_loss() -> None:
    for metric in (Metric((factor(6, 1), factor(6, 3)), factor(5, 5)), Metric((factor(6, 1),))):
        error = normal(5, 6).requires_grad_()
        value = 0.5 * sum(
            torch.trace((torch.eye(5) if metric.h_out is None else metric.h_out)[rows, rows] @ error[rows] @ h @ error[rows].T)
            for rows, h in metric.row_runs(5)
        )
        value.backward()
        torch.testing.assert_close(metric.gradient(error.detach()), error.grad)
        assert metric.loss(error.detach()) == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("none", [math.nan, math.inf, -math.inf])
def test_a_step_whose_loss_is_no_number_is_never_taken(none, monkeypatch) -> None:
    """The first step that is tried, another, and the first of the second sweep (behind the loss that it has to beat)."""
    sound = Quadratic(slope=0.3)
    swept(sound, monkeypatch, sweeps=1)
    for place in (1, 2, len(sound.losses) + 1):

        class Broken(Quadratic):
            broken = place

            def heldout_loss(self, race=None):
                return (
                    super().heldout_loss() if len(self.losses) != self.broken else self.losses.append(none) or HeldoutLoss(none)
                )

        _, trials = swept(Broken(slope=0.3), monkeypatch)
        assert (~numpy.isfinite(trials.heldout_loss)).sum() == 1
        assert numpy.isfinite(trials.heldout_loss[trials.chosen]).all()
        assert (trials[trials.sweep == 0].groupby("block").chosen.sum() == 1).all()


def test_a_block_that_no_step_leaves_with_a_loss_is_named(monkeypatch) -> None:
    class Broken(Quadratic):
        def heldout_loss(self, race=None):
            return super().heldout_loss() if not self.losses else HeldoutLoss(math.nan)

    with pytest.raises(UserError, match=r"layers\.1 and its block: the loss on the held-out .* not finite.*dtype=float32"):
        swept(Broken(slope=0.3), monkeypatch, sweeps=1)


def point(step, loss, promised=0.0):
    return blockwise._Point(step, loss, promised)


@pytest.mark.parametrize("best", [0.02, 0.09, 0.3])
def test_steps_lead_on_to_the_one_that_is_nearest_to_the_minimum_of_a_parabola(best) -> None:
    """On a loss that is one, with its own slope: as many evaluations as it takes to see that a larger step is no nearer."""

    def at(step):
        return point(step, (step - best) ** 2, -2 * best * step)

    tried = [0.0]
    while tried[-1] != STEPS[-1] and blockwise._leads_on(at(STEPS[max(0, len(tried) - 2)]), at(tried[-1]), STEPS[len(tried)]):
        tried.append(STEPS[len(tried)])
    nearest = min(STEPS, key=lambda step: abs(step - best))
    assert tried == STEPS[: max(2, STEPS.index(nearest) + 1)]


def test_a_loss_that_is_no_number_ends_no_search_and_one_that_rises_does() -> None:
    nothing = point(0.0, math.nan)
    assert blockwise._leads_on(nothing, point(0.0, 1.0), 0.1)
    assert blockwise._leads_on(point(0.0, 1.0), point(0.1, math.nan, -1.0), 0.2)
    assert not blockwise._leads_on(point(0.0, 1.0), point(0.1, 1.1, -1.0), 0.2)
    assert blockwise._leads_on(point(0.0, 1.0), point(0.1, 0.5, -0.4), 0.2), "it falls faster than promised: no minimum in sight"
