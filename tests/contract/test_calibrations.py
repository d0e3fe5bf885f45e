"""Every calibration set: the same seed draws the same, nothing is in both parts, and what is scored is there to be scored."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from variants import built, each, variants

from mgvq.calibration.examples import further_batches, further_examples
from mgvq.protocols import Calibration, CalibrationSet, HasGramSamples
from mgvq.types import Batch

CALIBRATIONS = each("calibration")
each_calibration = pytest.mark.parametrize("calibration", CALIBRATIONS.values(), ids=CALIBRATIONS.keys())


def names(samples: Iterable[Any]) -> list[str]:
    return [sample.sample_id for sample in samples]


@each_calibration
def test_it_draws_two_parts_that_share_no_sample(calibration: Calibration) -> None:
    assert isinstance(calibration, Calibration)
    drawn = calibration.draw()
    assert isinstance(drawn, CalibrationSet)
    examples, heldout = names(drawn.examples), names(drawn.heldout_examples)
    assert examples
    assert heldout
    assert len({*examples, *heldout}) == len(examples) + len(heldout)
    again = calibration.draw()
    assert (names(again.examples), names(again.heldout_examples)) == (examples, heldout)
    assert again.label_seed == drawn.label_seed


@pytest.mark.parametrize("name", variants("calibration"))
def test_a_seed_draws_its_own_samples_in_its_own_order(name: str) -> None:
    sets = [built("calibration", name, f"seed={seed}").draw().examples for seed in range(5)]
    assert len({tuple((s.sample_id, getattr(s, "question", None)) for s in samples) for samples in sets}) > 1


@each_calibration
def test_every_batch_can_be_scored(calibration: Calibration, loaded: Any) -> None:
    drawn = calibration.draw()
    for samples, batches in ((drawn.examples, drawn.batches), (drawn.heldout_examples, drawn.heldout)):
        made: list[Batch] = list(batches(loaded.processor))
        assert sorted(n for batch in made for n in batch.sample_ids) == sorted(names(samples)), "each sample once"
        for batch, again in zip(made, batches(loaded.processor), strict=True):
            shape = batch.inputs["input_ids"].shape
            assert batch.image_mask.shape == batch.loss_mask.shape == batch.valid_mask.shape == shape
            assert batch.loss_mask.any(1).all(), "every row has something to predict"
            assert not (batch.loss_mask & ~batch.valid_mask).any(), "padding is not scored"
            assert not (batch.image_mask & ~batch.valid_mask).any()
            assert not (batch.loss_mask & batch.image_mask).any(), "image tokens are not scored"
            first = batch.valid_mask.long().argmax(1)
            assert not batch.loss_mask[torch.arange(len(first)), first].any(), "the first token has nothing before it"
            assert calibration.shows_images or not batch.image_mask.any()
            assert batch.image_mask.any() == any(torch.is_tensor(v) and n.startswith("pixel") for n, v in batch.inputs.items())
            assert all(torch.equal(t, again.inputs[n]) for n, t in batch.inputs.items() if torch.is_tensor(t))


def two(name: str, *settings: str) -> Any:
    """Two images, rows or passages for the gradients."""
    return built("calibration", name, f"{'num_images' if name == 'tiny_vqa' else 'num_samples'}=2", *settings).draw()


@pytest.mark.parametrize("name", variants("calibration"))
def test_further_samples_for_the_gram_come_last_and_are_held_out_nowhere(name: str) -> None:
    plain, same, more = two(name), two(name, "gram_samples=2"), two(name, "gram_samples=3")
    for drawn in (plain, same, more):
        assert isinstance(drawn, HasGramSamples)
        assert [names(d) for d in (drawn.examples, drawn.heldout_examples)] == [
            names(d) for d in (plain.examples, plain.heldout_examples)
        ]
    assert not further_examples(plain)
    assert not further_examples(same)
    further = names(further_examples(more))
    assert len(further) == len(plain.examples) / 2
    assert not {*further} & {*names(plain.examples), *names(plain.heldout_examples)}


@pytest.mark.parametrize("name", variants("calibration"))
def test_further_samples_become_batches(name: str, loaded: Any) -> None:
    assert not list(further_batches(two(name), loaded.processor))
    more = two(name, "gram_samples=3")
    made = [sample for batch in further_batches(more, loaded.processor) for sample in batch.sample_ids]
    assert sorted(made) == sorted(names(further_examples(more)))


def test_a_set_that_knows_no_further_samples_has_none() -> None:
    class Plain:
        label_seed, packable, examples, heldout_examples = 0, False, (), ()

        def batches(self, processor: Any) -> Any: ...
        def heldout(self, processor: Any) -> Any: ...

    assert isinstance(Plain(), CalibrationSet)
    assert list(further_examples(Plain())) == list(further_batches(Plain(), None)) == []
