"""Texts of the user's own: read as they are, refused with their place, cut into passages or windows, and part of the identity."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mgvq.calibration.text import Text
from mgvq.data.english import docstrings
from mgvq.errors import UserError
from mgvq.evaluation.forced import score
from mgvq.evaluation.perplexity import Perplexity
from mgvq.model.answers import runs_of_answers
from mgvq.model.text import encode_text
from mgvq.model.windows import Windows, window_batches
from mgvq.runs.compose import composer
from mgvq.runs.identity import run_id, scientific_settings

COMMIT = 40 * "a"
HUB = {"path": "Salesforce/wikitext", "revision": COMMIT, "subset": "wikitext-2-raw-v1", "split": "test", "column": "text"}
PROSE = " ".join(f"word{n}" for n in range(480))


class Tokenizer:
    """One token a word, numbered as they come; it may begin texts with a token of its own."""

    pad_token_id = 0

    def __init__(self, begin: tuple[int, ...] = ()) -> None:
        self.begin = list(begin)
        self.words: dict[str, int] = {}

    def __call__(self, text: Any, add_special_tokens: bool = True, **_: Any) -> Any:
        ids = [self.words.setdefault(word, 2 + len(self.words) % 90) for word in text.split()]
        return type("Encoded", (), {"input_ids": (self.begin if add_special_tokens else []) + ids})

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


def perplexity(**settings: Any) -> Perplexity:
    return Perplexity(**{"num_passages": None, "seed": 0, **settings})


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    return LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=64)).eval()


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.md").write_text("\ufeff" + PROSE, encoding="utf-8")
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / ".hidden.txt").write_text(PROSE)
    found = perplexity(path=str(tmp_path)).draw()
    assert [p.sample_id for p in found] == ["a.txt-0", "a.txt-1", "a.txt-2", "deep/b.md-0", "deep/b.md-1", "deep/b.md-2"]
    assert " ".join(p.text for p in found[:3]) == " ".join(p.text for p in found[3:]) == PROSE
    assert len(perplexity(path=str(tmp_path / "a.txt")).draw()) == 3


def test_a_text_can_calibrate(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE)
    settings = {"num_samples": 2, "heldout_samples": 1, "seed": 0, "label_seed": 0, "path": str(tmp_path)}
    drawn = Text(**settings).draw()
    assert {p.sample_id for p in (*drawn.examples, *drawn.heldout_examples)} == {"a.txt-0", "a.txt-1", "a.txt-2"}
    with pytest.raises(UserError, match=r"asks for 4 passages; .* has 3"):
        Text(**{**settings, "num_samples": 3}).draw()
    windows = Text(**settings, window=50).draw()
    made = [*windows.batches(Tokenizer()), *windows.heldout(Tokenizer())]
    assert len({ids for batch in made for ids in batch.sample_ids}) == 3
    assert all(batch.inputs["input_ids"].shape == (1, 50) for batch in made)


def test_further_passages_and_windows_are_drawn_behind_the_held_out_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE)
    settings = {"num_samples": 1, "heldout_samples": 1, "seed": 0, "label_seed": 0, "path": str(tmp_path)}
    drawn = Text(**settings, gram_samples=2).draw()
    parts = [[p.sample_id for p in part] for part in (drawn.examples, drawn.heldout_examples, drawn.gram_examples)]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert len({*parts[0], *parts[1], *parts[2]}) == 3
    with pytest.raises(UserError, match=r"gram_samples \+ heldout_samples asks for 4 passages; .* has 3"):
        Text(**settings, gram_samples=3).draw()
    few, more = (Text(**settings, window=50, gram_samples=number).draw() for number in (None, 5))
    made = [
        [[i for b in part(Tokenizer()) for i in b.sample_ids] for part in (d.batches, d.heldout, d.gram_batches)]
        for d in (few, more)
    ]
    assert made[0][:2] == made[1][:2]
    assert [len(part) for part in (*made[0], *made[1])] == [1, 1, 0, 1, 1, 4]
    assert len({i for part in made[1] for i in part}) == 6


@pytest.mark.parametrize("begin", [(), (1,)])
@pytest.mark.parametrize("stride", [20, 7])
def test_windows_score_every_token_once(begin: tuple[int, ...], stride: int) -> None:
    """But those of the beginning of a text that nothing precedes, and what is left over at its end."""
    cut = Windows("evaluation", {"a": PROSE, "b": PROSE}, 20, stride, 1).cut(tokenizer := Tokenizer(begin))
    room = 20 - len(begin)
    step = min(stride, room)
    whole = tokenizer(PROSE, add_special_tokens=False).input_ids
    scored = [token for window in cut if window.sample_id.startswith("a-") for token in window.ids[window.num_context :]]
    number = (len(whole) - room) // step + 1
    left_out = 0 if begin else 1
    if step == room and not begin:  # windows that do not overlap: the first token of each has nothing before it
        assert len(scored) == number * (room - 1)
    else:
        assert scored == whole[left_out : room + (number - 1) * step]
    assert {len(window.ids) for window in cut} == {20}
    assert all(window.ids[: len(begin)] == begin for window in cut)


def test_a_single_document_has_windows_of_their_own() -> None:
    cut = Windows("evaluation", {"wiki": PROSE}, 100, 100, 4).cut(Tokenizer())
    assert [w.sample_id.rpartition("-")[0] for w in cut] == ["wiki:0", "wiki:1", "wiki:2", "wiki:3"]
    with pytest.raises(UserError, match="asks for 5 windows of 100 tokens, and the text has 4"):
        Windows("evaluation", {"wiki": PROSE}, 100, 100, 5).cut(Tokenizer())


def test_a_window_is_scored_as_transformers_scores_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the logits do not fit at once."""
    cut = Windows("evaluation", {"wiki": PROSE}, 40, 10, 1).cut(Tokenizer())[:3]
    network = model()
    found = score(network, None, window_batches(cut, 1))
    for window in cut:
        ids = torch.tensor([window.ids])
        labels = ids.masked_fill(torch.arange(40) < window.num_context, -100)
        expected = network(ids, labels=labels).loss.item()
        assert found[window.sample_id].num_tokens == 40 - window.num_context
        assert found[window.sample_id].loss / found[window.sample_id].num_tokens == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr("mgvq.evaluation.forced._CUT", 96 * 7)
    for name, other in score(network, model(), window_batches(cut, 1)).items():
        assert other.loss == pytest.approx(found[name].loss, rel=1e-6)
        assert other.predicted == found[name].predicted
        assert abs(other.kl) < 1e-4


