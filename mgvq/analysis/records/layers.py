"""What a study's runs did to each layer: bits and sensitivity by channel group, error of the rounding, use of the codebooks.

Means over the runs of an arm, small enough to be committed beside the record: the pictures by layer are drawn from it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from mgvq.progress import progress
from mgvq.studies.plan import PlannedRun

KEYS = ["point", "arm", "site", "tower", "kind", "block", "group"]
PROXY = ("nearest", "feedback", "shifted", "refit")  # the stages of rounding a layer, in this order


def collect_layers(runs: Sequence[PlannedRun]) -> pd.DataFrame:
    """One row a grid point, arm, layer, channel group and quantity; `value` is its mean over the arm's distinct runs.

    Quantities: `bits` (index bits a weight), `sensitivity` (mean channel score), `usage` (entropy of a codebook's codes over the
    log of its size: 1 where all centroids are used alike; a mean over stages, none for a scalar grid), by group; `weights`, how
    many there are. With group -1, of a whole layer: `stored` (proxy error of what the run stored) and, where the run kept them,
    the proxy error after each stage of `PROXY`. Full-precision runs have no rows; without any other the table is empty.
    """
    cells = dict.fromkeys((json.dumps(run.point), run.arm, run.folder.path) for run in runs)  # seeds that share a run count once
    parts = [
        part.assign(point=point, arm=arm)
        for point, arm, folder in progress(cells, "layers of the runs")
        for part in _tables(folder)
    ]
    if not parts:
        return pd.DataFrame(columns=[*KEYS, "quantity", "value"])
    rows = pd.concat(parts)
    means = rows.groupby([*KEYS, "quantity"], sort=False, dropna=False, as_index=False).agg({"value": "mean"})
    return means.astype({"value": "float32"})


def _tables(run: Path) -> Iterator[pd.DataFrame]:
    if not (run / "allocation.parquet").is_file():
        return
    slices = pd.read_parquet(run / "allocation.parquet")
    groups = slices[["site", "tower", "kind", "block", "group"]]
    score = slices.score / slices.num_channels
    used = codebook_usage(run / "checkpoint")
    usage = pd.Series([used.get(key) for key in zip(slices.site, slices.group, strict=True)], slices.index, dtype=float)
    found = {"bits": slices.index_bits, "sensitivity": score, "usage": usage, "weights": slices.num_weights}
    for quantity, value in found.items():
        yield groups.assign(quantity=quantity, value=value).dropna(subset="value")
    layers = pd.read_parquet(run / "layers.parquet")
    whole = layers[["site", "tower", "kind", "block"]].assign(group=-1)
    yield whole.assign(quantity="stored", value=layers.proxy_error).dropna(subset="value")
    if (run / "proxy.parquet").is_file():
        proxy = pd.read_parquet(run / "proxy.parquet")
        columns = {"group": -1, "quantity": proxy.part, "value": proxy.proxy_error}
        yield proxy[["site", "tower", "kind", "block"]].assign(**columns).dropna(subset="value")


def codebook_usage(checkpoint: Path) -> dict[tuple[str, int], float]:
    """By layer and channel group: the entropy of its codes over log k, a mean over the codebooks of a piece.

    Where layers share a table, the codes of one layer may well use a part of it.
    """
    from mgvq.checkpoint.load import FORMATS, read  # here: torch takes seconds to import, and records need none of it

    usage = {}
    for layer in read(checkpoint)[0]:
        stored = FORMATS[layer.format].load(layer.tensors, **layer.settings)
        for group, channel_slice in enumerate(getattr(stored, "slices", (stored,))):
            if channel_slice.format == "vector":
                usage[layer.name, group] = _evenness(channel_slice.codes.numpy(), *channel_slice.table.shape[:2])
    return usage


def _evenness(codes: np.ndarray, num_tables: int, num_centroids: int) -> float:
    """Codes are (out, vectors, stages); see `VectorWeight` for which table an entry points into."""
    _, num_vectors, stages = codes.shape
    table = (np.arange(num_vectors)[:, None] % (num_tables // stages)) * stages + np.arange(stages)
    counts = np.bincount((table * num_centroids + codes).ravel(), minlength=num_tables * num_centroids)
    share = counts.reshape(num_tables, -1) / counts.reshape(num_tables, -1).sum(1, keepdims=True)
    entropy = -(share * np.log(share, out=np.zeros_like(share), where=share > 0)).sum(1)
    return float(entropy.mean() / np.log(num_centroids))


def layers_path(results: Path, study: str) -> Path:
    """Beside the records, in a folder of its own."""
    return results / "records" / "layers" / f"{study}.parquet"


def write_layers(layers: pd.DataFrame, path: Path) -> None:
    """One parquet file; what repeats is stored once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    layers.to_parquet(path, index=False, compression="zstd")


def read_layers(path: Path) -> pd.DataFrame:
    """Empty where the study kept none, as one without quantised runs does."""
    return pd.read_parquet(path) if path.is_file() else pd.DataFrame(columns=[*KEYS, "quantity", "value"])
