"""Every calibration set: the same seed draws the same, nothing is in both parts, and what is scored is there to be scored."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from variants import built, each, variants

from mgvq.protocols import Calibration, CalibrationSet
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