@pytest.mark.parametrize("number", [0, 1, 63, 64, 127, 128, 130, 883])
@pytest.mark.parametrize("vocabulary", [96, 49_152, 151_936])
def test_logits_are_cut_into_runs_of_which_none_is_short(number: int, vocabulary: int) -> None:
    runs = runs_of_answers(number, vocabulary)
    assert [row for run in runs for row in range(number)[run]] == list(range(number))
    sizes = [run.stop - run.start for run in runs]
    assert min(sizes) >= min(number, 64)
    assert max(sizes) < max(2 * 64, 2**23 // vocabulary + 64)


def test_perplexity_of_windows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE)
    result = perplexity(path=str(tmp_path), window=50, stride=25)(model(), None, Tokenizer(), "x")
    assert len(result.samples) == 18
    assert result.samples.num_tokens.tolist() == [49, *[25] * 17]
    assert result.metrics["text/perplexity"] > 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"path": "nowhere.txt"}, r"evaluation\.path=nowhere\.txt does not exist"),
        ({"path": "Salesforce/wikitext"}, r"evaluation\.revision=<the 40 hex digits of a commit>, got None"),
        ({**HUB, "revision": "main"}, "got 'main': a branch may change"),
        ({**HUB, "column": None}, r"that needs evaluation\.column"),
        ({"split": "test"}, r"evaluation\.split=test has no effect with the text that is built in"),
        ({"path": ".", "revision": COMMIT}, r"evaluation\.revision=a+ has no effect with the local text \."),
        ({"stride": 8}, r"evaluation\.stride=8 has no effect without"),
        ({"window": 1}, r"evaluation\.window must be a whole number >= 2"),
        ({"window": 8, "stride": 9}, r"evaluation\.stride must be a whole number from 1 to 8.*leave text out"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        perplexity(**settings)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no text: a folder is read for its"):
        perplexity(path=str(tmp_path)).draw()
    (tmp_path / "a.txt").write_bytes(b"  \n")
    with pytest.raises(UserError, match="holds no text: every file is empty"):
        perplexity(path=str(tmp_path)).draw()
    (tmp_path / "b.txt").write_bytes("stra\xdfe".encode("latin-1"))
    with pytest.raises(UserError, match=r"b\.txt is no UTF-8 text: byte 4 is 0xdf"):
        perplexity(path=str(tmp_path)).draw()
    (tmp_path / "b.txt").write_text("a few words")
    with pytest.raises(UserError, match="has 0 passages"):
        perplexity(path=str(tmp_path)).draw()


def test_a_data_set_of_the_hub_is_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*where: Any, **more: Any) -> datasets.Dataset:
        asked.append((where, more))
        return datasets.Dataset.from_dict({"text": [" = Title = \n", "", PROSE]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    cut = perplexity(**HUB, window=100)._windows().cut(Tokenizer())
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test", "revision": COMMIT})]
    assert [w.sample_id for w in cut] == ["wikitext:0-0", "wikitext:1-0", "wikitext:2-0", "wikitext:3-0"]
    with pytest.raises(UserError, match="column=words, and there are text"):
        perplexity(**{**HUB, "column": "words"}).draw()


def test_without_a_network_the_data_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=r"Salesforce/wikitext \(subset .*\) cannot be loaded \(ConnectionError: no route\)\. .*needs the network"
    ):
        perplexity(**{**HUB, "split": "train"}).draw()


def test_the_window_has_to_fit_the_model() -> None:
    from mgvq.model.fit import check_samples
    from mgvq.model.load import Described

    described = Described(model().config, Tokenizer())
    check_samples(described, [Windows("evaluation", {"a": PROSE}, 64, 64, 1)])
    with pytest.raises(UserError, match=r"evaluation\.window=65, and the model was made for 64 positions"):
        check_samples(described, [Windows("evaluation", {"a": PROSE}, 65, 65, 1)])


def test_what_is_read_is_part_of_the_identity(tmp_path: Path) -> None:
    """Its content, not its place; and a text that is built in counts as it did before there was a choice."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "a.txt").write_text(PROSE)
    with composer() as compose:

        def name(*more: str) -> str:
            return run_id(compose("method=gptq", "calibration=text", "evaluation=perplexity", *more))

        built_in = scientific_settings(compose("method=gptq", "calibration=text", "evaluation=perplexity"))
        assert set(built_in["evaluation"]) == {"variant", "num_passages", "seed"}
        assert set(built_in["calibration"]) == {"variant", "num_samples", "heldout_samples", "seed", "label_seed"}
        assert name(f"evaluation.path={first}") == name(f"evaluation.path={second}")
        told = [name(f"evaluation.path={first}"), name(f"calibration.path={first}"), name("evaluation.window=512")]
        told += [name("evaluation.window=512", "evaluation.stride=256"), name()]
        assert len(set(told)) == 5
        (second / "a.txt").write_text(PROSE + ".")
        assert name(f"evaluation.path={first}") != name(f"evaluation.path={second}")


def test_the_digest_is_of_what_was_read(tmp_path: Path) -> None:
    assert perplexity(num_passages=3).texts != perplexity(path=str(Path(__file__).parent.parent.parent / "README.md")).texts
    assert Text(num_samples=1, heldout_samples=0, seed=0, label_seed=0).texts == {"calibration": docstrings().sha256}


def test_tokens_that_begin_a_text_are_read_alike_in_passages_and_windows() -> None:
    """`encode_text` and `Windows` give the same row for the same text."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<bos>": 0, "<pad>": 1, **{f"word{n}": n + 2 for n in range(60)}}
    fast = Fast(models.WordLevel(words, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<bos>", pad_token="<pad>", padding_side="left")
    text = " ".join(f"word{n}" for n in range(40))
    (window,) = Windows("evaluation", {"a": text}, 41, 41, 1).cut(tokenizer)
    (batch,) = window_batches([window], 1)
    from mgvq.model.text import Passage

    passage = encode_text(tokenizer, [Passage("a", text)])
    assert batch.inputs["input_ids"].equal(passage.inputs["input_ids"])
    assert batch.loss_mask.equal(passage.loss_mask)
