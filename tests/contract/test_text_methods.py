"""Every method on a language model by itself: it runs from calibration text to perplexity, or says why it cannot.

A random Llama of two blocks; its tokenizer is trained on the calibration text.
"""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, sampled
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from mgvq.checkpoint.load import load as load_checkpoint
from mgvq.data.english import docstrings, language_reference
from mgvq.errors import UserError
from mgvq.model.load import load
from mgvq.model.processor import load_processor
from mgvq.model.sites import list_sites
from mgvq.model.source import Source
from mgvq.model.text import Passage, encode_text, text_batches
from mgvq.runs.build import chosen
from mgvq.runs.compose import composer
from mgvq.runs.execute import execute
from mgvq.runs.store import RunFolder

METHODS = sorted(f.stem for f in (ROOT / "conf" / "method").glob("*.yaml"))
SMALL = ["evaluation=perplexity", "evaluation.num_passages=3"]
FEW = ["calibration=text", "calibration.num_samples=3", "calibration.heldout_samples=1"]
BUDGET = 2.1  # tables of layers this small take up to a tenth of a bit; at 2.0 bits: test_methods.py
ONCE = ["compensation.sweeps=1", "compensation.steps=[0.0,0.1]"]  # the gradient's work, made less


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in the hub's format."""
    path = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=1024, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(list(docstrings().passages.values())[:100], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(path)
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=1024, num_key_value_heads=4, tie_word_embeddings=True, eos_token_id=0, **shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # as initialised the blocks hardly matter
        if parameter.ndim >= 2:
            parameter.data.mul_(3)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(path)
    return path


def composed(folder: Path, *overrides: str):
    with composer() as compose:
        cfg = compose("model=local", f"model.path={folder}", *overrides)
    cfg.paths.results = str(folder.parent / "results")
    return cfg


def run(folder: Path, *overrides: str) -> RunFolder:
    cfg = composed(folder, *SMALL, *overrides)
    done = RunFolder(folder.parent / "runs" / "-".join(overrides).replace("/", "_"))
    execute(cfg, done)
    return done


@pytest.mark.parametrize("method", sampled(METHODS, 7))
def test_every_method_runs_on_text_or_says_why_not(folder: Path, method: str) -> None:
    reads = chosen(composed(folder, f"method={method}"), "calibration")
    overrides = [f"method={method}", *(FEW if reads else []), *(ONCE if method in ("mgvq", "mgvq_uniform") else [])]
    if method == "mbq":
        with pytest.raises(UserError, match=r"calibration=text shows no image.* method=mbq is awq"):
            run(folder, *overrides)
        return
    quantises = method != "full_precision"
    done = run(folder, *overrides, *([f"budget.bits_per_weight={BUDGET}"] if quantises else []))
    metrics = done.metrics()
    assert metrics["text/perplexity"] == pytest.approx(torch.tensor(metrics["loss/answer"]).exp().item())
    if quantises:
        assert metrics["kl/full_precision"] > 1e-4
        assert 0.9 * BUDGET <= metrics["bits/quantized_layers"] <= 1.01 * BUDGET
    else:
        assert metrics["kl/full_precision"] < 1e-6
    told = json.loads((done.path / "provenance.json").read_text())["texts"]
    assert told["evaluation"] == language_reference().sha256
    assert told.get("calibration") == (docstrings().sha256 if reads else None)


def test_the_gradient_may_be_taken_for_several_blocks_together(folder: Path) -> None:
    words = ["method=mgvq", *FEW, *ONCE, "compensation.refresh=2", f"budget.bits_per_weight={BUDGET}"]
    assert run(folder, *words).metrics()["kl/full_precision"] > 0


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["method=kmeans_ldlq", *SMALL], "calibration shows it images: set calibration=text"),
        (["method=kmeans"], "evaluation shows it images: set evaluation=perplexity"),
        (["method=kmeans", *SMALL, "scope=language_projector"], "no projector"),
        (["method=mgvq", *SMALL, *FEW, "grouping=modality"], "grouping as set here tells images from text"),
        (["method=gptq", *SMALL, *FEW, "sensitivity.modality=image"], "sensitivity as set here tells images from text"),
    ],
)
def test_pictures_are_refused(folder: Path, tmp_path: Path, overrides: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        execute(composed(folder, *overrides), RunFolder(tmp_path / "run"))


def test_a_text_of_ones_own_is_read_in_windows(folder: Path, tmp_path: Path) -> None:
    """What calibrates and what is predicted are both in the provenance, and are not the same."""
    for name, corpus in (("train", docstrings()), ("test", language_reference())):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(list(corpus.passages.values())[:12]))
    texts = {group: f"{group}.path={tmp_path}/{name}.txt" for group, name in (("calibration", "train"), ("evaluation", "test"))}
    cut = [f"{group}.window=128" for group in texts]
    words = ["method=gptq", "calibration=text", *cut, "calibration.num_samples=6", "calibration.heldout_samples=2"]
    words += ["evaluation=perplexity", "evaluation.num_passages=null", "evaluation.stride=64", f"budget.bits_per_weight={BUDGET}"]
    done = RunFolder(tmp_path / "run")
    execute(composed(folder, *words, *texts.values()), done)
    samples = pd.read_parquet(done.path / "samples.parquet")
    told = json.loads((done.path / "provenance.json").read_text())["texts"]
    assert set(samples.num_tokens) == {127, 64}
    assert done.metrics()["loss/answer"] == pytest.approx(samples.loss.sum() / samples.num_tokens.sum())
    assert told["calibration"] != told["evaluation"]
    same = composed(folder, *words, texts["evaluation"], f"calibration.path={tmp_path}/test.txt")
    with pytest.raises(UserError, match="calibration and evaluation read the same text"):
        execute(same, RunFolder(tmp_path / "same"))


