"""Numbers that are none never look like good ones: in losses, answers, metrics and statistics."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from made import CPU, copy, edit_tensors, run, source
from safetensors.torch import load_file

from mgvq.errors import UserError
from mgvq.evaluation.documents import documents
from mgvq.evaluation.forced import score
from mgvq.evaluation.means import by_type, mean, missing_flags, num_broken, weighted
from mgvq.evaluation.perplexity import Perplexity
from mgvq.evaluation.suite_metrics import averages, metrics
from mgvq.evaluation.tiny_vqa import TinyVQA
from mgvq.model.encode import Example, batches
from mgvq.model.load import Loaded, load
from mgvq.model.passes import sampled_labels
from mgvq.model.reference import Reference
from mgvq.model.text import Passage, encode_text

NONE = [math.nan, math.inf, -math.inf]


@pytest.fixture
def model(tmp_path: Path) -> Loaded:
    return load(source(copy(tmp_path / "m")), CPU)


class BreaksAt(torch.nn.Module):
    """A head that puts `value` into one logit (of token 7) of every position, of the rows of which `rows` are true."""

    def __init__(self, head: torch.nn.Module, value: float, every: int) -> None:
        super().__init__()
        self.head, self.value, self.every, self.seen = head, value, every, 0

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        logits = self.head(states).clone()
        positions = logits.view(-1, logits.shape[-1])
        for at in range(len(positions)):
            if (self.seen + at) % self.every == 0:
                positions[at, 7] = self.value
        self.seen += len(positions)
        return logits


def break_head(loaded: Loaded, value: float, every: int = 50) -> None:
    loaded.model.set_output_embeddings(BreaksAt(loaded.model.get_output_embeddings(), value, every))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", NONE)
def test_a_loss_of_one_infinite_logit_is_none(model: Loaded, value: float) -> None:
    examples = [Example(d["sample_id"], d["image"], d["question"], d["answer"]) for d in documents(0, 12)]
    sound = score(model.model, None, batches(model.processor, examples, 12))
    break_head(model, value, every=10**9)  # the first position alone
    found = score(model.model, None, batches(model.processor, examples, 12))
    broken = [key for key, answer in found.items() if not math.isfinite(answer.loss)]
    assert len(broken) == 1
    assert math.isnan(found[broken[0]].loss)
    assert all(found[key] == sound[key] for key in found if key not in broken)


@pytest.mark.parametrize("value", NONE)
@pytest.mark.parametrize("answers", ["forced", "generated"])
def test_questions_about_numbers_that_are_none_make_metrics_missing(model: Loaded, value: float, answers: str) -> None:
    task = TinyVQA(num_questions=26, seed=0, answers=answers)
    sound = task(model.model, None, model.processor, "x")
    assert sound.flags == ()
    break_head(model, value)
    found = task(model.model, None, model.processor, "x")
    broken = ~np.isfinite(found.samples.loss)
    assert 0 < broken.sum() < 26
    assert found.samples.score[broken].isna().all()
    for name in ("tiny_vqa/accuracy", "loss/answer", "tiny_vqa/unparsed"):
        assert math.isnan(found.metrics[name])
        assert f"non_finite:{name}:{broken.sum()}" in found.flags
    for kind, rows in found.samples.groupby("type"):
        assert math.isnan(found.metrics[f"tiny_vqa/accuracy/{kind}"]) == (~np.isfinite(rows.loss)).any()


def test_a_reference_of_numbers_that_are_none_takes_the_divergence_alone(model: Loaded, tmp_path: Path) -> None:
    other = load(source(copy(tmp_path / "other")), CPU)
    break_head(other, math.nan)
    found = TinyVQA(num_questions=26, seed=0, answers="forced")(model.model, Reference(other.model), model.processor, "x")
    assert math.isnan(found.metrics["kl/full_precision"])
    assert math.isfinite(found.metrics["loss/answer"])
    assert [flag.rpartition(":")[0] for flag in found.flags] == ["non_finite:kl/full_precision"]


@pytest.mark.parametrize("value", NONE)
def test_passages_of_numbers_that_are_none_make_metrics_missing(model: Loaded, value: float) -> None:
    model.model.config.get_text_config().max_position_embeddings = 1024
    break_head(model, value, every=3000)
    found = Perplexity(num_passages=6, seed=0)(model.model, None, model.processor, "x")
    number = num_broken(found.samples.loss)
    assert 0 < number < 6
    assert math.isnan(found.metrics["text/perplexity"])
    assert f"non_finite:text/perplexity:{number}" in found.flags


def test_a_run_says_none_and_flags_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantised model is sound here, and its numbers are not: the run ends, with holes in its metrics."""
    from mgvq.evaluation import forced

    plain = forced.logits

    def broken(model: Any, states: torch.Tensor) -> torch.Tensor:
        logits = plain(model, states)
        logits[0, 0] = math.nan
        return logits

    monkeypatch.setattr(forced, "logits", broken)
    metrics = run(tmp_path, "tiny_internvl", "method=rtn").metrics()
    assert metrics["loss/answer"] is metrics["tiny_vqa/accuracy"] is metrics["kl/full_precision"] is None
    assert {"non_finite:loss/answer:1", "non_finite:kl/full_precision:1"} <= set(metrics["flags"])
    assert len(metrics["flags"]) == len(set(metrics["flags"]))


