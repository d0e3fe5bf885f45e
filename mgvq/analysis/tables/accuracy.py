"""The accuracy of a full-precision model by question type, beside chance: what a model card shows."""

from collections import Counter, defaultdict
from collections.abc import Mapping

from mgvq.data.tiny_vqa.dataset import draw_test
from mgvq.data.tiny_vqa.questions import CONTROLS, HEADLINE, num_answers


def accuracy_by_type(run: Mapping[str, float], num_questions: int) -> str:
    """A row a question type, in markdown: how many questions, accuracy, chance, and what the most frequent answer would get.

    `run` has the metrics of an evaluation tiny_vqa with `num_questions` questions and seed 0.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for picture in draw_test("test", 0, num_questions):
        for question in picture.questions:
            answers[question.type][question.answer] += 1
    lines = ["| type | | n | accuracy % | chance % | majority % |", "|---|---|---|---|---|---|"]
    for role, kinds in (("headline", HEADLINE), ("control", CONTROLS)):
        for kind in kinds:
            count = answers[kind].total()
            majority = 100 * answers[kind].most_common(1)[0][1] / count
            chance = f"{100 / n:.1f}" if (n := num_answers(kind)) else "-"
            accuracy = 100 * run[f"tiny_vqa/accuracy/{kind}"]
            lines.append(f"| {kind} | {role} | {count} | {accuracy:.1f} | {chance} | {majority:.1f} |")
    return "\n".join(lines)