def test_a_checkpoint_is_a_model_again(folder: Path) -> None:
    done = run(folder, "method=kmeans", "seed=1", f"budget.bits_per_weight={BUDGET}")
    model, tokenizer = load_checkpoint(done.checkpoint), load_processor(str(done.checkpoint))
    assert model.generate(**tokenizer("the value", return_tensors="pt"), max_new_tokens=3, do_sample=False).shape[1] > 2
    sites = list_sites(model, "all")
    assert {site.tower for site in sites} == {"language"}
    assert [site.name for site in sites] == [site.name for site in list_sites(model, "language")]
    assert len(sites) == 14


def test_loss_and_divergence_are_those_of_each_passage_alone(folder: Path) -> None:
    """Neither the padding nor the company of others plays a part."""
    from mgvq.evaluation.forced import score

    loaded = load(Source(name="x", path=str(folder), revision=None, dtype="float32"), torch.device("cpu"))
    other = load_checkpoint(run(folder, "method=rtn", "seed=0", f"budget.bits_per_weight={BUDGET}").checkpoint)
    passages = [Passage(name, text) for name, text in list(language_reference().passages.items())[:5]]
    scored = score(other, loaded.model, text_batches(loaded.processor, passages, 4))
    for passage in passages:
        ids = loaded.processor(passage.text, return_tensors="pt").input_ids
        with torch.no_grad():
            logits, expected = (m(ids, labels=ids) for m in (other, loaded.model))
            logs, teacher = (o.logits[0, :-1].log_softmax(-1) for o in (logits, expected))
        found = scored[passage.sample_id]
        assert found.num_tokens == ids.shape[1] - 1
        assert found.loss / found.num_tokens == pytest.approx(logits.loss.item(), rel=1e-4)
        assert found.kl == pytest.approx((teacher.exp() * (teacher - logs)).sum().item(), rel=1e-3)


def test_every_token_but_the_first_is_predicted(folder: Path) -> None:
    tokenizer = load_processor(str(folder))
    batch = encode_text(tokenizer, [Passage("long", "the value of the argument is returned"), Passage("short", "the value")])
    assert batch.loss_mask.sum(1).tolist() == [n - 1 for n in batch.valid_mask.sum(1).tolist()]
    assert not (batch.loss_mask & ~batch.valid_mask).any()
    assert not batch.image_mask.any()
    first = batch.valid_mask.long().argmax(1)
    assert not batch.loss_mask[torch.arange(2), first].any()
