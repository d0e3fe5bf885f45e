"""The text that comes with Python: prose, in passages, and none of it both for calibration and for tests."""

import pytest
from hydra import compose, initialize_config_dir

from mgvq.calibration.text import Text
from mgvq.data.english import WORDS, _distinct, cut, docstrings, language_reference
from mgvq.errors import UserError
from mgvq.evaluation.perplexity import Perplexity
from mgvq.runs.build import build
from mgvq.runs.places import conf_folder


def sentences(text: str) -> set[str]:
    return {s for s in text.split(". ") if len(s.split()) >= 8}


def test_enough_passages_of_about_the_same_length() -> None:
    for corpus, least in ((language_reference(), 150), (docstrings(), 400)):
        assert len(corpus.passages) >= least
        assert all(WORDS / 2 <= len(text.split()) <= 1.5 * WORDS for text in corpus.passages.values())


def test_paragraphs_of_prose_are_kept_once_and_code_is_not() -> None:
    prose = "This is a sentence of some words, which ends well."
    code, heading = "   for i in range(8): print(i, i + 1, i + 2, i + 3)", "A heading of many words that ends without a stop"
    text = "\n\n".join([prose, code, prose, "Too short to tell.", heading])
    assert _distinct([("one", text), ("two", prose)], set()) == {"one": [prose]}
    assert _distinct([("one", text)], {prose}) == {}


def test_documents_are_cut_without_losing_a_word() -> None:
    words = [f"w{i}" for i in range(3 * WORDS + 7)]
    corpus = cut({"doc": [" ".join(words[:100]), " ".join(words[100:])], "short": ["a b c"]})
    assert list(corpus.passages) == ["doc-0", "doc-1", "doc-2"]
    assert " ".join(corpus.passages.values()).split() == words
    assert corpus.sha256 != cut({"doc": [" ".join(words[:-1])]}).sha256


def test_no_sentence_is_for_calibration_and_for_tests() -> None:
    """Whole ones; those at the end of a passage may be cut."""
    calibration, test = ({s for t in c.passages.values() for s in sentences(t)} for c in (docstrings(), language_reference()))
    assert len(calibration) > 1000
    assert len(test) > 500
    assert len(calibration & test) <= 0.01 * len(test)


def test_the_seed_draws_the_calibration_and_not_the_test() -> None:
    def drawn(seed: int):
        return Text(num_samples=8, heldout_samples=4, seed=seed, label_seed=seed).draw()

    ids = [[p.sample_id for p in (*d.examples, *d.heldout_examples)] for d in (drawn(0), drawn(0), drawn(1))]
    assert ids[0] == ids[1] != ids[2]
    assert len(set(ids[0])) == 12
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        tasks = [build(compose("config", ["evaluation=perplexity", f"seed={seed}"]), "evaluation") for seed in (0, 1)]
    assert tasks[0].draw() == tasks[1].draw()
    assert Perplexity(num_passages=5, seed=1).draw() != Perplexity(num_passages=5, seed=2).draw()


def test_more_than_there_is_is_an_error() -> None:
    with pytest.raises(UserError, match=r"evaluation\.num_passages=9999, but there are"):
        Perplexity(num_passages=9999, seed=0)
    with pytest.raises(UserError, match="asks for 10000 passages"):
        Text(num_samples=9999, heldout_samples=1, seed=0, label_seed=0).draw()
    with pytest.raises(UserError, match=r"calibration\.num_samples"):
        Text(num_samples=0, heldout_samples=1, seed=0, label_seed=0)
