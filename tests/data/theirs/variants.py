"""The variants; they share no class with those of mgvq, and declare what the checks ask for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from mgvq.calibration.examples import ExampleSet
from mgvq.calibration.tiny_vqa import TinyVQA
from mgvq.codebook.kmeans import KMeans
from mgvq.codebook.vector import FittedTables
from mgvq.compensation.none import NoCompensation
from mgvq.evaluation.documents import documents
from mgvq.evaluation.forced import score
from mgvq.model.encode import Example, batches
from mgvq.protocols import CodedSlice, Descended, FittedSlice, Lacking, Objective, QuantizedWeight
from mgvq.types import ChannelSlice, EvalResult, Metric, Needs, Rate, RateTable, Site, SiteStats, StatsBank


@dataclass(frozen=True, kw_only=True)
class Position:
    """Later channels count more."""

    slope: float
    needs = Needs()
    needs_images = True

    def __call__(self, weights: Mapping[Site, Tensor], bank: StatsBank) -> Mapping[Site, Tensor]:
        return {site: 1 + self.slope * torch.arange(weight.shape[1]) for site, weight in weights.items()}


@dataclass(frozen=True, kw_only=True)
class Halves:
    """The channels with scores below the middle one, and the others."""

    num_groups = 2
    needs = Needs()
    uses_score = True
    needs_images = False

    def __call__(self, scores: Mapping[Site, Tensor], bank: StatsBank) -> Mapping[Site, Tensor]:
        return {site: (score.argsort().argsort() >= len(score) // 2).long() for site, score in scores.items()}


@dataclass(frozen=True, kw_only=True)
class OneRate:
    """The highest rate that fits for all."""

    uses_score = False
    distortion = None

    def __call__(self, table: RateTable, budget_bits: int) -> Tensor:
        fitting = [rate for rate, cost in enumerate(table.bits.sum(0).tolist()) if cost <= budget_bits]
        return torch.full((len(table.table_groups),), fitting[-1])


@dataclass(frozen=True, kw_only=True)
class Tables:
    """k-means with settings of its own."""

    seed: int
    spans_rows = False
    can_be_refitted = True
    needs_importance = False
    needs_gram = False
    follows_metric = True

    @property
    def _inner(self) -> KMeans:
        return KMeans(vector_length=2, share="layer", table="fp16", weight_power=0.0, iterations=2, sample=64, seed=self.seed)

    def rates(self) -> Sequence[Rate]:
        return self._inner.rates()

    def distortion(self, rate: Rate) -> float:
        return self._inner.distortion(rate)

    def table_group(self, channel_slice: ChannelSlice) -> str:
        return self._inner.table_group(channel_slice)

    def storage_bits(self, slices: Sequence[ChannelSlice], rate: Rate) -> int:
        return self._inner.storage_bits(slices, rate)

    def fit(self, name: str, weights: Any, rate: Rate, importance: Any, flags: list[str]) -> Sequence[FittedTables]:
        return self._inner.fit(name, weights, rate, importance, flags)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The identity in both directions."""

    needs = Needs(gram=True)
    needs_images = False
    has_output_factor = True

    def fuse(self, bank: StatsBank) -> Mapping[Site, Metric]:
        return {site: Metric((torch.eye(site.in_features),), torch.eye(site.out_features)) for site in bank}


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Plain rounding that asks for all there is."""

    needs_metric = True
    needs_output_metric = True
    uses_score = False
    shift = None

    def round(
        self, weight: Tensor, metric: Metric | None, slices: Sequence[FittedSlice], score: Tensor, flags: list[str]
    ) -> Sequence[Tensor]:
        assert metric is not None
        assert metric.h_out is not None
        flags.append("theirs:rounded")
        return NoCompensation().round(weight, None, slices, score, flags)


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """The tables a little smaller, where that is asked for."""

    rounds: int
    share: float

    def __call__(self, slices: Sequence[CodedSlice]) -> Sequence[FittedTables]:
        fitted = [s.fitted.codebook for s in slices]
        return [replace(f, table=f.table * self.share) for f in fitted if isinstance(f, FittedTables)]


class AsItIs:
    """A layer that is not transformed at all."""

    def weight(self, weight: Tensor) -> Tensor:
        return weight

    weight_back = input_factor = weight

    def statistics(self, stats: SiteStats) -> SiteStats:
        return stats

    def stored(self) -> Sequence[Tensor]:
        return ()

    def wrap(self, weight: QuantizedWeight) -> QuantizedWeight:
        return weight


@dataclass(frozen=True, kw_only=True)
class Still:
    """Nothing happens to any layer."""

    within: Literal["layer", "group"]

    def __call__(self, sites: Sequence[Site], groups: Mapping[Site, Tensor] | None) -> Mapping[Site, AsItIs]:
        return {site: AsItIs() for site in sites}


@dataclass(frozen=True, kw_only=True)
class Gentle:
    """A small share of what a layer's output lacks; the stream is left alone."""

    share: float

    def correction(self, of: Lacking, lacking: Tensor, gram: Tensor, heldout: tuple[Tensor, Tensor] | None) -> Tensor | None:
        return None if of == "stream" else self.share * lacking / gram.diagonal().mean()


