"""A checkpoint of the shape of Qwen2-0.5B, with random codes at 2 bits: a fresh process loads it packed, through
transformers, with a peak of memory within 1.3 times its files."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from trials import Outcome

from mgvq.checkpoint.save import save
from mgvq.formats.vector import VectorWeight
from mgvq.model.load import Loaded
from mgvq.model.processor import load_processor
from mgvq.model.sites import list_sites
from mgvq.model.source import SHIPPED

WHOLE, SAMPLE = 1, 0
MOST = 1.3
FRESH = """
import sys, torch, transformers
import mgvq
from transformers import AutoModelForCausalLM
from transformers.models.qwen2 import modeling_qwen2  # imported before memory is measured
import mgvq.checkpoint.packed
def kilobytes(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))
open("/proc/self/clear_refs", "w").write("5")  # the peak is forgotten
before = kilobytes("VmRSS")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(1024 * (kilobytes("VmHWM") - before))
"""


def missing() -> str:
    return "" if Path("/proc/self/clear_refs").exists() else "this system has no /proc that tells how much memory is held."


def trials(scratch: Path, number: int) -> Iterator[Outcome]:
    """The one checkpoint."""
    for _ in range(number):
        size = made(scratch / "large")
        done = subprocess.run([sys.executable, "-c", FRESH, str(scratch / "large")], capture_output=True, text=True, check=False)
        if done.returncode:
            yield Outcome("0.5 B", wrong=done.stderr.strip()[-300:])
            continue
        ratio = int(done.stdout.split()[-1]) / size
        print(f"the peak is {ratio:.2f} times the files of {size / 1e6:.0f} MB")
        yield Outcome("0.5 B", faults=1, survived=int(ratio <= MOST), wrong=f"{ratio:.2f} times" if ratio > MOST else "")


def made(folder: Path) -> int:
    """Write the checkpoint; its size."""
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    config = Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, dtype="bfloat16")
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).bfloat16()
    sites = list_sites(model, "all")
    scoped = {f"{site.name}.weight" for site in sites}
    for name, parameter in list(model.named_parameters()):
        module = model.get_submodule(name.rpartition(".")[0])
        kept = torch.empty(0) if name in scoped else torch.full(parameter.shape, 0.01, dtype=torch.bfloat16)
        if name not in scoped:
            setattr(module, name.rpartition(".")[2], torch.nn.Parameter(kept, requires_grad=False))
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    table = (torch.randn(1, 256, 4, generator=generator) * 0.02).half()
    weights = {
        site: VectorWeight(torch.randint(0, 256, (site.out_features, site.in_features // 4, 1), generator=generator), table,
                           site.in_features)
        for site in sites
    }  # fmt: skip
    tokenizer = load_processor(str(SHIPPED / "tiny_internvl")).tokenizer
    save(folder, Loaded(model, tokenizer, torch.bfloat16), sites, weights)
    return sum(file.stat().st_size for file in folder.iterdir())
