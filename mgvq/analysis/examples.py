"""Test questions that show what quantisation does: pictures with the answers of full precision and of every arm."""

import base64
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image

from mgvq.data.tiny_vqa.scene import draw_scene, generator, render
from mgvq.errors import UserError

NUM_EXAMPLES = 6
RULE = (
    "Chosen by rule: at the study's first seed, the first question of each type that full precision answers rightly and on "
    f"which the arms differ, {NUM_EXAMPLES} at most; without a full-precision arm, those on which the arms differ."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A question about a picture (PNG as a data URI) and the answers to it: text, whether it is right, who gave it; right ones
    first."""

    picture: str
    question: str
    answer: str
    type: str
    answers: list[tuple[str, bool, list[str]]]


def examples(records: pd.DataFrame, runs: Path) -> dict[str, list[Example]]:
    """By grid point (JSON text), as `RULE` says. Empty where run folders are not here, or the task is not the tiny VQA."""
    seed = records.seeds.iloc[0][0]
    first = records.loc[[seed in seeds for seeds in records.seeds]]
    if not all((runs / run / "samples.parquet").is_file() for run in first["run"]):
        return {}
    return {str(point): _of_point(part, runs) for point, part in first.groupby("point", sort=False)}


def _of_point(records: pd.DataFrame, runs: Path) -> list[Example]:
    folders = {str(arm): runs / run for arm, run in zip(records.arm, records["run"], strict=True)}
    samples = {arm: pd.read_parquet(folder / "samples.parquet") for arm, folder in folders.items()}
    rates = [json.loads(metrics)["rate"] for metrics in records.metrics]
    full = [arm for arm, rate in zip(samples, rates, strict=True) if rate == "full_precision"]
    right = pd.DataFrame({arm: frame.score > 0 for arm, frame in samples.items()})
    others = right.drop(columns=full)
    wanted = others.any(axis=1) & ~others.all(axis=1) & right[full].all(axis=1)
    asked = next(iter(samples.values()))
    chosen = asked.loc[wanted & (asked.task == "tiny_vqa")].drop_duplicates("type").head(NUM_EXAMPLES)
    return [
        Example(
            picture=_picture(row["sample_id"], row["sample_hash"], row["question"], row["answer"]),
            question=row["question"].strip(),
            answer=row["answer"],
            type=row["type"],
            answers=_answers({arm: (frame.prediction[i], bool(right.loc[i, arm])) for arm, frame in samples.items()}),
        )
        for i, row in chosen.to_dict(orient="index").items()
    ]


def _answers(by_arm: dict[str, tuple[str, bool]]) -> list[tuple[str, bool, list[str]]]:
    arms: dict[tuple[str, bool], list[str]] = {}
    for arm, answer in by_arm.items():
        arms.setdefault(answer, []).append(arm)
    found = [(text, is_right, who) for (text, is_right), who in arms.items()]
    return sorted(found, key=lambda answer: (not answer[1], -len(answer[2])))


def _picture(sample_id: str, sample_hash: str, question: str, answer: str) -> str:
    """Drawn again from its id. Raises UserError where that is no longer the picture that the run saw."""
    split, seed, index, _ = sample_id.split("-")
    pixels = render(draw_scene(generator(int(seed), split, int(index)), split))
    if hashlib.sha256(pixels.tobytes() + f"{question}\n{answer}".encode()).hexdigest()[:16] != sample_hash:
        raise UserError(f"question {sample_id} is about another picture than when the run was made; run the study again.")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
