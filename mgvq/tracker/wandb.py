"""Weights & Biases: a finished run is written into a folder on this machine, and sent from there where that is possible."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from mgvq.errors import UserError

MODES = ("auto", "online", "offline")
PROBE_S = 5  # within which a server has to say anything at all
_NO_STAGES = ("model", "calibration", "evaluation")  # groups of an identity that are no part of the method
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Sends config, metrics, tables by layer and table group, curves over the blocks and the checkpoint's ledger; no weights.

    Every run is written offline, to `path`/wandb/offline-run-*, which needs neither network nor account. `mode` says whether that
    folder is then sent: `offline` never, `online` always, `auto` where someone is logged in and `WANDB_MODE` says nothing else.
    A server that does not answer within seconds, or is not through within `timeout_s`, is left alone, and a warning names the
    command that sends the folder later. `group` and `name` are how the run is shown, null: no group; its variants and seed.
    A run of several studies is one run of W&B in each of them. Another run of W&B that this process has open is ended with it.
    """

    path: str
    project: str
    mode: str
    timeout_s: float
    group: str | None
    name: str | None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"tracker.mode must be one of {', '.join(MODES)}; got {self.mode!r}")
        if not self.timeout_s > 0:
            raise UserError(f"tracker.timeout_s must be > 0 seconds, got {self.timeout_s!r}")

    @property
    def place(self) -> str:
        return f"wandb {self.project}/{self.group or ''}"

    def folder_name(self, run: str) -> str:
        """What the run is called in W&B, and its offline folder after the date: one for each project and group."""
        return re.sub(r"[^\w.-]+", "-", "-".join(filter(None, (run, self.group, self.project))))

    def __call__(self, run: Path) -> None:
        folder = self._write(run)
        if obstacle := self._obstacle() or self._send(folder):
            log.warning("W&B: %s is not sent: %s. This sends it: wandb sync %s", run.name, obstacle, folder)

    def _write(self, run: Path) -> Path:
        """The offline folder of the run, in place of an older one."""
        os.environ.setdefault("WANDB_DATA_DIR", f"{self.path}/wandb")  # tables wait beside the runs, not in the home, to be sent
        import wandb  # here: it takes seconds

        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        identity, provenance, metrics = (
            json.loads((run / f"{name}.json").read_text(encoding="utf-8")) for name in ("identity", "provenance", "metrics")
        )
        tables = {
            name: pd.read_parquet(file)
            for name in ("layers", "allocation", "blocks", "ledger")
            if (file := run / f"{name}.parquet").is_file()
        }
        ledger = tables.pop("ledger")
        name = self.folder_name(run.name)
        for left in Path(self.path).glob(f"wandb/offline-run-*-{name}"):  # of a process that was killed before it could say so
            shutil.rmtree(left)
        Path(self.path).mkdir(parents=True, exist_ok=True)
        quiet = wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_stats=True
        )
        with _service():
            mirror = wandb.init(
                mode="offline",
                dir=self.path,
                project=self.project,
                group=self.group,
                id=name,
                name=self.name or f"{' '.join(variants(identity))}, seed {config['seed']}",
                tags=tags(config, identity),
                config={**config, "run": run.name, "provenance": provenance},
                settings=quiet,
            )
            if (blocks := tables.get("blocks")) is not None:
                curves = blocks.loc[blocks.chosen, ["heldout_loss", "first_order", "gradient_norm", "step"]].add_prefix("blocks/")
                for number in range(len(curves)):
                    mirror.log(curves.iloc[number].to_dict(), step=number)
            mirror.log({f"table/{key}": wandb.Table(dataframe=table, allow_mixed_types=True) for key, table in tables.items()})
            mirror.log_artifact(wandb.Artifact(f"ledger-{name}", "checkpoint-ledger", metadata=_figures(ledger, metrics)))
            mirror.summary.update(metrics)
            mirror.finish()
        return Path(mirror.settings.sync_dir)

    def _obstacle(self) -> str | None:
        """Finds out within seconds why nothing can be sent now; None where nothing speaks against it."""
        import requests
        import wandb

        if self.mode == "offline":
            return "tracker.mode=offline"
        if self.mode == "auto" and (wanted := os.environ.get("WANDB_MODE", "online")) != "online":
            return f"WANDB_MODE={wanted}"
        if not wandb.api.api_key:
            return "nobody is logged in here, which wandb login changes"
        url = wandb.setup().settings.base_url
        try:
            requests.head(url, timeout=PROBE_S)
        except requests.RequestException as error:
            return f"{url} does not answer ({type(error).__name__})"
        return None

    def _send(self, folder: Path) -> str | None:
        """Sends the folder; returns why that failed, or None. A process can be stopped, while wandb alone tries for hours."""
        command = [sys.executable, "-m", "wandb", "sync", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=self.timeout_s)
        except subprocess.TimeoutExpired:
            return f"it took more than tracker.timeout_s={self.timeout_s:g}"
        return (done.stderr or done.stdout).strip().rpartition("\n")[2] if done.returncode else None


@contextmanager
def _service() -> Iterator[None]:
    """Ends W&B's own process, which closes the run's file, and waits for it; also where that process was killed.

    A run that is used as a context manager, and a connection that is left to the exit of Python, print a traceback each then.
    """
    import wandb

    try:
        yield
    except Exception:
        with suppress(Exception):
            wandb.teardown()
        raise
    wandb.teardown()


def variants(identity: Mapping[str, Any]) -> list[str]:
    """The names of the stages' variants, in a run's identity, which leaves out those that do nothing; `full_precision` where
    nothing is quantised.

    It is no preset that names a run: `method=rtn codebook=kmeans` is not rtn.
    """
    stages = {key: value for key, value in identity.items() if isinstance(value, dict) and key not in _NO_STAGES}
    names = [value["variant"].partition(" ")[0] for value in stages.values() if "variant" in value]
    return names or ["full_precision"]


def tags(config: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """What runs are filtered by: model, scope, bits, variants. Without repetition, which W&B refuses."""
    bits = config["budget"]["bits_per_weight"]
    budget = [] if bits is None else [f"{bits:g} bits"]
    return list(dict.fromkeys([config["model"]["name"], config["scope"], *budget, *variants(identity)]))


def _figures(ledger: pd.DataFrame, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The bytes by part of the model, quantised and not, and the sums that the metrics have."""
    parts = ledger.groupby(["part", "quantized"]).num_bytes.sum()
    by_part = {f"bytes/{part}/{'quantized' if quantized else 'as it was'}": int(n) for (part, quantized), n in parts.items()}  # type: ignore[misc]
    sums = {key: value for key, value in metrics.items() if key.startswith(("bits/", "bytes/", "checkpoint_sha256"))}
    return {**by_part, **sums, "tensors": len(ledger)}
