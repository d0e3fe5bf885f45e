"""Where things lie: the configuration and the results, in a checkout and in an installed wheel; the resolvers that say so."""

import os
from importlib.util import find_spec
from pathlib import Path

from omegaconf import OmegaConf

from mgvq.model.source import SHIPPED

_PACKAGE = Path(__file__).parents[1]


def checkout() -> Path | None:
    """The root of the source checkout, None for an installed wheel."""
    root = _PACKAGE.parent
    return root if (root / "conf").is_dir() and (root / "pyproject.toml").is_file() else None


def conf_folder() -> Path:
    """`conf/` of the checkout, or `mgvq/conf` of the wheel."""
    root = checkout()
    return root / "conf" if root else _PACKAGE / "conf"


def results_folder() -> Path:
    """`MGVQ_RESULTS` where it is set, `results/` of the checkout, or `results/` of the working directory for a wheel."""
    if chosen := os.environ.get("MGVQ_RESULTS"):
        return Path(chosen).absolute()
    return (checkout() or Path.cwd()) / "results"


def register_resolvers() -> None:
    """Registers what yamls may say: `${results_folder:}`, `${shipped_model:NAME}`, `${package_file:PACKAGE,FILE}`. May be called
    again."""
    OmegaConf.register_new_resolver("results_folder", lambda: str(results_folder()), replace=True)
    OmegaConf.register_new_resolver("shipped_model", lambda name: str(SHIPPED / name), replace=True)
    OmegaConf.register_new_resolver("package_file", _package_file, replace=True)


def _package_file(package: str, file: str) -> str:
    """The path of a file of an installed package, which is not imported; PACKAGE/FILE where the package is not installed."""
    spec = find_spec(package)
    return str((Path(spec.origin).parent if spec and spec.origin else Path(package)) / file)
