"""A file of a checkpoint is damaged, exchanged or made up; it has to be refused by its name, or to load as it was, soon and
in little memory.

Each trial takes a fresh copy, changes one file of it, and loads model and processor. `damage` of any file has the checkpoint's
digests against it. `structure` (headers, shapes, indices, versions, links, pickles, missing files) comes with digests that were
made anew, so that the readers themselves have to see it.
"""

import json
import pickle
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, logging
from trials import Outcome

import mgvq
from mgvq.checkpoint.digests import DIGESTS, write_digests
from mgvq.checkpoint.index import FIRST_SHARD
from mgvq.checkpoint.save import save
from mgvq.errors import UserError
from mgvq.formats.grouped import GroupedWeight, pack_groups
from mgvq.formats.vector import VectorWeight
from mgvq.model.files import INDEX
from mgvq.model.load import Loaded
from mgvq.model.processor import load_processor
from mgvq.model.sites import list_sites
from mgvq.model.source import SHIPPED
from mgvq.quantization.embeddings import round_embeddings

WHOLE, SAMPLE = 5000, 300
SECONDS, BYTES = 20, 500 * 10**6  # that a trial may take, and the process may grow by
Change = Callable[[Path, random.Random], Any]
SHARDS = (FIRST_SHARD, "mgvq-2.safetensors")


def missing() -> str:
    return ""


def trials(scratch: Path, number: int) -> Iterator[Outcome]:
    """One mutation each, the first ones of a longer series being those of a shorter one."""
    whole = made(scratch / "whole")
    names = sorted(file.name for file in whole.iterdir())
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    expected = loaded(whole)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for trial in range(number):
        rng = random.Random(trial)
        copy = Path(shutil.copytree(whole, scratch / "copy"))
        kind = "structure" if trial % 3 == 0 else "damage"
        case, name = mutate(copy, names, kind, rng)
        since = time.monotonic()
        wrong = judged(copy, changed(copy, whole), expected)
        if (copy / "owned").exists():
            wrong = "a pickle was run"
        if not wrong and (took := time.monotonic() - since) > SECONDS:
            wrong = f"it took {took:.0f} s"
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if not wrong and grown > BYTES:
            wrong = f"the process has grown by {grown / 1e6:.0f} MB"
        told = f"trial {trial}, {case} of {name}: {wrong}" if wrong else ""
        yield Outcome(f"{kind}: {case}", faults=1, survived=int(not wrong), wrong=told)
        shutil.rmtree(copy)


def made(folder: Path) -> Path:
    """A checkpoint of every part: two shards, layers in groups that share tables, a packed embedding, a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 320}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).eval().requires_grad_(False)
    group = torch.tensor([0, 1, 2, 0] * 4)
    ids, table = pack_groups(group), (torch.randn(1, 11, 4, generator=generator) * 0.1).half()
    weights = {}
    for site in (sites := list_sites(model, "all")):
        parts = [
            VectorWeight(torch.randint(0, 11, (site.out_features, -(-size // 4), 1), generator=generator), table, size)
            for size in group.bincount().tolist()
        ]
        weights[site] = GroupedWeight(tuple(parts), ids, 16)
    tokenizer = load_processor(str(SHIPPED / "tiny_internvl")).tokenizer
    given = Loaded(model, tokenizer, torch.float32)
    save(folder, given, sites, weights, round_embeddings(model, 8), shard_bytes=4000)
    assert all((folder / shard).is_file() for shard in SHARDS)
    return folder


def loaded(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Every weight, and every setting that answers depend on."""
    model, processor = mgvq.load(folder, packed=True), mgvq.load_processor(folder)
    settings = [model.config.to_dict(), model.generation_config.to_dict(), processor.init_kwargs, processor.get_vocab()]
    settings += [processor.chat_template, processor("how many red things ?")["input_ids"]]
    text = json.dumps(settings, sort_keys=True, default=str).replace(str(folder), "")
    return {**model.state_dict(), "embedding": model.get_input_embeddings().weight}, text


def changed(folder: Path, whole: Path) -> list[str]:
    """The names of the files that are not what they were, but for digests that were made anew."""
    files = {file.name: folder / file.name for file in whole.iterdir()}
    other = [n for n, f in files.items() if f.is_symlink() or not f.is_file() or f.read_bytes() != (whole / n).read_bytes()]
    return [name for name in other if name != DIGESTS] or other


def judged(folder: Path, names: list[str], expected: tuple[dict[str, torch.Tensor], str]) -> str:
    """What is wrong; nothing where the checkpoint is refused by the name of a changed file, or equal to what it was."""
    try:
        tensors, settings = loaded(folder)
    except UserError as error:
        return "" if any(name in str(error) for name in names) else f"refused without its name: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if settings != expected[1]:
        return "loaded with other settings"
    same = tensors.keys() == expected[0].keys() and all(torch.equal(t, expected[0][n]) for n, t in tensors.items())
    return "" if same else "loaded with other weights"


def mutate(folder: Path, names: list[str], kind: str, rng: random.Random) -> tuple[str, str]:
    """Change one file; the name of what was done, and of the file."""
    if kind == "damage":
        case, name = rng.choice(sorted(DAMAGES)), rng.choice(names)
        DAMAGES[case](folder / name, rng)
        return case, name
    case = rng.choice(sorted(STRUCTURES))
    name = rng.choice(STRUCTURES[case][0] or [n for n in names if Path(n).suffix != ".md" and n != DIGESTS])
    STRUCTURES[case][1](folder / name, rng)
    write_digests(folder)
    return case, name


