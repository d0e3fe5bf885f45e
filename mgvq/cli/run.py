"""`mgvq-run`: one run, or with -m every combination of the given values."""

import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from mgvq.analysis.tables.bits import bits_by_kind
from mgvq.errors import UserError
from mgvq.runs.build import build, check
from mgvq.runs.compose import with_variants
from mgvq.runs.identity import run_id
from mgvq.runs.places import conf_folder, register_resolvers
from mgvq.runs.store import RunFolder
from mgvq.runs.tracking import track

register_resolvers()
log = logging.getLogger(__name__)
EXTRAS = {"joblib": "joblib", "submitit": "slurm", "ray": "ray"}  # a plugin of Hydra's, and the extra that installs it
SUMMARY = ("text/perplexity", "loss/answer", "kl/full_precision", "bits/quantized_layers", "bits/model")  # behind the accuracies


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
def hydra_main(cfg: DictConfig) -> None:
    """One job of Hydra: skipped where its run is done."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        with_variants(cfg, HydraConfig.get().runtime.choices)
        if cfg.dry:
            from mgvq.runs.dry import report  # here, as below

            if report(cfg) and HydraConfig.get().mode is not RunMode.MULTIRUN:
                sys.exit(2)
            return
        check(cfg)
        tracker = build(cfg, "tracker")
        folder = RunFolder(Path(cfg.paths.results) / "runs" / run_id(cfg))
        if folder.is_done():
            print("done before; delete the folder to run it again")
        else:
            from mgvq.runs.execute import execute  # here: torch takes seconds to import, and a finished run needs none of it

            execute(cfg, folder)
        if tracker:
            track(tracker, folder)
    except UserError as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            log.error("refused: %s", error)
            raise CompactHydraException(f"mgvq-run: {error}") from None  # Hydra goes on with the other jobs and exits with 1
        print(f"mgvq-run: {error}", file=sys.stderr)
        sys.exit(2)
    metrics = folder.metrics()
    if not (bits := bits_by_kind(folder.path)).empty:
        print(bits.to_string(index=False, float_format="{:.3f}".format))
    told = (*(name for name in metrics if name.endswith("/accuracy")), *SUMMARY)
    print("  ".join(f"{name} {metrics[name]:.4g}" for name in told if metrics.get(name) is not None))
    if metrics["flags"]:
        print(f"flags: {', '.join(metrics['flags'])}")
    print(folder.path)


def main() -> None:
    """Entry point."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' progress bars, which would fill a log
    for plugin, extra in EXTRAS.items():
        if find_spec(f"hydra_plugins.hydra_{plugin}_launcher") is None and any(
            word.startswith("hydra/launcher=") and plugin in word for word in sys.argv
        ):
            print(f"mgvq-run: this launcher needs a plugin of Hydra's: pip install 'mgvq[{extra}]'", file=sys.stderr)
            sys.exit(2)
    hydra_main()


if __name__ == "__main__":
    main()
