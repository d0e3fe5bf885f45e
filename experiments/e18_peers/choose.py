"""Which settings every preset gets: the same small grid for each, judged on held-out samples' proxies and on nothing else.

`python experiments/e18_peers/choose.py` writes `chosen.csv` beside it, a row a preset, combination of settings and model. A
combination that a preset cannot have (a refit of a code without tables, say) is left out, and so is one that is the same run as
another. The order is on the grid where the preset's score decides nothing else: RSAVQ's bits come from its own. Judged are two
layers of one block of each model (SmolLM2: that with a massive activation): rounded on the calibration samples, their error is
measured in the preset's own metric, taken of the held-out samples alone. No test question or passage is looked at, and the model
is never run quantised. A preset with a prefix is judged without it.

The setting of the paper stays unless another leaves `MARGIN` less over both models; the yaml of the preset then says so.
"""

import argparse
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from omegaconf import DictConfig

from mgvq.compiled import set_num_threads
from mgvq.curvature.statistics import collect
from mgvq.errors import UserError
from mgvq.model.load import Loaded, load
from mgvq.model.sites import list_sites, site_weights
from mgvq.protocols import CalibrationSet
from mgvq.quantization.codebooks import CodebookCache, rate_table
from mgvq.quantization.method import Method
from mgvq.quantization.pipeline import layer_problems
from mgvq.quantization.rounding import LayerRounder
from mgvq.quantization.storage import group_ids, held_bits, held_by
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.runs.build import build
from mgvq.runs.compose import composer
from mgvq.runs.identity import run_id
from mgvq.runs.method import build_method
from mgvq.types import Needs, Site, StatsBank

MODELS = {
    "smollm2": (["calibration=text", "calibration.num_samples=16", "evaluation=perplexity"], (11,)),
    "tiny_llava_onevision": (["calibration.num_images=32"], (1,)),
}
KINDS = ("q_proj", "down_proj")
PRESETS = (
    *("gptq", "foem", "vlmq", "gptvq", "vptq", "aqlm", "guidedquant", "guidedquant_qtip", "yaqa", "rsavq"),
    *("quarot_gptq", "quip_sharp", "qtip"),
)
GRID = {
    "damping": (["compensation.damping=0.01"], ["compensation.damping=0.1"]),
    "order": (["sensitivity=uniform"], ["sensitivity=gram_diag"]),
    "refit": (["refit=none"], ["refit=closed_form"]),
}
OWN_SCORE = ("rsavq",)
BITS, MARGIN = 2.0, 0.02
KEYS = ["preset", "model", "settings"]
OUT = Path(__file__).with_name("chosen.csv")


def combinations(preset: str) -> Iterator[tuple[str, list[str]]]:
    """The settings of the preset itself, then those of the grid, by name."""
    yield "preset", []
    for parts in itertools.product(*(words for axis, words in GRID.items() if axis != "order" or preset not in OWN_SCORE)):
        words = [word for part in parts for word in part]
        yield " ".join(words), words


def judge(method: Method, loaded: Loaded, sites: Sequence[Site], banks: Sequence[StatsBank]) -> tuple[float, float]:
    """The geometric mean of the layers' held-out proxies, and the stored bits a weight."""
    weights = site_weights(loaded.model, sites)
    problems, held_out = (layer_problems(weights, bank, method) for bank in banks)
    table_groups = cut_table_groups(problems, method.codebook)
    cache = CodebookCache(table_groups, method.codebook, problems)
    table = rate_table(cache, method.allocation.distortion)
    ids = group_ids(problems)
    beside, size = held_bits(held_by(problems, ids)), sum(s.num_weights for s in sites)
    chosen = method.allocation(table, int(BITS * size) - beside).tolist()
    if shift := method.shift:
        targets = {}
        for site, problem in problems.items():
            gradient = banks[0][site].gradient
            assert gradient is not None, "the preset's needs have it"
            assert problem.metric is not None, "the method's checks ask for a metric"
            direction = shift.direction(problem.metric, _gradient(problem, gradient))
            targets[site] = shift.target(problem.weight, direction, shift.steps[-1])
        cache = cache.with_targets(targets)
    rates = [table.rates[r] for r in chosen]
    rounded = LayerRounder(cache, rates, method.compensation, method.refit, ids).round(sites, [])
    logs = []
    for site, problem in problems.items():
        metric = held_out[site].metric
        assert metric is not None
        error = problem.of_model(rounded.decoded[site]) - problem.weight.float()
        logs.append(math.log(metric.loss(error) / metric.loss(problem.weight.float())))
    stored = beside + sum(int(table.bits[u, r]) for u, r in enumerate(chosen))
    return math.exp(sum(logs) / len(logs)), stored / size


