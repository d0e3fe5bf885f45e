"""Where the bits of a run went."""

from pathlib import Path

import pandas as pd


def bits_by_kind(run: Path) -> pd.DataFrame:
    """A row for every tower and kind of layer, in the order of the data: layers, million weights, index and stored bits a weight.

    Stored bits come from the ledger: codes, tables, scales, group ids; what layers share counts where it is stored. Empty for a
    run that quantised nothing.
    """
    if not (run / "allocation.parquet").is_file():
        return pd.DataFrame()
    allocated, ledger = pd.read_parquet(run / "allocation.parquet"), pd.read_parquet(run / "ledger.parquet")
    quantized = ledger[ledger.quantized]
    rows = []
    for (tower, kind), part in allocated.groupby(["tower", "kind"], sort=False):  # type: ignore[misc]
        weights = part.num_weights.sum()
        mine = quantized.tensor.str.startswith(tuple(f"{site}." for site in part.site.unique()))
        index_bits = (part.index_bits * part.num_weights).sum() / weights
        stored_bits = 8 * quantized.num_bytes[mine].sum() / weights
        rows.append((tower, kind, part.site.nunique(), weights / 1e6, index_bits, stored_bits))
    return pd.DataFrame(rows, columns=["tower", "kind", "layers", "M weights", "index bits", "stored bits"])
