"""What a run of a larger model takes with `memory=resident` and with `memory=streamed`: time, and memory at its peak.

The model has the shape of the language model of LLaVA-OneVision-0.5B (24 blocks of Qwen2, hidden 896, intermediate 4864, 151,936
tokens, tied) and random weights: what is measured does not depend on their values. Each run is a process of its own, whose
anonymous memory (`RssAnon`, and what of it was swapped out: what it has allocated, without the pages of mapped files, which the
system takes back when others need the room) is read from /proc twenty times a second. A run takes an hour or more at full depth,
so that every one is kept, in results/records/scale.json, as soon as it is done; results/tables/scale.md has all that are kept.
Both memories must leave the same bytes.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mgvq.model.processor import load_processor
from mgvq.model.source import SHIPPED
from mgvq.runs.places import results_folder

BLOCKS, PASSAGES = 24, 32
MEMORIES = ("streamed", "resident")
METHODS = {"mgvq2": ["method=mgvq2"], "mgvq": ["method=mgvq", "compensation.refresh=8", "compensation.sweeps=1"]}
SETTINGS = ["model=local", "scope=language", "calibration=text", "evaluation=perplexity", "device=cpu"]


@dataclass(frozen=True)
class Measured:
    """One run."""

    settings: str  # of the method, and those that were asked for besides
    blocks: int
    passages: int  # for calibration, and as many for evaluation unless the settings say otherwise
    tokenizer: str  # with the one of SmolLM2 a passage has some 210 tokens, with that of a small model three times as many
    memory: str
    seconds: float
    peak: int  # bytes of anonymous memory
    shares: dict[str, float]  # seconds by step, as metrics.json has them
    digest: str  # SHA-256 of the checkpoint's first shard

    @property
    def model(self) -> tuple[str, int, int, str]:
        """What has to come out the same whatever the memory."""
        return self.settings, self.blocks, self.passages, self.tokenizer


def write_model(folder: Path, blocks: int, tokenizer: str) -> None:
    """Write the model with a tokenizer into a folder."""
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": blocks, "num_attention_heads": 14}
    config = Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, dtype="bfloat16")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    processor = load_processor(tokenizer)
    getattr(processor, "tokenizer", processor).save_pretrained(folder)  # that of a language model is all that it has


def measure(model: Path, memory: str, settings: Sequence[str], results: Path) -> tuple[float, int, dict[str, float], str]:
    """Run once, in a process of its own: seconds, peak, seconds by step, digest. A run that was stopped there goes on, and its
    time and peak are those of the last start. Raises RuntimeError, with the output, where it fails."""
    results.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with (results / "output").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mgvq.cli.run", f"model.path={model}", f"memory={memory}", *SETTINGS, *settings],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "MGVQ_RESULTS": str(results), "OMP_NUM_THREADS": "1"},
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - begin
        output.seek(0)
        if process.returncode:
            raise RuntimeError(output.read()[-3000:])
    (done,) = results.glob("runs/*/DONE")
    metrics = json.loads((done.parent / "metrics.json").read_text(encoding="utf-8"))
    shares = {name: metrics[f"time/{name}_s"] for name in ("calibrate", "quantize", "evaluate")}
    shard = done.parent / "checkpoint" / "mgvq.safetensors"
    return seconds, peak, shares, hashlib.sha256(shard.read_bytes()).hexdigest()


def anonymous(pid: int) -> int:
    """The anonymous memory of a process in bytes, swapped out or not; 0 where it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmSwap:")))


def table(runs: Sequence[Measured]) -> str:
    """All runs as a table, with what they are of."""
    pairs = len(runs) > len({run.model for run in runs})
    both = " Streamed and resident runs of the same settings have written the same bytes." if pairs else ""
    lines = [
        "A language model of the shape of LLaVA-OneVision-0.5B's (hidden 896, intermediate 4864, 151,936 tokens, tied; with 24 "
        "blocks 494 M weights), random weights in bfloat16; `scope=language calibration=text`, computed in float32 on one core. "
        f"Peak: anonymous memory of the process, in 10^9 bytes.{both}\n",
        "| settings | blocks | passages | tokenizer | memory | peak, GB | minutes "
        "| statistics, s | rounding, s | evaluation, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        steps = " | ".join(f"{run.shares[name]:.0f}" for name in ("calibrate", "quantize", "evaluate"))
        where = f"`{run.settings}` | {run.blocks} | {run.passages} | {run.tokenizer} | {run.memory}"
        lines.append(f"| {where} | {run.peak / 1e9:.2f} | {run.seconds / 60:.1f} | {steps} |")
    return "\n".join(lines) + "\n"


def keep(run: Measured, results: Path) -> None:
    """Add the run to the record, in place of one of the same settings, and write the table anew. Raises SystemExit, and keeps
    nothing, where the run of the other memory has left other bytes."""
    record = results / "records" / "scale.json"
    runs = [Measured(**one) for one in json.loads(record.read_text(encoding="utf-8"))] if record.is_file() else []
    runs = [one for one in runs if (one.model, one.memory) != (run.model, run.memory)]
    if any(one.model == run.model and one.digest != run.digest for one in runs):
        raise SystemExit(f"memory={run.memory} and the other one have not left the same bytes: {run}")
    runs = sorted([*runs, run], key=lambda one: (-one.blocks, one.settings, one.memory != MEMORIES[0]))
    for path, text in (
        (record, json.dumps([asdict(one) for one in runs], indent=1) + "\n"),
        (results / "tables" / "scale.md", table(runs)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--passages", type=int, default=PASSAGES, help="for calibration; a quarter as many are held out")
    parser.add_argument("--memory", choices=MEMORIES, action="append", help="one of the two alone")
    parser.add_argument("--method", choices=METHODS, action="append", help="one of the two alone")
    parser.add_argument("--scratch", type=Path, help="a folder for model and runs that stays, so that a stopped run goes on")
    parser.add_argument("--tokenizer", default=str(SHIPPED / "tiny_internvl"), help="the model's: a folder, or a name on the hub")
    parser.add_argument("settings", nargs="*", help="further settings of the runs, such as codebook.state_bits=8")
    asked = parser.parse_args()
    samples = [f"calibration.num_samples={asked.passages}", f"calibration.heldout_samples={max(1, asked.passages // 4)}"]
    samples += [f"evaluation.num_passages={asked.passages}"]
    with tempfile.TemporaryDirectory(prefix="mgvq-scale-") as temporary:
        scratch = asked.scratch or Path(temporary)
        model = scratch / f"model-{asked.blocks}-{Path(asked.tokenizer).name}"
        if not (model / "tokenizer.json").is_file():
            write_model(model, asked.blocks, asked.tokenizer)
        for method in asked.method or METHODS:
            settings = [*METHODS[method], *asked.settings]
            for memory in asked.memory or MEMORIES:
                found = measure(model, memory, [*samples, *settings], scratch / f"{method}-{memory}-{model.name}")
                run = Measured(" ".join(settings), asked.blocks, asked.passages, Path(asked.tokenizer).name, memory, *found)
                print(run, flush=True)
                keep(run, results_folder())


if __name__ == "__main__":
    main()
