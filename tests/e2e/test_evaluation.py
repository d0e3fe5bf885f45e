"""Evaluation through lmms-eval: generation and teacher forcing agree, nothing stale, nothing from the network."""

import copy
import socket
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

from mgvq.data.tiny_vqa.dataset import draw_test
from mgvq.evaluation.documents import documents
from mgvq.evaluation.forced import score
from mgvq.evaluation.harness import evaluate
from mgvq.evaluation.tasks.tiny_vqa import TinyVQATask
from mgvq.evaluation.tiny_vqa import TinyVQA
from mgvq.model.answers import answer_logits, answer_states
from mgvq.model.encode import Example, batches, encode
from mgvq.model.generate import _runs, _Seen, generate
from mgvq.model.pack import can_pack, packed_batches
from mgvq.runs.cache import reference

sys.path.append(str(ROOT / "experiments" / "three_ways"))
from ask import Agreement, ask


def examples(count: int, seed: int = 0) -> list[Example]:
    return [Example(d["sample_id"], d["image"], d["question"], d["answer"]) for d in documents(seed, count)]


def test_teacher_forced_exact_match_is_greedy_exact_match(loaded) -> None:
    generated, forced = (
        TinyVQA(num_questions=104, seed=0, answers=answers)(loaded.model, None, loaded.processor, "x")
        for answers in ("generated", "forced")
    )
    assert generated.samples.score.tolist() == forced.samples.score.tolist()
    assert generated.metrics["tiny_vqa/accuracy"] == forced.metrics["tiny_vqa/accuracy"]
    assert generated.metrics["kl/full_precision"] == 0


def test_a_question_gets_one_answer_however_it_is_asked(loaded) -> None:
    """The first of the 300 of `python experiments/three_ways/ask.py`."""
    assert ask(loaded, 26) == Agreement(26, 26, 26)


def test_an_evaluation_asks_nobody(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: socket.socket, address: object) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    evaluate(loaded.model, loaded.processor, TinyVQATask(documents(0, 4)), "x", 4)


def test_our_metric_is_the_one_lmms_eval_reports(loaded) -> None:
    docs = documents(0, 104)
    results, rows = evaluate(loaded.model, loaded.processor, TinyVQATask(docs), "x", 26)
    ours = TinyVQA(num_questions=104, seed=0, answers="generated")(loaded.model, None, loaded.processor, "x")
    assert results["accuracy"] == pytest.approx(ours.metrics["tiny_vqa/accuracy"])
    assert [docs[r["doc_id"]]["sample_id"] for r in rows] == ours.samples.sample_id.tolist()


def test_other_weights_give_other_answers_under_the_same_label(loaded) -> None:
    """The stale-answer trap: lmms-eval's cache knows models by name, so it must stay off."""
    other = copy.deepcopy(loaded.model)
    with torch.no_grad():
        other.get_decoder().norm.weight.mul_(-1)
    task = TinyVQA(num_questions=26, seed=0, answers="generated")
    first, second = (task(m, None, loaded.processor, "same label").samples.prediction for m in (loaded.model, other))
    assert first.tolist() != second.tolist()


def test_an_error_in_the_model_is_no_wrong_answer(loaded) -> None:
    broken = copy.deepcopy(loaded.model)
    broken.lm_head = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shapes"):
        evaluate(broken, loaded.processor, TinyVQATask(documents(0, 4)), "x", 4)


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.trust), 7, 60])
def test_questions_that_share_a_picture_get_the_answers_of_questions_alone(loaded, monkeypatch, batch_size: int) -> None:
    asked = [(e.image.copy(), e.question) for e in examples(60)]
    asked = [*asked[1::2], *asked[::2]]  # questions about a picture need not follow each other
    settings = {"max_new_tokens": 32, "do_sample": False}
    shared = generate(loaded.model, loaded.processor, asked, batch_size, settings)
    monkeypatch.setattr("mgvq.model.generate.can_pack", lambda _: False)
    assert shared == generate(loaded.model, loaded.processor, asked, batch_size, settings)
    assert len(set(shared)) > 20


