"""Writing a packed checkpoint: `mgvq.safetensors`, `mgvq.json`, and the source's config, tokenizer and processor."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mgvq.checkpoint.digests import write_digests
from mgvq.checkpoint.ledger import Entry, Ledger, Part
from mgvq.model.load import Loaded, as_stored
from mgvq.model.towers import find_towers
from mgvq.protocols import QuantizedWeight
from mgvq.types import Site

VERSION = 3  # provisional: 2 had no digests; the tensors are as they were
TENSORS_VERSION = 2
TENSORS, INDEX = "mgvq.safetensors", "mgvq.json"


def save(
    folder: Path,
    loaded: Loaded,
    sites: Sequence[Site],
    weights: Mapping[Site, QuantizedWeight],
    embeddings: Mapping[str, QuantizedWeight] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
) -> Ledger:
    """Write the checkpoint and return its ledger; equal inputs give equal bytes.

    Layers of `sites` without an entry in `weights` are stored like everything else, in the source's dtype. `embeddings` are
    weights outside of the scope by the names of their modules; one that is tied is stored under its first name. `parameters` are
    what others were tuned to, by name, and are written as they are. Raises AssertionError where the ledger and the bytes on disk
    differ.
    """
    folder.mkdir(parents=True)
    towers = find_towers(loaded.model)
    tensors: dict[str, Tensor] = {}
    entries: list[Entry] = []
    layers = {}
    named: dict[int, tuple[Tensor, str]] = {}  # by id: a tensor, kept alive so that no other takes its id, and its name
    stored_as: list[tuple[str, bool, QuantizedWeight]] = [(site.name, True, weight) for site, weight in weights.items()]
    stored_as += [(name, False, weight) for name, weight in (embeddings or {}).items()]
    for module, quantized, weight in stored_as:
        part: Part = towers.of(module) or "other"
        roles = {}
        num_weights = weight.num_weights()
        for role, tensor in weight.tensors().items():
            if id(tensor) not in named:
                name = f"{module}.{role}"
                named[id(tensor)] = tensor, name
                tensors[name] = tensor.contiguous().cpu()
                entries.append(Entry(name, part, quantized, tensor.nbytes, num_weights.get(role, 0)))
            roles[role] = named[id(tensor)][1]
        layers[module] = {"format": weight.format, **weight.settings(), "tensors": roles}
    in_scope, changed = {f"{s.name}.weight" for s in sites}, parameters or {}
    packed = {f"{module}.weight" for module in layers}
    for name, parameter in [*loaded.model.named_parameters(), *_persistent_buffers(loaded)]:
        if name not in packed:
            stored = changed[name] if name in changed else as_stored(parameter.detach(), loaded.stored_dtype)
            tensors[name] = stored.contiguous().cpu()
            part: Part = towers.of(name) or "other"
            entries.append(Entry(name, part, name in in_scope, stored.nbytes, stored.numel()))
    # One key only: safetensors writes several in the order of a hash table, which differs from process to process.
    save_file(tensors, folder / TENSORS, metadata={"mgvq": str(TENSORS_VERSION)})
    index = {"version": VERSION, "layers": layers, "source_dtype": str(loaded.stored_dtype).removeprefix("torch.")}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    loaded.model.config.save_pretrained(folder)
    _save_generation(folder, loaded)
    loaded.processor.save_pretrained(folder)
    for file in loaded.code:
        shutil.copy(file, folder)
    write_digests(folder)
    return _close(folder, entries)


def _save_generation(folder: Path, loaded: Loaded) -> None:
    """The source's own generation settings: those of its file, with the end and pad token that it may lack.

    `GenerationConfig.save_pretrained` refuses settings that have no effect (a temperature without sampling), which some sources
    have.
    """
    settings: Any = loaded.model.generation_config
    settings.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def _persistent_buffers(loaded: Loaded) -> list[tuple[str, Tensor]]:
    kept = loaded.model.state_dict().keys()
    return [(name, b) for name, b in loaded.model.named_buffers() if name in kept]


def _close(folder: Path, entries: list[Entry]) -> Ledger:
    """Add the container's own bytes and hold the sum against the files."""
    with (folder / TENSORS).open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    overhead = {f"{TENSORS} header": header, INDEX: (folder / INDEX).stat().st_size}
    ledger = Ledger([*entries, *(Entry(name, "container", False, size, 0) for name, size in overhead.items())])
    on_disk = sum((folder / name).stat().st_size for name in (TENSORS, INDEX))
    if ledger.num_bytes != on_disk:
        raise AssertionError(f"the ledger counts {ledger.num_bytes} bytes, {folder} holds {on_disk}")
    return ledger
