"""A tuning from end to end: better on held-out samples, codes and bits as they were, the model untouched, what is refused."""

from dataclasses import replace

import pytest
import torch
from conftest import documented_columns
from variants import variants

import mgvq
from mgvq.errors import UserError
from mgvq.model.load import load
from mgvq.model.sites import list_sites
from mgvq.model.source import SHIPPED, Source
from mgvq.quantization.pipeline import quantize
from mgvq.runs.build import build
from mgvq.runs.compose import composer
from mgvq.runs.dry import report
from mgvq.runs.method import build_method
from mgvq.runs.quantise import samples_as_batches

QUICK = ("calibration.num_images=4", "calibration.questions_per_image=2", "calibration.heldout_images=2")
RUN = ("model=tiny_internvl", "method=rtn", "scope=language", "calibration=tiny_vqa", *QUICK)
SHORT = ("tuning.steps=4", "tuning.checks=2", "tuning.learning_rate=0.01")


def composed(*words: str):
    with composer() as compose:
        return compose(*words)


@pytest.mark.parametrize("name", variants("tuning"))
def test_codes_and_bits_and_the_model_stay(name: str) -> None:
    cfg = composed(*RUN, f"tuning={name}", *SHORT)
    method, drawn = build_method(cfg), build(cfg, "calibration").draw()
    assert method is not None
    assert method.tuning is not None
    source = Source(name="tiny_internvl", path=str(SHIPPED / "tiny_internvl"), revision=None, dtype="float32")
    loaded = load(source, torch.device("cpu"))
    sites, samples = list_sites(loaded.model, cfg.scope), samples_as_batches(loaded, drawn, for_grams=False)
    before = {key: tensor.clone() for key, tensor in loaded.model.state_dict().items()}

    finished = {}
    found = quantize(loaded.model, sites, {}, method, 2.5, samples, finished, loaded.stored_dtype)
    assert not finished, "a tuned block is not resumed"
    assert all(torch.equal(tensor, before[key]) for key, tensor in loaded.model.state_dict().items())

    plain = quantize(loaded.model, sites, {}, replace(method, tuning=None), 2.5, None) if not method.tunes_blocks else None
    assert list(found.tuning.columns) == documented_columns("tuning.parquet")
    chosen = found.tuning[found.tuning.chosen]
    assert (chosen.heldout_loss < found.tuning[found.tuning.step == 0].heldout_loss.to_numpy()).any(), "something was learned"
    assert found.parameters
    assert set(found.parameters) <= set(before)
    if plain is not None:
        assert plain.stored_bits == found.stored_bits
        for site, weight in found.weights.items():
            stored = plain.weights[site].tensors()
            for role, tensor in weight.tensors().items():
                assert tensor.dtype == stored[role].dtype
                assert role in weight.tunable or torch.equal(tensor, stored[role])


def test_in_python_it_is_tuned_as_in_a_run() -> None:
    source = Source(name="tiny_internvl", path=str(SHIPPED / "tiny_internvl"), revision=None, dtype="float32")
    loaded, drawn = load(source, torch.device("cpu")), build(composed(*RUN), "calibration").draw()
    short = dict(word.split("=") for word in ("tuning=tables", *SHORT))
    settings = {
        name: value if name == "tuning" else float(value) if "rate" in name else int(value) for name, value in short.items()
    }
    made = mgvq.quantize(loaded.model, loaded.processor, drawn, method="rtn", bits=2.5, scope="language", settings=settings)
    assert list(made.report.tuning.step) == [0, 2, 4]
    assert made.report.tune_seconds > 0
    name, tuned = next(iter(made.report.parameters.items()))
    assert torch.equal(made.model.get_parameter(name).float(), tuned.float())
    assert not torch.equal(loaded.model.get_parameter(name).float(), tuned.float())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("method=rtn", "tuning=tables", "calibration=none"), "learns from samples"),
        ((*RUN, "tuning=tables", "calibration.heldout_images=0"), "calibration.heldout_images=0"),
        ((*RUN, "tuning=end_to_end", "tuning.embeddings=true", "embedding_bits=8"), "embedding_bits=8"),
        (("method=mgvq", "tuning=block"), "tuning=block"),
    ],
)
def test_what_cannot_work_is_refused(words, said) -> None:
    with pytest.raises(UserError, match=said):
        build_method(composed(*words))


def test_a_dry_run_says_what_it_takes(capsys) -> None:
    assert not report(composed(*RUN, "tuning=tables"))
    assert "decoded layers and gradients" in capsys.readouterr().out