def test_images_of_equal_bytes_are_told_apart(loaded) -> None:
    wide, tall = Image.new("RGB", (64, 32)), Image.new("RGB", (32, 64))
    asked = [(wide, "?"), (tall, "?"), (wide.copy(), "?")]
    assert [list(run) for run in _runs(asked, 1, [])] == [[0], [1], [2]]
    assert [list(run) for run in _runs(asked, 2, [])] == [[0, 1, 2]]
    assert _Seen(loaded.model, loaded.processor, asked)._image == [0, 1, 0]


def test_losses_do_not_depend_on_batches(loaded) -> None:
    one, many = (score(loaded.model, None, batches(loaded.processor, examples(30), size)) for size in (1, 30))
    for key in one:
        assert one[key].loss == pytest.approx(many[key].loss, abs=1e-4)
        assert one[key].predicted == many[key].predicted


def test_all_questions_of_a_picture_in_one_row_are_those_of_single_rows(loaded) -> None:
    if not can_pack(loaded.model):
        pytest.skip("M-RoPE: one row a question")
    asked = examples(60)
    single, packed = (
        score(loaded.model, None, b) for b in (batches(loaded.processor, asked, 20), packed_batches(loaded.processor, asked, 4))
    )
    assert list(packed) == [e.sample_id for e in asked]
    for key in single:
        assert packed[key].loss == pytest.approx(single[key].loss, abs=1e-4)
        assert packed[key].predicted == single[key].predicted
    (batch,) = packed_batches(loaded.processor, asked[:3], 3)
    with torch.no_grad():
        together = answer_logits(loaded.model, batch)
        alone = torch.cat([answer_logits(loaded.model, encode(loaded.processor, [e])) for e in asked[:3]])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_kl_is_that_of_the_definition(loaded) -> None:
    other = copy.deepcopy(loaded.model)
    with torch.no_grad():
        other.get_decoder().norm.weight.mul_(0.9)
    (batch,) = batches(loaded.processor, examples(3), 3)
    scored = score(other, loaded.model, [batch])
    for row, key in enumerate(batch.sample_ids):
        at = torch.nonzero(batch.loss_mask[row]).flatten() - 1
        with torch.no_grad():
            p, q = (m(**batch.inputs).logits[row, at].softmax(-1) for m in (loaded.model, other))
        assert scored[key].kl == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-3, abs=1e-5)
        assert scored[key].num_tokens == len(at)


def test_what_the_full_precision_model_says_is_asked_once_for_all_runs(loaded, tmp_path, monkeypatch) -> None:
    """And read back to the bit; other questions are asked anew, and so is everything where the file is not what was written."""
    other, batched = copy.deepcopy(loaded.model), list(batches(loaded.processor, examples(4), 2))
    with torch.no_grad():
        other.get_decoder().norm.weight.mul_(0.9)
    plain, asked = score(other, loaded.model, batched), []
    monkeypatch.setattr("mgvq.model.reference.answer_states", lambda m, b: asked.append(b.sample_ids) or answer_states(m, b))

    def run(batched):
        asked.clear()
        with reference(tmp_path, {"model": 1}, loaded.model) as known:
            return score(other, known, batched)

    assert run(batched) == plain
    assert len(asked) == 2
    assert run(batched) == plain
    assert not asked
    assert run([*batched, *batches(loaded.processor, examples(5)[4:], 1)]).items() > plain.items()
    assert len(asked) == 1
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert run(batched) == plain
    assert len(asked) == 2


def test_the_loss_mask_covers_the_answer_and_its_end(loaded) -> None:
    batch = encode(loaded.processor, examples(6))
    for row, example in enumerate(examples(6)):
        text = loaded.processor.tokenizer.decode(batch.inputs["input_ids"][row][batch.loss_mask[row]])
        assert text.replace("<|im_end|>", " <|im_end|>").split() == [*example.answer.split(), "<|im_end|>"]


def test_test_questions_follow_their_own_seed() -> None:
    assert [d["sample_hash"] for d in documents(0, 40)] == [d["sample_hash"] for d in documents(0, 40)]
    assert {d["sample_hash"] for d in documents(0, 40)}.isdisjoint(d["sample_hash"] for d in documents(1, 40))
    assert len(documents(0, 40)) == 40 == sum(len(p.questions) for p in draw_test("test", 0, 40))
