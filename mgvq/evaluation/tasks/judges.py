"""What an answer to a benchmark's question says, by the benchmark's own rules less their guessing.

lmms-eval's parsers are generous: one draws an option at random where it finds none (MMMU), one takes the first letter of any
word (SEED-Bench), one any capital letter (MMStar, MMBench). A broken model earns points so. Here an option counts as chosen if
the task's own rule chooses it without drawing, and its letter stands alone in the answer, or its text is in it.
"""

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import pandas as pd
from lmms_eval.tasks.mmbench import en_utils as mmbench
from lmms_eval.tasks.mmmu import utils as mmmu
from lmms_eval.tasks.mmstar import utils as mmstar
from lmms_eval.tasks.ocrbench import utils as ocrbench
from lmms_eval.tasks.scienceqa import utils as scienceqa
from lmms_eval.tasks.seedbench import utils as seedbench
from lmms_eval.tasks.textvqa import utils as textvqa
from lmms_eval.tasks.vizwiz_vqa import utils as vizwiz

Doc = Mapping[str, Any]
Options = Mapping[str, str]  # letter -> text


def _no_options(_: Doc) -> Options:
    return {}


def _unscored(_: Doc, __: str) -> float:
    raise TypeError("a task of questions with options alone has no open ones to score")


def _unread(_: Doc, __: Options, ___: str) -> str | None:
    raise TypeError("a task of open questions alone has no options to choose from")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """The questions and answers of one task.

    `type` and `answer` of a question, as its row tells them. `options`: none for an open question. `chooses`: the letter that
    the task's own rule reads in an answer, None where it would draw one or finds none. `scores`: of an answer to an open
    question, 0 .. 1.
    """

    type: Callable[[Doc], str]
    answer: Callable[[Doc], str]
    options: Callable[[Doc], Options] = _no_options
    chooses: Callable[[Doc, Options, str], str | None] = _unread
    scores: Callable[[Doc, str], float] = _unscored

    def chosen(self, doc: Doc, answer: str) -> str | None:
        """The option's letter, None where the answer names none (or the question is open)."""
        options = self.options(doc)
        letter = self.chooses(doc, options, answer) if options else None
        return letter if letter is not None and letter in options and _says(answer, letter, options[letter]) else None


def _says(answer: str, letter: str, option: str) -> bool:
    alone = re.search(rf"(?<![a-z]){letter}(?![a-z])", answer, re.IGNORECASE)
    return bool(alone) or (bool(option.strip()) and option.lower() in answer.lower())


def _by_scoring(is_right: Callable[[Doc, str], float]) -> Callable[[Doc, Options, str], str | None]:
    """The option that an answer would be right for: which one the task reads, asked from its scoring alone."""

    def chooses(doc: Doc, options: Options, answer: str) -> str | None:
        return next((letter for letter in options if is_right({**doc, "answer": letter}, answer)), None)

    return chooses


def _lettered(texts: list[str]) -> Options:
    return dict(zip(ascii_uppercase, map(str, texts), strict=False))


class _Undrawn(list[str]):
    """Letters to go through; a random draw, which asks by number, gets nothing."""

    def __getitem__(self, _: Any) -> Any:
        return None


def _mmmu_options(doc: Doc) -> Options:
    return _lettered(ast.literal_eval(doc["options"])) if doc["question_type"] == "multiple-choice" else {}


def _mmmu_chooses(_: Doc, options: Options, answer: str) -> str | None:
    return mmmu.parse_multi_choice_response(answer, _Undrawn(options), dict(options))


def _mmmu_scores(doc: Doc, answer: str) -> float:
    judged, _ = mmmu.evaluate_mmmu([mmmu.mmmu_process_results(doc, [answer])["mmmu_acc"]])
    return float(judged[doc["id"]] == "Correct")


def _seedbench_is_right(doc: Doc, answer: str) -> float:
    return seedbench.seed_aggregation_result([seedbench.seed_process_result(doc, [answer])["seed_all"]])


def _scienceqa_is_right(doc: Doc, answer: str) -> float:
    return scienceqa.sqa_process_results({**doc, "answer": ascii_uppercase.index(doc["answer"])}, [answer])["exact_match"]


def _mmbench_options(doc: Doc) -> Options:
    return {letter: doc[letter] for letter in "ABCD" if doc.get(letter) not in (None, "", "nan")}


def _mmbench_is_right(doc: Doc, answer: str) -> float:
    item = mmbench.mmbench_process_results(doc, [answer])["gpt_eval_score"]
    right = {item["index"]: item["answer"]}
    return float(mmbench.mmbench_evaluator.eval_sub_data(pd.DataFrame([item]), right, static_only=True))


def _copied(doc: Doc) -> dict[str, Any]:
    """The VQA scores rewrite the answers that they are given."""
    return {**doc, "answers": list(doc["answers"])}


def _any_of(key: str) -> Callable[[Doc], str]:
    return lambda doc: " | ".join(dict.fromkeys([doc[key]] if isinstance(doc[key], str) else doc[key]))


JUDGES = {
    "mmmu_val": Judge(
        type=lambda doc: mmmu.extract_subset_name(doc["id"]),
        answer=lambda doc: str(doc["answer"]),
        options=_mmmu_options,
        chooses=_mmmu_chooses,
        scores=_mmmu_scores,
    ),
    "seedbench": Judge(
        type=lambda doc: str(doc["question_type_id"]),
        answer=lambda doc: doc["answer"],
        options=lambda doc: _lettered([doc[f"choice_{letter}"] for letter in "abcd"]),
        chooses=_by_scoring(_seedbench_is_right),
    ),
    "ocrbench": Judge(
        type=lambda doc: doc["question_type"],
        answer=_any_of("answer"),
        scores=lambda doc, answer: ocrbench.ocrbench_process_results(doc, [answer])["ocrbench_accuracy"]["score"],
    ),
    "vizwiz_vqa_val": Judge(
        type=lambda doc: doc["category"],
        answer=_any_of("answers"),
        scores=lambda doc, answer: vizwiz.vizwiz_vqa_process_results(_copied(doc), [answer])["exact_match"],
    ),
    "scienceqa_img": Judge(
        type=lambda doc: doc["subject"],
        answer=scienceqa.sqa_doc_to_target,
        options=lambda doc: _lettered(doc["choices"]),
        chooses=_by_scoring(_scienceqa_is_right),
    ),
    "textvqa_val": Judge(
        type=lambda _: "open",
        answer=_any_of("answers"),
        scores=lambda doc, answer: textvqa.textvqa_process_results(_copied(doc), [answer])["exact_match"],
    ),
    "mmbench_en_dev_static": Judge(
        type=lambda doc: doc["category"],
        answer=lambda doc: doc["answer"],
        options=_mmbench_options,
        chooses=_by_scoring(_mmbench_is_right),
    ),
    "mmstar": Judge(
        type=lambda doc: doc["category"],
        answer=lambda doc: doc["answer"].strip().upper(),
        options=lambda _: dict.fromkeys("ABCD", ""),  # their texts are part of the question's
        chooses=_by_scoring(lambda doc, answer: mmstar.exact_match(answer, doc["answer"])),
    ),
}