def test_public_benchmarks_lose_the_metrics_of_a_broken_sample() -> None:
    columns = {"type": ["a", "a", "b"], "chance": [0.25] * 3, "parsed": [True, False, True], "corrected": [1.0, 0.0, 1.0]}
    sound = pd.DataFrame({"task": "t", "score": [1.0, 0.0, 1.0], **columns})
    broken = sound.assign(score=[1.0, math.nan, 1.0], corrected=[1.0, math.nan, 1.0])
    assert metrics("t", sound)["t/accuracy"] == averages(sound)["suite/accuracy"] == pytest.approx(2 / 3)
    found = metrics("t", broken)
    assert [name for name, value in found.items() if not math.isnan(value)] == ["t/accuracy/b", "t/chance"]
    assert all(map(math.isnan, averages(broken).values()))


@pytest.mark.parametrize("value", NONE)
def test_means_leave_nothing_out(value: float) -> None:
    assert mean([1.0, 2.0]) == 1.5
    assert weighted([1.0, 2.0], [1, 5]) == 0.5
    assert math.isnan(mean([]))
    assert math.isnan(weighted([], []))
    assert math.isnan(mean([1.0, value]))
    assert math.isnan(weighted([1.0, value], [1, 5]))
    samples = pd.DataFrame({"type": ["a", "b"], "score": [1.0, value]})
    assert by_type(samples, "score")["a"] == 1
    assert math.isnan(by_type(samples, "score")["b"])
    assert missing_flags({"x": 1.0, "y": value}, lambda _: 3) == ("non_finite:y:3",)


@pytest.mark.parametrize("value", NONE)
def test_labels_are_not_drawn_from_numbers_that_are_none(model: Loaded, value: float) -> None:
    examples = [Example(d["sample_id"], d["image"], d["question"], d["answer"]) for d in documents(0, 4)]
    (batch,) = batches(model.processor, examples, 4)
    logs = torch.zeros(int(batch.loss_mask.sum()), 448).log_softmax(-1)
    assert len(sampled_labels(logs, batch, 0)) == len(logs)
    logs[1, 7] = value if value < 0 else math.nan
    if value == -math.inf:  # a token that is never drawn
        assert len(sampled_labels(logs, batch, 0)) == len(logs)
        return
    with pytest.raises(UserError, match=rf"{batch.sample_ids[0]}: the model's predictions are NaN"):
        sampled_labels(logs, batch, 0)


# Tokens that a tokenizer adds by itself


def with_beginning(tokenizer: Any, single: str) -> Any:
    from tokenizers.processors import TemplateProcessing

    names = ["<|user|>", "<|assistant|>"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    )
    return tokenizer


ADDED = [  # what the tokenizer makes of a text A, how many tokens it adds, how many of A's are scored, less their number
    ("$A", 0, -1),
    ("<|user|> $A", 1, 0),
    ("<|user|> <|assistant|> $A", 2, 0),
    ("$A <|assistant|>", 1, -1),
    ("<|user|> $A <|assistant|>", 2, 0),
]


@pytest.mark.parametrize(("single", "added", "scored"), ADDED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_the_tokenizer_adds_is_there_and_never_scored(
    model: Loaded, single: str, added: int, scored: int, side: str
) -> None:
    tokenizer = model.processor.tokenizer
    passages = [Passage("long", "what is in row one ? what is in row two ?"), Passage("short", "what ?")]
    plain = [tokenizer(p.text, add_special_tokens=False).input_ids for p in passages]
    tokenizer = with_beginning(tokenizer, single)
    tokenizer.padding_side = side
    batch = encode_text(tokenizer, passages)
    for own, ids, mask, valid in zip(plain, batch.inputs["input_ids"], batch.loss_mask, batch.valid_mask, strict=True):
        assert int(valid.sum()) == len(own) + added
        assert ids[mask].tolist() == own[len(own) - (len(own) + scored) :]


def test_a_text_is_read_as_the_model_knows_texts(tmp_path: Path) -> None:
    """The logits of the text's tokens are those behind the beginning, as transformers' own call of the tokenizer gives them."""
    loaded = load(source(copy(tmp_path / "m")), CPU)
    tokenizer = with_beginning(loaded.processor.tokenizer, "<|user|> $A")
    text = "what is in row one ?"
    (found,) = score(loaded.model, None, [encode_text(tokenizer, [Passage("p", text)])]).values()
    inputs = tokenizer(text, return_tensors="pt")
    logs = loaded.model(**{k: inputs[k] for k in ("input_ids", "attention_mask")}).logits[0].log_softmax(-1)
    targets = inputs["input_ids"][0, 1:]
    assert found.num_tokens == len(targets)
    assert found.loss == pytest.approx(-logs[:-1].gather(1, targets[:, None]).sum().item(), rel=1e-5)


# Scales


def test_the_same_function_in_other_units_has_the_same_loss_at_full_precision(tmp_path: Path) -> None:
    """up_proj x 2^-22 and down_proj x 2^22 in float32."""
    folder = copy(tmp_path / "m")
    names = [name for name in load_file(folder / "model.safetensors") if "language" in name]

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            if ".up_proj." in name:
                tensors[name] = tensors[name].float() * 2.0**-22
            if ".down_proj." in name:
                tensors[name] = tensors[name].float() * 2.0**22

    edit_tensors(folder, scale)
    scaled, plain = (load(source(f), CPU) for f in (folder, copy(tmp_path / "plain")))
    task = TinyVQA(num_questions=26, seed=0, answers="forced")
    found = task(scaled.model, Reference(plain.model), plain.processor, "x").metrics
    assert found["kl/full_precision"] == pytest.approx(0, abs=1e-6)
