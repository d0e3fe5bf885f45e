"""`make digests`: the SHA-256 of the checkpoint of every preset on every shipped model, after a short calibration.

A change that must not move numbers shows that it does not: the list before its first line and the list after its last are equal.
They are of one machine: presets that fit statistics of a model differ in their last digits between processors, rtn and kmeans
do not (tests/golden/test_digests.py holds those two).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mgvq.model.source import SHIPPED
from mgvq.runs.compose import composer
from mgvq.runs.execute import execute
from mgvq.runs.identity import run_id
from mgvq.runs.places import conf_folder
from mgvq.runs.store import RunFolder

FAMILIES = ("tiny_internvl", "tiny_llava_onevision", "tiny_qwen2_vl", "tiny_smolvlm")
SHORT = ("calibration.num_images=8", "calibration.questions_per_image=4", "calibration.heldout_images=4")
QUESTIONS = "evaluation.num_questions=26"


def presets() -> list[str]:
    """Every preset that quantises."""
    return sorted(path.stem for path in (conf_folder() / "method").glob("*.yaml") if path.stem != "full_precision")


def digests(models: Sequence[str], methods: Sequence[str], results: Path) -> Iterator[tuple[str, str, str]]:
    """Model, preset and digest, one after the other; the runs lie in `results`."""
    assert (SHIPPED / models[0]).is_dir()
    with composer() as compose:
        for model in models:
            for method in methods:
                words = [f"model={model}", f"method={method}", f"paths.results={results}", QUESTIONS]
                cfg = compose(*words)
                if "num_images" in cfg.calibration:
                    cfg = compose(*words, *SHORT)
                metrics = execute(cfg, RunFolder(results / "runs" / run_id(cfg)))
                yield model, method, metrics["checkpoint_sha256"]


def main() -> None:
    """Entry point: prints the list; exits with 1 where it differs from one that is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=FAMILIES, metavar="MODEL", help="default: all four")
    parser.add_argument("--methods", nargs="+", default=presets(), metavar="PRESET", help="default: all")
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the list as JSON")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="a list that was kept")
    arguments = parser.parse_args()
    kept = json.loads(arguments.compare.read_text(encoding="utf-8")) if arguments.compare else {}
    found: dict[str, dict[str, str]] = {}
    moved = []
    with tempfile.TemporaryDirectory() as folder:
        for model, method, digest in digests(arguments.models, arguments.methods, Path(folder)):
            found.setdefault(model, {})[method] = digest
            before = kept.get(model, {}).get(method, digest)
            moved += [f"{model} {method}"] * (before != digest)
            print(f"{digest}  {model}  {method}", flush=True)
            if arguments.write:
                arguments.write.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if moved:
        print(f"{len(moved)} differ from {arguments.compare}: {', '.join(moved)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
