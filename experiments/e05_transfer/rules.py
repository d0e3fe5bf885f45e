"""Keep the bit rules of the finished runs of "own rule": rules/MODEL_SEED.parquet, what `allocation=transfer` reads of a run."""

from pathlib import Path

import pandas as pd

from mgvq.allocation.transfer import COLUMNS
from mgvq.studies.plan import expand
from mgvq.studies.spec import read_study

HERE = Path(__file__).parent


def main() -> None:
    """Prints the files that it wrote."""
    (HERE / "rules").mkdir(exist_ok=True)
    for run in expand(read_study(HERE / "study.yaml")):
        if run.arm == "own rule":
            file = HERE / "rules" / f"{run.point['model']}_{run.seed}.parquet"
            pd.read_parquet(run.folder.path / "allocation.parquet", columns=COLUMNS).to_parquet(file, index=False)
            print(file)


if __name__ == "__main__":
    main()
