"""Where things lie: the configuration and the results, in a checkout and in an installed wheel; the resolvers that say so."""

import os
from pathlib import Path

from omegaconf import OmegaConf

from mgvq.model.source import SHIPPED

_PACKAGE = Path(__file__).parents[1]
_CHECKOUT = _PACKAGE.parent


def conf_folder() -> Path:
    """`conf/` of the checkout, or `mgvq/conf` of the wheel."""
    installed = _PACKAGE / "conf"
    return installed if installed.is_dir() else _CHECKOUT / "conf"


def results_folder() -> Path:
    """`MGVQ_RESULTS` where it is set, `results/` of the checkout, or `results/` of the working directory for a wheel."""
    if chosen := os.environ.get("MGVQ_RESULTS"):
        return Path(chosen).absolute()
    return (_CHECKOUT if (_CHECKOUT / "conf").is_dir() else Path.cwd()) / "results"


def register_resolvers() -> None:
    """`${results_folder:}` and `${shipped_model:NAME}` for the yaml files; may be called again."""
    OmegaConf.register_new_resolver("results_folder", lambda: str(results_folder()), replace=True)
    OmegaConf.register_new_resolver("shipped_model", lambda name: str(SHIPPED / name), replace=True)
