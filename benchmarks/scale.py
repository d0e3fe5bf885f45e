"""What a run of a larger model takes with `memory=resident` and with `memory=streamed`: time, and memory at its peak.

The model has the shape of the language model of LLaVA-OneVision-0.5B (24 blocks of Qwen2, hidden 896, intermediate 4864, 151,936
tokens, tied) and random weights: what is measured does not depend on their values. Each run is a process of its own, whose
anonymous memory (`RssAnon`: what it has allocated, without the pages of mapped files, which the system takes back when others
need the room) is read from /proc twenty times a second. Written to results/tables/scale.md, which says how many blocks and
passages it is of; with one `--memory` alone it is printed and not written.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mgvq.model.processor import load_processor
from mgvq.model.source import SHIPPED
from mgvq.runs.places import results_folder

BLOCKS, PASSAGES = 24, 32
SETTINGS = ["model=local", "method=mgvq2", "scope=language", "calibration=text", "evaluation=perplexity", "device=cpu"]


@dataclass(frozen=True)
class Measured:
    """One run."""

    seconds: float
    peak: int  # bytes of anonymous memory
    digest: str  # SHA-256 of the checkpoint's first shard
    shares: dict[str, float]  # seconds by step, as metrics.json has them


def write_model(folder: Path, blocks: int) -> int:
    """Write the model with a small tokenizer into an empty folder; the bytes of its weights."""
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": blocks, "num_attention_heads": 14}
    config = Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, dtype="bfloat16")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    load_processor(str(SHIPPED / "tiny_internvl")).tokenizer.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(model: Path, memory: str, settings: list[str], results: Path) -> Measured:
    """Run once, in a process of its own. Raises RuntimeError, with the output, where it fails."""
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
    return Measured(seconds, peak, hashlib.sha256(shard.read_bytes()).hexdigest(), shares)


def anonymous(pid: int) -> int:
    """The anonymous memory of a process in bytes; 0 where it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--passages", type=int, default=PASSAGES, help="for calibration; a quarter as many are held out")
    parser.add_argument("--memory", choices=("streamed", "resident"), action="append", help="one of the two alone")
    parser.add_argument("settings", nargs="*", help="further settings of the runs, such as codebook.state_bits=8")
    asked = parser.parse_args()
    samples = [f"calibration.num_samples={asked.passages}", f"calibration.heldout_samples={max(1, asked.passages // 4)}"]
    samples += [f"evaluation.num_passages={asked.passages}"]
    lines = ["| memory | peak, GB | minutes | statistics, s | rounding, s | evaluation, s |", "|---|---|---|---|---|---|"]
    digests = set()
    with tempfile.TemporaryDirectory(prefix="mgvq-scale-") as scratch:
        size = write_model(Path(scratch) / "model", asked.blocks)
        for memory in asked.memory or ("streamed", "resident"):
            results = Path(scratch) / memory
            results.mkdir()
            found = measure(Path(scratch) / "model", memory, [*samples, *asked.settings], results)
            digests.add(found.digest)
            seconds = " | ".join(f"{found.shares[name]:.0f}" for name in ("calibrate", "quantize", "evaluate"))
            lines.append(f"| {memory} | {found.peak / 1e9:.2f} | {found.seconds / 60:.1f} | {seconds} |")
            print(lines[-1], flush=True)
    if len(digests) > 1:
        raise SystemExit("the two checkpoints are not the same bytes")
    said = " ".join(["`method=mgvq2 scope=language calibration=text`", *(f"`{setting}`" for setting in asked.settings)])
    text = (
        f"A language model of {asked.blocks} blocks, hidden 896, intermediate 4864, 151,936 tokens, tied, with random weights of "
        f"{size / 1e9:.2f} GB in bfloat16; {said}, {asked.passages} passages, computed in float32 on one core. Peak: anonymous "
        "memory of the process, in 10^9 bytes. Both checkpoints have the same bytes.\n\n"
    )
    if asked.memory is None:
        path = results_folder() / "tables" / "scale.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
