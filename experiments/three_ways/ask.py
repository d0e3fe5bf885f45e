"""Does a question get one answer, however it is asked? Writes the table three_ways.

Every shipped model is asked the same test questions by transformers alone (its processor and `generate`, one question at a
time), through lmms-eval as a run does it (batches, questions of a picture together), and teacher-forced. The first two have to
give the same words, and the third has to call right what equals the right answer. Two minutes on one core.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from mgvq.analysis.tables.render import Table, markdown
from mgvq.evaluation.documents import documents
from mgvq.evaluation.tiny_vqa import TinyVQA
from mgvq.model.encode import chat_prompt
from mgvq.model.load import Loaded, load
from mgvq.model.source import SHIPPED, Source
from mgvq.runs.places import results_folder

NOTE = (
    "Test questions of evaluation.seed=0. Same words: transformers' own processor and generate, one question at a time, against "
    "lmms-eval in batches. Same verdict: the teacher-forced exact match is that of those words."
)


@dataclass(frozen=True)
class Agreement:
    """How many of the `questions` got the same words, and how many the same verdict."""

    questions: int
    words: int
    verdicts: int


def ask(loaded: Loaded, number: int) -> Agreement:
    """The first `number` test questions in all three ways."""
    docs = documents(0, number)
    plain = [alone(loaded, doc) for doc in docs]
    generated, forced = (
        TinyVQA(num_questions=number, seed=0, answers=answers)(loaded.model, None, loaded.processor, "three ways").samples
        for answers in ("generated", "forced")
    )
    words = sum(mine == theirs for mine, theirs in zip(plain, generated.prediction, strict=True))
    right = [mine == doc["answer"] for mine, doc in zip(plain, docs, strict=True)]
    return Agreement(number, words, sum(mine == bool(score) for mine, score in zip(right, forced.score, strict=True)))


@torch.inference_mode()
def alone(loaded: Loaded, doc: dict[str, Any]) -> str:
    """The answer to one question as a user of transformers would get it."""
    text = [chat_prompt(loaded.processor, doc["question"])]
    inputs = loaded.processor(images=[doc["image"]], text=text, return_tensors="pt")
    tokens = loaded.model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return loaded.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300, help="of each model (default: 300)")
    number = parser.parse_args().questions
    torch.set_num_threads(1)
    lines = [["model", "questions", "same words", "same verdict"]]
    for folder in sorted(file.parent for file in SHIPPED.glob("*/model.safetensors")):
        source = Source(name=folder.name, path=str(folder), revision=None, dtype="float32")
        found = ask(load(source, torch.device("cpu")), number)
        lines.append([folder.name, str(found.questions), str(found.words), str(found.verdicts)])
        print(*lines[-1], flush=True)
    path = results_folder() / "tables" / "three_ways.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(Table(header=lines[0], lines=lines[1:], note=NOTE)), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
