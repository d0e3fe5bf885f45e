"""The card of a run that is sent to somebody else: what it is in a page, for people, from the run's own files."""

import json
from pathlib import Path

from mgvq.analysis.runs.differences import provenance_of, shown
from mgvq.analysis.runs.listed import ListedRun
from mgvq.analysis.tables.render import escaped

CARD = "CARD.md"
TO_FILL_IN = "TODO"
_BY_HAND = "<!-- what stands below is written by hand -->"
_QUESTIONS = ("Who ran it, and how to reach you", "On what machine, and how long it took", "What is odd about it, if anything")
_MEASURED = ("loss/answer", "kl/full_precision", "bits/quantized_layers", "bits/model", "time/quantize_s", "memory/peak_gb")


def card(run: ListedRun) -> str:
    """The part of the card that is made of the run's files: equal files give equal text."""
    origin = provenance_of(run.folder.path)
    lines = {
        "model": run.model,
        **{f"model {name.removeprefix('model.')}": value for name, value in origin.items() if name.startswith("model.")},
        "weights": run.flat.get("model.weights"),
        "method": run.method,
        "seed": run.seed,
        run.metric: run.score,
        **{name: run.metrics[name] for name in _MEASURED if name in run.metrics},
        "flags": ", ".join(run.metrics["flags"]) or "none",
        "mgvq": origin.get("version"),
        "commit": origin.get("commit"),
        "changes since that commit": origin.get("dirty") or "none",
        "machine": ", ".join(str(value) for name, value in origin.items() if name.startswith("machine.") and value),
    }
    table = "\n".join(f"| {escaped(name)} | {escaped(' '.join(shown(value).split()))} |" for name, value in lines.items())
    settings = json.dumps(run.settings, indent=1, ensure_ascii=False)
    return (
        f"# Run {run.id}\n\n| | |\n|---|---|\n{table}\n\nThe settings that can move its numbers; `config.yaml` has all:\n\n"
        f"```json\n{settings}\n```\n\n`mgvq-runs check FOLDER` says whether these files are those that the run wrote.\n\n"
        f"{_BY_HAND}\n"
    )


def write_card(run: ListedRun, folder: Path) -> Path:
    """Write the card into the folder. What was written into one by hand stays."""
    file = folder / CARD
    own = file.read_text(encoding="utf-8").partition(_BY_HAND + "\n")[2] if file.is_file() else ""
    file.write_text(
        card(run) + (own or "".join(f"\n## {question}\n\n{TO_FILL_IN}\n" for question in _QUESTIONS)), encoding="utf-8"
    )
    return file


def parts_of(text: str) -> tuple[str, str]:
    """A card's part from the run's files and the part that was written by hand."""
    made, mark, own = text.partition(_BY_HAND + "\n")
    return made + mark, own
