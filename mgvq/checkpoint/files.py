"""The files of a checkpoint, written: shards, index, and the config that transformers reads. Equal contents give equal bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from mgvq.checkpoint.index import FIRST_SHARD, VERSION, Index, Packed, to_bytes
from mgvq.checkpoint.quantizer import METHOD
from mgvq.model.files import INDEX, read_json

SHARD_BYTES = 5 * 10**9
# What transformers looks for where nobody has told it how to read the checkpoint, and what its error then shows.
WITHOUT_MGVQ = "packed by mgvq - write 'import mgvq' before from_pretrained.safetensors"
# The tensors are what they were in version 2, so that equal weights are equal files.
_FORMAT = {METHOD: "2"}  # one key only: safetensors writes several in the order of a hash table, which differs by process


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], layers: Mapping[str, Packed], source_dtype: torch.dtype, shard_bytes: int
) -> dict[str, int]:
    """Write shards and index; the bytes of every header and of the index, by the names that the ledger gives them.

    A shard is closed before it would be larger than `shard_bytes`, and holds one tensor at least.
    """
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in sorted(tensors.items()):
        if parts[-1] and size + tensor.nbytes > shard_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    names = [f"mgvq-{number}.safetensors" if number > 1 else FIRST_SHARD for number in range(1, len(parts) + 1)]
    overhead = {}
    for name, part in zip(names, parts, strict=True):
        save_file({key: tensor.contiguous().cpu() for key, tensor in part.items()}, folder / name, metadata=_FORMAT)
        with (folder / name).open("rb") as file:
            overhead[f"{name} header"] = 8 + int.from_bytes(file.read(8), "little")
    content = to_bytes(Index(str(source_dtype).removeprefix("torch."), names, layers))
    (folder / INDEX).write_bytes(content)
    return {**overhead, INDEX: len(content)}


def weight_bytes(folder: Path) -> int:
    """The bytes of shards and index on disk."""
    return sum(file.stat().st_size for file in [folder / INDEX, *folder.glob("mgvq*.safetensors")])


def write_config(folder: Path, model: PreTrainedModel, source_dtype: torch.dtype, described: Mapping[str, Any]) -> None:
    """Write `config.json` with the `quantization_config` by which transformers finds our reader.

    Its dtype is the source's, whatever the model was computed in. transformers takes `transformers_weights` away whenever it
    writes a config, so that it is put in afterwards.
    """
    config: Any = model.config
    before = getattr(config, "quantization_config", None)
    if before is not None:
        del config.quantization_config
    try:
        config.save_pretrained(folder)
    finally:
        if before is not None:
            config.quantization_config = before
    content = read_json(folder / "config.json")
    for part in [content, *(value for value in content.values() if isinstance(value, dict))]:
        if "dtype" in part:
            part["dtype"] = str(source_dtype).removeprefix("torch.")
    content["quantization_config"] = {**described, "quant_method": METHOD, "version": VERSION}
    content["transformers_weights"] = WITHOUT_MGVQ
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_generation(folder: Path, model: PreTrainedModel) -> None:
    """Write the source's own generation settings: those of its file, with the end and pad token that it may lack.

    `GenerationConfig.save_pretrained` refuses settings that have no effect (a temperature without sampling), which some sources
    have.
    """
    settings: Any = model.generation_config
    settings.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def plain_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters, one that is tied under its first name, and the buffers that are stored."""
    kept = model.state_dict().keys()
    buffers = [(name, b) for name, b in model.named_buffers() if name in kept]
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *buffers]}
