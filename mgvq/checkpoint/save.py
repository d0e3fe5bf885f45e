"""Writing the checkpoint of a quantised model: packed weights, their index, and the source's config, tokenizer and processor."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mgvq.checkpoint.card import write_card
from mgvq.checkpoint.digests import write_digests
from mgvq.checkpoint.files import (
    SHARD_BYTES,
    plain_tensors,
    weight_bytes,
    write_config,
    write_generation,
    write_weights,
)
from mgvq.checkpoint.index import Packed
from mgvq.checkpoint.ledger import Entry, Ledger, Part
from mgvq.model.load import Loaded, as_stored
from mgvq.model.towers import find_towers
from mgvq.protocols import QuantizedWeight
from mgvq.types import Site


def save(
    folder: Path,
    loaded: Loaded,
    sites: Sequence[Site],
    weights: Mapping[Site, QuantizedWeight],
    embeddings: Mapping[str, QuantizedWeight] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    *,
    provenance: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Ledger:
    """Write the checkpoint and return its ledger; equal inputs give equal bytes.

    Layers of `sites` without an entry in `weights` are stored like everything else, in the source's dtype. `embeddings` are
    weights outside of the scope by the names of their modules; one that is tied is stored under its first name. `parameters` are
    what others were tuned to, by name, and are written as they are. `provenance` goes into config.json and the model card: how
    the model was made. Raises AssertionError where the ledger and the bytes on disk differ.
    """
    folder.mkdir(parents=True)
    towers = find_towers(loaded.model)
    tensors: dict[str, Tensor] = {}
    entries: list[Entry] = []
    layers: dict[str, Packed] = {}
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
                tensors[name] = tensor
                entries.append(Entry(name, part, quantized, tensor.nbytes, num_weights.get(role, 0)))
            roles[role] = named[id(tensor)][1]
        layers[module] = Packed(weight.format, weight.settings(), roles)
    in_scope, tuned = {f"{s.name}.weight" for s in sites}, parameters or {}
    packed = {f"{module}.weight" for module in layers}
    for name, tensor in plain_tensors(loaded.model).items():
        if name not in packed:
            tensors[name] = tuned[name] if name in tuned else as_stored(loaded.numbers(name, tensor), loaded.stored_dtype)
            part: Part = towers.of(name) or "other"
            entries.append(Entry(name, part, name in in_scope, tensors[name].nbytes, tensors[name].numel()))
    overhead = write_weights(folder, tensors, layers, loaded.stored_dtype, shard_bytes)
    ledger = Ledger([*entries, *(Entry(name, "container", False, size, 0) for name, size in overhead.items())])
    if ledger.num_bytes != weight_bytes(folder):
        raise AssertionError(f"the ledger counts {ledger.num_bytes} bytes, {folder} holds {weight_bytes(folder)}")
    described = {"bits": ledger.bits(), "provenance": dict(provenance or {})}
    write_config(folder, loaded.model, loaded.stored_dtype, described)
    write_generation(folder, loaded.model)
    loaded.processor.save_pretrained(folder)
    for file in (*loaded.code, *loaded.terms):
        shutil.copy(file, folder)
    write_card(folder, loaded.licence)
    write_digests(folder)
    return ledger