def _gradient(problem, gradient: torch.Tensor) -> torch.Tensor:
    return problem.transform.weight(gradient) if problem.transform else gradient


class Statistics:
    """What the presets read of one model's calibration and held-out samples, each set of statistics collected once."""

    def __init__(self, loaded: Loaded, sites: Sequence[Site]) -> None:
        self._loaded, self._sites = loaded, sites
        self._banks: dict[Needs, list[StatsBank]] = {}

    def __call__(self, needs: Needs, drawn: CalibrationSet) -> list[StatsBank]:
        if needs not in self._banks:
            parts = (drawn.batches, drawn.heldout)
            self._banks[needs] = [
                collect(self._loaded.model, self._sites, list(part(self._loaded.processor)), needs, drawn.label_seed)
                for part in parts
            ]
        return self._banks[needs]


def rows(presets: Sequence[str], models: Sequence[str], compose) -> Iterator[dict[str, object]]:
    for model in models:
        common, blocks = MODELS[model]
        cfg = compose(f"model={model}")
        loaded = load(build(cfg, "model"), torch.device("cpu"))
        sites = [s for s in list_sites(loaded.model, "language") if s.block in blocks and s.kind in KINDS]
        statistics = Statistics(loaded, sites)
        for preset in presets:
            seen = set()
            for name, words in combinations(preset):
                try:
                    cfg = compose(f"model={model}", f"method={preset}", *common, *words)
                    method = _method(cfg)
                except UserError:
                    continue  # a setting that has no effect on this preset
                if (run := run_id(cfg)) in seen:
                    continue
                seen.add(run)
                drawn = build(cfg, "calibration").draw()
                start = time.perf_counter()
                proxy, bits = judge(method, loaded, sites, statistics(method.needs, drawn))
                seconds = round(time.perf_counter() - start, 1)
                row = {"preset": preset, "settings": name, "model": model, "proxy": round(proxy, 5), "bits": round(bits, 4)}
                print(row, seconds, flush=True)
                yield row


def _method(cfg: DictConfig) -> Method:
    method = build_method(cfg)
    assert method is not None
    return replace(method, prefix=None)


def main() -> None:
    """Entry point: judges the named presets, or all, on both models; rows are written as they come, and others stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=PRESETS, metavar="PRESET", help="default: all")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL", help="default: both")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    set_num_threads(1)
    with composer() as compose:
        for row in rows(arguments.presets, arguments.models, compose):
            keep(row)
    print(best(pd.read_csv(OUT)).to_string())


def best(table: pd.DataFrame) -> pd.DataFrame:
    """For every preset what `MARGIN` lets it have: its own settings, or those of the least mean log proxy over the models."""
    logs = table.assign(log=table.proxy.map(math.log)).pivot_table(index=["preset", "settings"], columns="model", values="log")
    mean = logs.mean(axis=1).rename("proxy")
    found = []
    for preset, own in mean.groupby(level="preset"):
        paper, least = own.get((preset, "preset"), math.inf), own.idxmin()
        settings = least[1] if own[least] < paper + math.log(1 - MARGIN) else "preset"
        found.append({"preset": preset, "settings": settings, "share": round(math.exp(own[least] - paper), 3)})
    return pd.DataFrame(found)


def keep(row: dict[str, object]) -> None:
    """Write the row in place of an older one of the same preset, settings and model."""
    kept = pd.read_csv(OUT) if OUT.is_file() else pd.DataFrame(columns=list(row))
    same = (kept[KEYS] == pd.Series(row)[KEYS]).all(axis=1)
    table = pd.concat([kept[~same], pd.DataFrame([row])]) if len(kept) else pd.DataFrame([row])
    table.sort_values(KEYS, kind="stable").to_csv(OUT, index=False)


if __name__ == "__main__":
    main()
