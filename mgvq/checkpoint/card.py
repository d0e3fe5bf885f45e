"""The model card of a checkpoint, `README.md`: what the model is, measured, and how it is loaded. Every number is the run's."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgvq.model.files import read_json

CARD = "README.md"
_DENOMINATORS = {
    "bits/quantized_layers": "the quantised layers: codes, tables, scales, padding",
    "bits/language_model": "the language model, with its embeddings",
    "bits/model": "the whole model: every byte of the weight files and their index",
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean."""

    value: float
    """The mean itself."""
    low: float
    """From here ..."""
    high: float
    """... to here it lies in 95 of 100 cases; NaN where that cannot be said."""


@dataclass(frozen=True, slots=True)
class Score:
    """A measure of the model, beside full precision on the same questions."""

    measure: str
    """What was measured."""
    number: str
    """On how many samples."""
    model: Estimate
    """Of the model."""
    reference: Estimate | None
    """Of full precision; None where it was not asked."""
    difference: Estimate | None
    """Of the model less full precision, question by question."""


def write_card(folder: Path, licence: str | None, scores: Sequence[Score] = ()) -> None:
    """Write the card from what `config.json` says; without scores it says that none were measured.

    The file is replaced, not overwritten: it may be the same file as another run's.
    """
    config = read_json(folder / "config.json")
    described = config["quantization_config"]
    parts = [
        _front(config, described, licence),
        _title(described),
        _sizes(described["bits"]),
        _measured(scores),
        _loading(config),
        _made(described["provenance"]),
        _terms(licence),
    ]
    temporary = folder / f"{CARD}.tmp"
    temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    temporary.replace(folder / CARD)


def _front(config: Mapping[str, Any], described: Mapping[str, Any], licence: str | None) -> str:
    weights = str(_model(described).get("weights", ""))
    fields = {
        "license": licence or "other",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if "vision_config" in config else "text-generation",
        **({"base_model": weights.split("@")[0]} if "/" in weights else {}),
        "tags": ["mgvq", "quantized"],
    }
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---"])


def _title(described: Mapping[str, Any]) -> str:
    name, weights = _model(described).get("name", "A model"), _model(described).get("weights")
    bits = described["bits"]["bits/quantized_layers"]
    of_what = f" It was made of `{weights}`{'' if '/' in str(weights) else ', a digest of its files'}." if weights else ""
    return f"# {name} at {bits:.3g} bits a weight\n\nPacked by mgvq.{of_what}"


def _sizes(bits: Mapping[str, float]) -> str:
    rows = [f"| {what} | {bits[name]:.4f} |" for name, what in _DENOMINATORS.items()]
    return "\n".join(["## Size", "", "| stored bits a weight of | |", "|---|---:|", *rows])


def _measured(scores: Sequence[Score]) -> str:
    if not scores:
        return "## Measured\n\nNothing was measured."
    lines = ["| | this model | full precision | difference | on |", "|---|---:|---:|---:|---|"]
    lines += [f"| {s.measure} | {_told(s.model)} | {_told(s.reference)} | {_told(s.difference)} | {s.number} |" for s in scores]
    notes = (
        "In brackets is where a value lies in 95 of 100 cases, by how the samples were drawn.",
        "The model was loaded from this folder; full precision had the same samples, with the right answers given.",
    )
    return "\n".join(["## Measured", "", *lines, "", *notes])


def _told(estimate: Estimate | None) -> str:
    if estimate is None:
        return "not asked"
    interval = f" ({estimate.low:.4f} to {estimate.high:.4f})" if math.isfinite(estimate.low) else ""
    return f"{estimate.value:.4f}{interval}"


def _loading(config: Mapping[str, Any]) -> str:
    auto = "AutoModelForImageTextToText" if "vision_config" in config else "AutoModelForCausalLM"
    return f"""\
## Load it

```python
import mgvq  # tells transformers how to read the packed layers
from transformers import {auto}

model = {auto}.from_pretrained("this folder")
processor = mgvq.load_processor("this folder")
```

`mgvq.load("this folder")` gives the same with its layers decoded: larger, and as fast as the original."""


def _made(provenance: Mapping[str, Any]) -> str:
    if not provenance:
        return "## How it was made\n\nNot by a run."
    text = json.dumps(provenance, indent=1, sort_keys=True)
    samples = provenance.get("settings", {}).get("calibration")
    calibration = f"calibrated on `{samples['variant']}`" if samples else "without calibration"
    told = f"All settings that count, {calibration}; the same settings give the same bytes."
    return f"## How it was made\n\n{told}\n\n```json\n{text}\n```"


def _terms(licence: str | None) -> str:
    if licence is None:
        return "## Terms\n\nThe source names no licence: ask who made it."
    return f"## Terms\n\nThose of the source: {licence}."


def _model(described: Mapping[str, Any]) -> Mapping[str, Any]:
    return described["provenance"].get("settings", {}).get("model", {})
