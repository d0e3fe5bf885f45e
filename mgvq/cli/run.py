"""`mgvq-run`: one run, or with -m every combination of the given values."""

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

import mgvq
from mgvq.analysis.tables.bits import bits_by_kind
from mgvq.cli.utf8 import use_utf8
from mgvq.cli.words import check_words
from mgvq.errors import SharedFault, UserError
from mgvq.ranks.ranks import Ranks
from mgvq.runs.build import build, check
from mgvq.runs.compose import with_variants
from mgvq.runs.device import check_device
from mgvq.runs.early import check_values
from mgvq.runs.files import disk_faults_told
from mgvq.runs.identity import run_id
from mgvq.runs.objective import check_objective, objective
from mgvq.runs.places import conf_folder, register_resolvers
from mgvq.runs.processes import is_first, ranks, several
from mgvq.runs.store import RunFolder
from mgvq.runs.tracking import track

register_resolvers()
log = logging.getLogger(__name__)
# Plugins of Hydra's: what they are, and the extra that installs them.
EXTRAS = {
    "joblib": ("launcher", "joblib"),
    "submitit": ("launcher", "slurm"),
    "ray": ("launcher", "ray"),
    "optuna": ("sweeper", "optuna"),
}
SHOWING = ("--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i")  # what prints, and runs nothing
DONE, OBJECTIVE = "whether the run is done", "the objective"  # what the first of several processes tells the others
SUMMARY = ("text/perplexity", "loss/answer", "kl/full_precision", "bits/quantized_layers", "bits/model")  # behind the accuracies


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
def hydra_main(cfg: DictConfig) -> float | list[float] | None:
    """One job of Hydra: skipped where its run is done. Returns the run's `objective`, for sweepers that search."""
    level = logging.INFO if is_first() else logging.CRITICAL
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        with ranks().together():
            return _job(cfg, ranks())
    except SharedFault as error:  # the other jobs would meet it too
        _say(error)
        sys.exit(2)
    except UserError as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            log.error("refused: %s", error)
            raise CompactHydraException(f"mgvq-run: {error}") from None  # Hydra goes on with the other jobs and exits with 1
        _say(error)
        sys.exit(2)


def _job(cfg: DictConfig, ranks: Ranks) -> float | list[float] | None:
    """The job in one process. Of several the first alone has to do with the run's folder, and prints."""
    with_variants(cfg, HydraConfig.get().runtime.choices)
    if cfg.dry:
        if ranks.is_first:
            from mgvq.runs.dry import report  # here, as below

            if report(cfg) and HydraConfig.get().mode is not RunMode.MULTIRUN:
                sys.exit(2)
        return None
    check(cfg)
    check_objective(cfg, HydraConfig.get().sweeper if HydraConfig.get().mode is RunMode.MULTIRUN else {})
    check_values(cfg)
    if not ranks.is_first:
        if not ranks.first(DONE, bool):
            from mgvq.runs.quantise import assist

            assist(cfg, ranks)
        return ranks.first(OBJECTIVE, lambda: None)
    tracker = build(cfg, "tracker")
    folder = RunFolder(Path(cfg.paths.results) / "runs" / run_id(cfg))
    if folder.is_done() and (gone := folder.missing_files()):
        log.warning("%s was done before, but %s is gone: it runs again", folder.path, _few(gone))
        folder.reopen()
    if ranks.first(DONE, folder.is_done):
        folder.discard_partial()
        print("done before; delete the folder to run it again")
    else:
        check_device(cfg.device)
        folder.check_writable()
        if len(sys.argv) == 1:
            _say(_what_runs(cfg))
        with _uncollected():
            from mgvq.runs.execute import execute  # here: torch takes seconds to import, and a finished run needs none of it

        with disk_faults_told(Path(cfg.paths.results)):
            execute(cfg, folder, ranks)
    metrics = folder.metrics()
    found = ranks.first(OBJECTIVE, lambda: objective(cfg, metrics))
    if tracker:
        track(tracker, folder)
    if not (bits := bits_by_kind(folder.path)).empty:
        print(bits.to_string(index=False, float_format="{:.3f}".format))
    told = (*(name for name in metrics if name.endswith("/accuracy")), *SUMMARY)
    print("  ".join(f"{name} {metrics[name]:.4g}" for name in told if metrics.get(name) is not None))
    if metrics["flags"]:
        print(f"flags: {', '.join(metrics['flags'])}")
    print(folder.path)
    return found


def _say(words: object) -> None:
    """What is told on stderr, once."""
    if is_first():
        print(f"mgvq-run: {words}", file=sys.stderr)


@contextmanager
def _uncollected() -> Iterator[None]:
    """What is imported inside stays as long as the process: the garbage collector need not look through it, now or later."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def _few(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} files more)"


def _what_runs(cfg: DictConfig) -> str:
    """What a run without settings is, in a line."""
    return (
        f"no setting is given, so {cfg.model.name} is quantised with codebook={cfg.variants.codebook} to "
        f"{cfg.budget.bits_per_weight:g} bits and evaluated with {cfg.variants.evaluation} "
        f"({cfg.evaluation.get('num_questions', 'all')} questions): about half a minute. mgvq-run --help says what else there is."
    )


def _terminate(number: int, frame: FrameType | None) -> None:
    """A signal ends the run as Ctrl-C does: the run folder gets its FAILED."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> None:
    """Entry point: exits with 0 when the run is done, 2 for bad input, 1 where jobs of -m failed, 130 after Ctrl-C."""
    use_utf8()
    if not sys.stderr.isatty() or not is_first():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' progress bars, which would fill a log
    if "--version" in sys.argv:
        print(f"mgvq {mgvq.__version__}")
        return
    if any(word in SHOWING for word in sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    try:
        _check_plugins()
        check_words(sys.argv[1:])
    except UserError as error:
        _say(error)
        sys.exit(2)
    for ended in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ended) is signal.SIG_DFL:
            signal.signal(ended, _terminate)
    try:
        hydra_main()
    except SystemExit as ended:
        if ended.code == 1 and {"-m", "--multirun"} & set(sys.argv):
            print(
                "mgvq-run: not every job has ended well; finished runs are kept, and the same command retries the others.",
                file=sys.stderr,
            )
        raise
    except KeyboardInterrupt as interrupt:
        print(
            "\nmgvq-run: interrupted. Finished runs and collected statistics are kept; the run that was going on is no result, "
            "and the same command starts it again, behind the last block that was rounded where its method goes block by block.",
            file=sys.stderr,
        )
        name = str(interrupt) or "SIGINT"
        if name == "SIGINT":
            sys.exit(130)
        signal.signal(signal.Signals[name], signal.SIG_DFL)
        os.kill(os.getpid(), signal.Signals[name])  # whoever started it is told by which signal it ended


def _check_plugins() -> None:
    """Raises UserError for a launcher or a sweeper whose plugin is not installed, and for a launcher in one of several processes,
    which would start jobs of its own in each of them."""
    if several() and any(word.startswith("hydra/launcher=") for word in sys.argv):
        raise UserError(
            "WORLD_SIZE is set, and in one of several processes of a run hydra/launcher= would start runs of its own. Leave one "
            "of the two out; mgvq-study has launchers that start runs of several processes (`processes`)."
        )
    for plugin, (kind, extra) in EXTRAS.items():
        if find_spec(f"hydra_plugins.hydra_{plugin}_{kind}") is None and any(
            word.startswith(f"hydra/{kind}=") and plugin in word for word in sys.argv
        ):
            raise UserError(f"this {kind} needs a plugin of Hydra's: pip install 'mgvq[{extra}]'")


if __name__ == "__main__":
    main()
