"""Held-out losses sample by sample, and steps that are given up, against the t-test of another library and whole losses."""

import math

import pytest
import torch
from scipy import stats

from mgvq.calibration.tiny_vqa import TinyVQA
from mgvq.model.encode import batches
from mgvq.model.load import load
from mgvq.model.sites import linear, list_sites
from mgvq.model.source import SHIPPED, Source
from mgvq.quantization.race import NOT_ASKED, HeldoutLoss, Race, by_sample, difference, heats
from mgvq.quantization.subject import Samples, Subject
from mgvq.quantization.teacher import Teacher


def samples(*sums: float, tokens: float = 10.0) -> dict[int, torch.Tensor]:
    """One batch of samples with these summed losses."""
    return {0: torch.tensor([[one, tokens] for one in sums], dtype=torch.float64)}


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 8, 17])
def test_heats_ask_every_batch_once_and_a_quarter_of_them_first(number: int) -> None:
    parts = [list(heat) for heat in heats(number)]
    assert sorted(number for part in parts for number in part) == list(range(number))
    assert all(parts)
    assert len(parts[0]) == math.ceil(number / 4)


def test_samples_of_equal_length_are_told_apart_by_the_paired_t_test() -> None:
    own, rival = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)).double() + torch.tensor([[1.0], [0.0]])
    mean, p = difference(samples(*own.tolist()), samples(*rival.tolist()))
    expected = stats.ttest_rel(own.numpy(), rival.numpy(), alternative="greater")
    assert p == pytest.approx(expected.pvalue, rel=1e-9)
    assert mean == pytest.approx(float((own - rival).mean()) / 10)


def test_tokens_of_samples_of_any_length_count_alike() -> None:
    """The difference is the one of all tokens, and its error that of a ratio of sums, by the jackknife."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 40, (60,), generator=draw).double()
    sums = tokens * (0.3 + 0.2 * torch.randn(60, generator=draw).double())
    own, none = {0: torch.stack([sums, tokens], 1)}, {0: torch.stack([0 * sums, tokens], 1)}
    mean, p = difference(own, none)
    assert mean == pytest.approx(float(sums.sum() / tokens.sum()))
    without = (sums.sum() - sums) / (tokens.sum() - tokens)
    jackknife = float((59 * (without - without.mean()).square().mean()).sqrt())
    _, closer = difference({0: torch.stack([sums - (mean - 2 * jackknife) * tokens, tokens], 1)}, none)
    assert p < 1e-6
    assert closer == pytest.approx(float(stats.t.sf(2, 59)), rel=0.1)


def test_equal_losses_are_given_up_as_often_as_the_level_says() -> None:
    draw, none = torch.Generator().manual_seed(0), samples(0, 0, 0, 0)
    found = [difference(samples(*torch.randn(4, generator=draw).tolist()), none)[1] for _ in range(4000)]
    assert sum(p < 0.05 for p in found) / len(found) == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize(
    ("own", "given_up"),
    [
        (samples(12, 13, 12, 14), True),
        (samples(8, 7, 8, 6), False),  # better
        (samples(20, 1, 15, 6), False),  # worse in the mean, within what samples differ
        (samples(11, 11, 11, 11), True),  # every sample by the same
        (samples(10, 10, 10, 10), False),
        (samples(20, 20), False),  # too few to say
        (samples(12, 13, math.nan, 14), False),
        (samples(12, 13, math.inf, 14), False),
    ],
)
def test_what_is_worse_on_the_samples_is_given_up(own, given_up: bool) -> None:
    rival = HeldoutLoss(1.5, samples(*[10] * len(own[0])))
    found = Race(rival, 0.01).given_up(own)
    assert (found is not None) == given_up
    if found:
        assert found.mean == pytest.approx(1.5 + float((own[0][:, 0] - 10).sum()) / 40)
        assert found.num_samples == 4


def test_a_loss_that_is_no_number_is_less_than_none() -> None:
    order = [HeldoutLoss(1.0), HeldoutLoss(2.0)]
    for none in (NOT_ASKED, HeldoutLoss(math.inf), HeldoutLoss(-math.inf)):
        assert order[1].is_less_than(none)
        assert not none.is_less_than(order[1])
        assert not none.is_less_than(none)
    assert order[0].is_less_than(order[1])
    assert not order[1].is_less_than(order[0])


def test_losses_are_summed_sample_by_sample() -> None:
    found = by_sample(torch.tensor([1.0, 2.0, 4.0]), [2, 1])
    assert found.tolist() == [[3, 2], [4, 1]]


@pytest.fixture(scope="module")
def model():
    source = Source(name="tiny_internvl", path=str(SHIPPED / "tiny_internvl"), revision=None, dtype="float32")
    return load(source, torch.device("cpu"))


@pytest.mark.parametrize(("size", "asked"), [(0.02, 64), (10.0, 16)], ids=["no worse", "ruined"])
def test_a_ruined_model_is_asked_a_quarter_of_the_samples(model, size: float, asked: int) -> None:
    drawn = TinyVQA(num_images=1, questions_per_image=4, heldout_images=16, shown="both", seed=0, label_seed=0).draw()
    parts = [list(batches(model.processor, part, 8)) for part in (drawn.examples, drawn.heldout_examples)]
    teacher = Teacher(Subject(model.model, list_sites(model.model, "language"), Samples(*parts)), "kl")
    weight = linear(model.model, list_sites(model.model, "language")[0]).weight
    kept, noise = weight.detach().clone(), torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std()
    try:
        weight.data.add_(0.02 * noise)
        rival = teacher.heldout_loss()
        assert rival.num_samples == 64
        sums = torch.cat(list(rival.batches.values())).sum(0)
        assert rival.mean == pytest.approx(float(sums[0] / sums[1]), rel=1e-6)
        weight.data.copy_(kept + size * noise)
        whole, raced = teacher.heldout_loss(), teacher.heldout_loss(Race(rival, 0.01))
    finally:
        weight.data.copy_(kept)
    assert raced.num_samples == asked
    if asked == 64:
        assert raced.mean == whole.mean
    else:
        assert list(raced.batches) == [0, 4]
        assert all(torch.equal(sums, whole.batches[number]) for number, sums in raced.batches.items())
        assert raced.mean > rival.mean
