"""What a study's runs did to each layer: bits and sensitivity by channel group, error of the rounding, use of the codebooks.

Means over the runs of an arm, small enough to be committed beside the record: the figures by layer are drawn from it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Int

from mgvq.analysis.records.records import StudyRecord, read_parquet
from mgvq.errors import UserError
from mgvq.progress import progress
from mgvq.runs.store import RunFolder
from mgvq.studies.plan import PlannedRun

KEYS = ["point", "arm", "site", "tower", "kind", "block", "group"]
COLUMNS = [*KEYS, "quantity", "value"]
PROXY = ("nearest", "feedback", "shifted", "refit")  # the stages of rounding a layer, in this order


def collect_layers(runs: Sequence[PlannedRun], record: StudyRecord | None = None) -> pd.DataFrame:
    """One row a grid point, arm, layer, channel group and quantity; `value` is its mean over the arm's distinct runs.

    Quantities: `bits` (index bits a weight), `sensitivity` (mean channel score), `usage` (entropy of a codebook's codes over the
    log of its size: 1 where all centroids are used alike; a mean over stages, none for a scalar grid), by group; `weights`, how
    many there are. With group -1, of a whole layer: `stored` (proxy error of what the run stored) and, where the run kept them,
    `times_limit` (its error over the rate-distortion limit) and the proxy error after each stage of `PROXY`. A mean over values
    of which one is NaN is NaN. Full-precision runs have no rows; without any other the table is empty. With a `record` only its
    runs are read. Raises UserError where a run's files are not those that it wrote.
    """
    known = None if record is None else {run.run for run in record.runs}
    folders = {run.folder.path: run.folder for run in runs if known is None or run.folder.path.name in known}
    cells = dict.fromkeys((json.dumps(run.point), run.arm, run.folder.path) for run in runs if run.folder.path in folders)
    parts = [
        part.assign(point=point, arm=arm)
        for point, arm, path in progress(cells, "layers of the runs")  # seeds that share a run count once
        for part in _tables(folders[path])
    ]
    if not parts:
        return pd.DataFrame(columns=COLUMNS)
    rows = pd.concat(parts)
    by = rows.groupby([*KEYS, "quantity"], sort=False, dropna=False, as_index=False)
    means = pd.DataFrame(by[["value"]].mean(skipna=False))
    return means.astype({"value": "float32"})


def _tables(folder: RunFolder) -> Iterator[pd.DataFrame]:
    """The quantities of one run."""
    run, remedy = folder.path, "delete the run's folder and run it again."
    if not (run / "allocation.parquet").is_file():
        return
    folder.verify()
    slices = read_parquet(run / "allocation.parquet", remedy)
    groups = slices[["site", "tower", "kind", "block", "group"]]
    score = slices.score / slices.num_channels
    for quantity, value in {"bits": slices.index_bits, "sensitivity": score, "weights": slices.num_weights}.items():
        yield groups.assign(quantity=quantity, value=value.astype(float))
    used = codebook_usage(run / "checkpoint")
    keys = list(zip(slices.site, slices.group, strict=True))
    has_codebook = np.array([key in used for key in keys], bool)
    usage = [used[key] for key in keys if key in used]
    yield groups.loc[has_codebook].assign(quantity="usage", value=usage)
    layers = read_parquet(run / "layers.parquet", remedy)
    if layers.proxy_error.notna().any():  # without a metric there is none
        yield layers[["site", "tower", "kind", "block"]].assign(group=-1, quantity="stored", value=layers.proxy_error)
    if "times_limit" in layers:
        yield layers[["site", "tower", "kind", "block"]].assign(group=-1, quantity="times_limit", value=layers.times_limit)
    if (run / "proxy.parquet").is_file():
        proxy = read_parquet(run / "proxy.parquet", remedy)
        columns = {"group": -1, "quantity": proxy.part, "value": proxy.proxy_error}
        yield proxy[["site", "tower", "kind", "block"]].assign(**columns)


def codebook_usage(checkpoint: Path) -> dict[tuple[str, int], float]:
    """The `evenness` of the codes by layer and channel group. Groups without a codebook have no entry."""
    from mgvq.checkpoint.load import FORMATS, read  # here: torch takes seconds to import, and records need none of it

    usage = {}
    for layer in read(checkpoint)[0]:
        stored = FORMATS[layer.format].load(layer.tensors, **layer.settings)
        stored = getattr(stored, "rest", stored)  # beside outliers
        stored = getattr(stored, "inner", stored)  # in a rotated basis
        for group, channel_slice in enumerate(getattr(stored, "slices", (stored,))):
            coded = getattr(channel_slice, "plain", channel_slice)  # times a power of two
            coded = getattr(coded, "transposed", coded)  # vectors of columns
            if coded.format == "vector":
                usage[layer.name, group] = evenness(coded.codes.numpy(), *coded.table.shape[:2])
    return usage


def evenness(codes: Int[np.ndarray, "out vectors stages"], num_tables: int, num_centroids: int) -> float:
    """The entropy of codes over log(`num_centroids`), a mean over the tables: 1 where all centroids are used alike.

    Vector v of a row takes stage s from table (v mod (num_tables / stages)) * stages + s, as `VectorWeight` says. Where layers
    share a table, the codes of one layer may well use a part of it.
    """
    _, num_vectors, stages = codes.shape
    table = (np.arange(num_vectors)[:, None] % (num_tables // stages)) * stages + np.arange(stages)
    counts = np.bincount((table * num_centroids + codes).ravel(), minlength=num_tables * num_centroids)
    share = counts.reshape(num_tables, -1) / counts.reshape(num_tables, -1).sum(1, keepdims=True)
    entropy = -(share * np.log(share, out=np.zeros_like(share), where=share > 0)).sum(1)
    return float(entropy.mean() / np.log(num_centroids))


def layers_path(results: Path, study: str) -> Path:
    """Where the layers of a study lie: beside the records, in a folder of their own."""
    return results / "records" / "layers" / f"{study}.parquet"


def write_layers(layers: pd.DataFrame, path: Path) -> None:
    """Write one parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    layers.to_parquet(path, index=False, compression="zstd")


def read_layers(path: Path) -> pd.DataFrame:
    """Read what `write_layers` wrote: an empty table where the study kept none, as one without quantised runs does.

    Raises UserError, naming the file, where it is damaged or holds something else.
    """
    if not path.is_file():
        return pd.DataFrame(columns=COLUMNS)
    layers = read_parquet(path, "mgvq-report STUDY.yaml writes it again from finished runs.")
    if absent := [name for name in COLUMNS if name not in layers]:
        raise UserError(f"{path} is no table of layers: it has no {', '.join(absent)}. mgvq-report STUDY.yaml writes one.")
    return layers