@dataclass(frozen=True, kw_only=True)
class Shrink:
    """All values a little smaller, where that is better."""

    share: float
    within = "model"
    whole_towers = False
    embeddings = False

    def descend(self, name: str, start: Mapping[str, Tensor], objective: Objective) -> Descended:
        before = objective.heldout({key: tensor.float() for key, tensor in start.items()})
        smaller = {key: ((1 - self.share) * tensor.float()).to(tensor.dtype) for key, tensor in start.items()}
        after = objective.heldout({key: tensor.float() for key, tensor in smaller.items()})
        row = {"step": 1, "tokens": objective.tokens(0), "seconds": 0.0, "loss": after, "heldout_loss": after}
        return Descended(smaller if after < before else start, [row], ["theirs:tuned"])


@dataclass(frozen=True, kw_only=True)
class Images:
    """A few questions about images, or the questions alone."""

    file: str
    number: int
    blind: bool
    seed: int

    @property
    def shows_images(self) -> bool:
        return not self.blind

    def draw(self) -> ExampleSet:
        shown = {"shown": "text" if self.blind else "both", "seed": self.seed, "label_seed": self.seed}
        return TinyVQA(num_images=self.number, questions_per_image=2, heldout_images=1, **shown).draw()


@dataclass(frozen=True, kw_only=True)
class Riddles:
    """Questions whose answers are teacher-forced."""

    num_riddles: int
    shows_images = True

    def __call__(self, model: Any, reference: Any, processor: Any, label: str) -> EvalResult:
        docs = documents(0, self.num_riddles)
        examples = [Example(d["sample_id"], d["image"], d["question"], d["answer"]) for d in docs]
        forced = score(model, reference, batches(processor, examples, 8))
        rows = pd.DataFrame([{k: d[k] for k in ("sample_id", "sample_hash", "type", "question", "answer")} for d in docs])
        rows["task"], rows["prediction"], rows["type"] = "riddles", "", "riddle"
        rows["loss"], rows["num_tokens"] = ([getattr(forced[i], k) for i in rows.sample_id] for k in ("loss", "num_tokens"))
        rows["score"] = (rows.loss / rows.num_tokens < 1).astype(float)
        accuracy, loss = float(rows.score.mean()), float(rows.loss.sum() / rows.num_tokens.sum())
        return EvalResult({"riddles/accuracy": accuracy, "loss/answer": loss}, rows)


@dataclass(frozen=True, kw_only=True)
class Names:
    """A file with the names of runs."""

    path: str

    @property
    def place(self) -> str:
        return f"names {self.path}"

    def __call__(self, run: Path) -> None:
        with Path(self.path).open("a") as file:
            file.write(f"{run.name}\n")
