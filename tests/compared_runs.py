"""What two runs of equal settings have to have in common, whatever they took."""

import json
from pathlib import Path
from typing import Any

OF_THE_RUN = ("config.yaml", "provenance.json", "metrics.json", "quantization.json")  # with the mode, seconds and peak memory


def files(run: Path) -> dict[str, str]:
    digests = json.loads((run / "DONE").read_text())
    return {name: digest for name, digest in digests.items() if name not in OF_THE_RUN}


def numbers(run: Path) -> dict[str, Any]:
    metrics = json.loads((run / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "memory/"))}
