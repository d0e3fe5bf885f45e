"""Where the bits of a run went, and how near its layers are to what no code can do better."""

from pathlib import Path

import numpy as np
import pandas as pd


def bits_by_kind(run: Path) -> pd.DataFrame:
    """A row for every tower and kind of layer, in the order of the data: layers, million weights, index and stored bits a weight,
    and the error as a multiple of the limit (`mgvq.quantization.limits`), its geometric mean over the weights.

    Stored bits come from the ledger: codes, tables, scales, group ids; what layers share counts where it is stored. Empty for a
    run that quantised nothing; runs of before there were limits have NaN there.
    """
    if not (run / "allocation.parquet").is_file():
        return pd.DataFrame()
    allocated, ledger = pd.read_parquet(run / "allocation.parquet"), pd.read_parquet(run / "ledger.parquet")
    layers = pd.read_parquet(run / "layers.parquet").reindex(columns=["tower", "kind", "num_weights", "times_limit"])
    times = {of: mean_times_limit(part) for of, part in layers.groupby(["tower", "kind"])}
    quantized = ledger[ledger.quantized]
    rows = []
    for (tower, kind), part in allocated.groupby(["tower", "kind"], sort=False):  # type: ignore[misc]
        weights = part.num_weights.sum()
        mine = quantized.tensor.str.startswith(tuple(f"{site}." for site in part.site.unique()))
        index_bits = (part.index_bits * part.num_weights).sum() / weights
        stored_bits = 8 * quantized.num_bytes[mine].sum() / weights
        rows.append((tower, kind, part.site.nunique(), weights / 1e6, index_bits, stored_bits, times[tower, kind]))
    return pd.DataFrame(rows, columns=["tower", "kind", "layers", "M weights", "index bits", "stored bits", "times the limit"])


def mean_times_limit(layers: pd.DataFrame) -> float:
    """The geometric mean of `times_limit` over the weights of the layers; NaN where none has a limit."""
    known = layers[layers.times_limit > 0]
    return (
        float(np.exp((np.log(known.times_limit) * known.num_weights).sum() / known.num_weights.sum())) if len(known) else np.nan
    )
