"""`mgvq-sensitivity`: all definitions of channel sensitivity side by side on one model, over several calibration seeds."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from mgvq.cli.mistakes import mistakes_told
from mgvq.cli.utf8 import use_utf8
from mgvq.errors import UserError
from mgvq.model.source import FLAG
from mgvq.runs.build import SCOPES, build
from mgvq.runs.compose import composer
from mgvq.runs.early import check_group
from mgvq.runs.overrides import key_of
from mgvq.runs.places import conf_folder, results_folder

_EXAMPLE = "mgvq-sensitivity local model.path=DIR calibration=image_text calibration.path=rows.jsonl"


def main() -> None:
    """Entry point: prints how stable each definition is and the files that it wrote; exits with 2 for bad settings, 130 after
    Ctrl-C."""
    use_utf8()
    parser = argparse.ArgumentParser(prog="mgvq-sensitivity", description=__doc__, epilog=f"example: {_EXAMPLE}")
    parser.add_argument("model", help="a variant of conf/model")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="model.* and calibration, as for mgvq-run (default: calibration=tiny_vqa)",
    )
    parser.add_argument("--scope", choices=SCOPES, default="language")
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds 0, 1, ... (default: 3)")
    parser.add_argument("--metrics", help="variants of conf/sensitivity, with commas between them (default: all)")
    parser.add_argument("--out", type=Path, default=None, help="folder for tables/ and figures/ (default: the results folder)")
    arguments = parser.parse_args()
    with mistakes_told("mgvq-sensitivity"):
        written = _compare(arguments)
    print(*written, sep="\n")


def _compare(arguments: argparse.Namespace) -> Sequence[Path]:
    if arguments.seeds < 2:
        raise UserError(f"--seeds must be at least 2, got {arguments.seeds}: the stability of a score is that between two seeds.")
    known = _variants("sensitivity")
    names = arguments.metrics.split(",") if arguments.metrics else known
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"--metrics: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    if arguments.model not in _variants("model"):
        raise UserError(f"there is no model {arguments.model}; there are {', '.join(_variants('model'))}. Example: {_EXAMPLE}")
    if idle := [s for s in arguments.settings if not s.startswith(("model.", "calibration.", "calibration="))]:
        raise UserError(
            f"{' '.join(idle)} has no effect here; settings are those of model.* and calibration. Example: {_EXAMPLE}"
        )
    if fixed := [s for s in arguments.settings if key_of(s) in ("calibration.seed", "calibration.label_seed")]:
        raise UserError(
            f"{' '.join(fixed)} would be the seed of all {arguments.seeds} calibrations, which --seeds draws; leave it out."
        )
    cfg = _composed(f"model={arguments.model}", "calibration=tiny_vqa", *arguments.settings)
    for group in ("model", "calibration"):
        check_group(cfg, group)
    source = build(cfg, "model")
    calibrations = _over_seeds(cfg, "calibration", arguments.seeds)
    if None in calibrations:
        raise UserError("calibration=none leaves nothing to compare: choose a calibration set such as calibration=tiny_vqa.")
    metrics = {n: _over_seeds(_composed(f"sensitivity={n}"), "sensitivity", arguments.seeds) for n in names}
    further = cfg.calibration.get("gram_samples")
    if further is not None and not any(variants[0].needs.gram for variants in metrics.values()):
        raise UserError(
            f"calibration.gram_samples={further} has no effect: none of {', '.join(names)} reads a Gram. Leave it out."
        )

    import torch  # here, with what imports it: help and bad arguments need none of it

    from mgvq.analysis.figures.sensitivity_figures import draw_figures
    from mgvq.analysis.tables.sensitivity_tables import write_tables
    from mgvq.model.load import load
    from mgvq.quantization.scoring import score
    from mgvq.runs.method import check_images

    torch.set_num_threads(1)  # as runs do unless told otherwise: the last digits may move with it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load(source, device)
    check_images(loaded.model.config, calibration=calibrations[0])
    scores = score(loaded, arguments.scope, calibrations, metrics)
    results = arguments.out or results_folder()
    name = "_".join([arguments.model, *(flag.removeprefix(FLAG).replace(" ", "_") for flag in source.flags())])
    tables = write_tables(name, scores, results)
    print(tables[-1].read_text(encoding="utf-8"))
    return [*tables, *draw_figures(name, scores, results)]


def _variants(group: str) -> list[str]:
    return sorted(file.stem for file in (conf_folder() / group).glob("*.yaml"))


def _composed(*overrides: str) -> DictConfig:
    try:
        with composer() as compose:
            cfg = compose(*overrides)
    except HydraException as error:
        raise UserError(f"{' '.join(overrides)}: {error}") from error
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{' and '.join(missing)} must be given. Example: {_EXAMPLE}")
    return cfg


def _over_seeds(cfg: DictConfig, group: str, num_seeds: int) -> list[Any]:
    """The component of one group, once for every seed."""
    return [build(cast(DictConfig, OmegaConf.merge(cfg, {"seed": seed})), group) for seed in range(num_seeds)]


if __name__ == "__main__":
    main()