def rewritten(edit: Callable[[bytearray, random.Random], Any]) -> Change:
    def change(file: Path, rng: random.Random) -> None:
        content = bytearray(file.read_bytes())
        edit(content, rng)
        file.write_bytes(bytes(content))

    return change


def flip(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def cut(content: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(content))
    del content[at : at + rng.randint(1, max(1, len(content) // 4))]


def end(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def insert(content: bytearray, rng: random.Random) -> None:
    content[(at := rng.randrange(len(content))) : at] = rng.randbytes(rng.randint(1, 64))


def swap(content: bytearray, rng: random.Random) -> None:
    size = rng.randint(1, max(1, len(content) // 4))
    a, b = (rng.randrange(max(1, len(content) - size)) for _ in range(2))
    content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]


def exchange(file: Path, rng: random.Random) -> None:
    """Two files of the checkpoint change places."""
    other = rng.choice(sorted(f for f in file.parent.iterdir() if f != file))
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


def disguise(file: Path, rng: random.Random) -> None:
    """A pickle under the file's name, which would write another file where somebody loads it."""
    file.write_bytes(pickle.dumps(_Evil(str(file.parent / "owned"))))


class _Evil:
    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (open, (self.place, "w"))


def link(file: Path, rng: random.Random) -> None:
    """A link to a file elsewhere, of the same name, in which a byte is another; or to a device that never ends."""
    elsewhere = file.parent.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    target = Path("/dev/zero") if rng.random() < 0.2 else elsewhere / file.name
    if target.parent == elsewhere:
        content = bytearray(file.read_bytes())
        flip(content, rng)
        target.write_bytes(bytes(content))
    file.unlink()
    file.symlink_to(target)


def header(edit: Callable[[dict[str, Any], random.Random], Any]) -> Change:
    """Change the header of a file of tensors, and its length with it."""

    def change(file: Path, rng: random.Random) -> None:
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        described = json.loads(content[8 : 8 + length])
        edit(described, rng)
        text = json.dumps(described).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return change


def one(described: dict[str, Any], rng: random.Random) -> tuple[str, dict[str, Any]]:
    return rng.choice(sorted((name, entry) for name, entry in described.items() if name != "__metadata__"))


def reshape(described: dict[str, Any], rng: random.Random) -> None:
    _, entry = one(described, rng)
    entry["shape"] = rng.choice([[*entry["shape"], 1], [2**40, 2**20], [0], [size + 1 for size in entry["shape"]] or [2], [-1]])


def shift(described: dict[str, Any], rng: random.Random) -> None:
    _, entry = one(described, rng)
    start, stop = entry["data_offsets"]
    entry["data_offsets"] = rng.choice([[start + 4, stop + 4], [start, 2**50], [stop, start], [start, stop - 1]])


def rename(described: dict[str, Any], rng: random.Random) -> None:
    name, entry = one(described, rng)
    del described[name]
    described[rng.choice([name + "x", "lm_head.weight", "../" + name])] = entry


def retype(described: dict[str, Any], rng: random.Random) -> None:
    _, entry = one(described, rng)
    entry["dtype"] = rng.choice(["F64", "I64", "F8_E4M3", "PICKLE"])


def length(content: bytearray, rng: random.Random) -> None:
    content[:8] = struct.pack("<Q", rng.choice([2**63, 2**40, len(content), len(content) * 8, 0, 1]))


def out_of_range(file: Path, rng: random.Random) -> None:
    """All codes, or all ids of groups, become 1 in every bit, for which there is no centroid and no group."""
    content = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", content[:8])
    described = json.loads(content[8 : 8 + size])
    name = rng.choice(sorted(n for n in described if n.endswith((".codes", ".groups")) and "embed" not in n))
    start, stop = described[name]["data_offsets"]
    content[8 + size + start : 8 + size + stop] = b"\xff" * (stop - start)
    file.write_bytes(bytes(content))


def version(content: bytearray, rng: random.Random) -> None:
    content[4:8] = rng.choice([2, 4, 99, 2**31]).to_bytes(4, "little")


DAMAGES: dict[str, Change] = {
    "a bit flipped": rewritten(flip),
    "bytes cut out": rewritten(cut),
    "the end cut off": rewritten(end),
    "bytes inserted": rewritten(insert),
    "bytes swapped": rewritten(swap),
    "exchanged with another file": exchange,
    "deleted": lambda file, rng: file.unlink(),
    "a pickle in disguise": disguise,
    "a link": link,
}
STRUCTURES: dict[str, tuple[tuple[str, ...], Change]] = {
    "another length of the header": (SHARDS, rewritten(length)),
    "another shape": (SHARDS, header(reshape)),
    "other offsets": (SHARDS, header(shift)),
    "another name": (SHARDS, header(rename)),
    "another dtype": (SHARDS, header(retype)),
    "a tensor left out": (SHARDS, header(lambda d, rng: d.pop(one(d, rng)[0]))),
    "the end cut off": ((*SHARDS, INDEX), rewritten(end)),
    "bytes inserted": ((INDEX,), rewritten(insert)),
    "another version": ((INDEX,), rewritten(version)),
    "indices out of range": (SHARDS, out_of_range),
    "a pickle in disguise": ((), disguise),
    "a link": ((), link),
    "deleted": ((*SHARDS, INDEX, "config.json", "generation_config.json"), lambda file, rng: file.unlink()),
}
