"""`export()`: a checkpoint read back, and written as another kind of folder that transformers loads."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import AutoConfig

from mgvq.checkpoint.load import load, load_processor, read
from mgvq.checks import told_as
from mgvq.errors import UserError
from mgvq.export import aqlm, vptq
from mgvq.export.codes import Coded, narrow
from mgvq.model.classes import model_class
from mgvq.model.files import read_json, reading_folder
from mgvq.model.terms import term_files

KINDS = ("bf16", "aqlm", "vptq")
_WRITERS = {"aqlm": aqlm, "vptq": vptq}
_OWN = ("quantization_config", "transformers_weights")  # what config.json says of our own codes


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    num_coded: int
    """The layers that are stored as codes; 0 for plain weights."""
    num_bytes: int
    """The bytes of all files."""


def export(path: Path, out: Path, kind: str, *, trust_remote_code: bool = False) -> Exported:
    """Write the checkpoint at `path` into the new folder `out` as one of `KINDS`.

    `bf16`: every weight decoded and rounded once to 16 bits, a model like any other. `aqlm`, `vptq`: the codes of these packages,
    without loss; embedding and head are decoded, exactly. Files with the model's terms, and Python files that came with it, go
    along. `trust_remote_code` is that of `mgvq.load`. Raises UserError, before anything is written, where `out` is taken or
    cannot be made, and with the layer and the reason where a layer cannot be represented.
    """
    if out.exists():
        raise UserError(f"{out} is there already: give a folder that is not (--out DIR).")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent} is no folder, so {out.name} cannot be made in it.")
    with told_as(f"{out} cannot be made", "Give a folder in a place where you may write (--out DIR)."):
        temporary = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    with temporary as scratch:
        made = Path(scratch) / out.name
        if kind == "bf16":
            num_coded = _write_plain(path, made, trust_remote_code)
        else:
            num_coded = _write_coded(path, made, kind, trust_remote_code)
        load_processor(path, verify=False, trust_remote_code=trust_remote_code).save_pretrained(made)
        for file in (*path.glob("*.py"), *term_files(path)):
            shutil.copy(file, made)
        if (settings := path / "generation_config.json").is_file():
            shutil.copy(settings, made)
        made.rename(out)
    return Exported(out, num_coded, sum(f.stat().st_size for f in out.rglob("*") if f.is_file()))


def _write_plain(path: Path, out: Path, trust_remote_code: bool) -> int:
    model = load(path, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:  # though config.json may say otherwise
        for part in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
            part.tie_word_embeddings = False
    for name in _OWN:
        vars(model.config).pop(name, None)
    model.save_pretrained(out)
    return 0


def _write_coded(path: Path, out: Path, kind: str, trust_remote_code: bool) -> int:
    writer = _WRITERS[kind]
    layers, plain = read(path)
    model = _skeleton(path, trust_remote_code)
    ends = {
        name for name, module in model.named_modules() if module in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    coded: dict[str, Coded] = {layer.name: writer.coded(layer) for layer in layers if layer.name not in ends}
    if not coded:
        raise UserError(f"{path} has no quantised layers, so there are no codes to write for {writer.NAME}: take --to bf16.")
    decoded = {f"{layer.name}.weight": narrow(layer.decode()) for layer in layers if layer.name in ends}
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in coded]
    tensors = {**plain, **decoded, **{f"{name}.{role}": t for name, layer in coded.items() for role, t in layer.tensors.items()}}
    out.mkdir()
    config = _described(path, tensors, model)
    config["quantization_config"] = writer.configuration(coded, others)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_torch_state_dict({name: t.contiguous() for name, t in tensors.items()}, out, metadata={"format": "pt"})
    return len(coded)


def _skeleton(path: Path, trust_remote_code: bool) -> Any:
    """The model without weights, by which its modules are told apart."""
    where = {"trust_remote_code": trust_remote_code}
    with reading_folder(path, path), torch.device("meta"):
        config = AutoConfig.from_pretrained(path, local_files_only=True, **where)
        return model_class(config).from_config(config, **where)


def _described(path: Path, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Any]:
    """The source's config.json, with a dtype in which no stored number changes, and with the head that is stored."""
    config = {name: value for name, value in read_json(path / "config.json").items() if name not in _OWN}
    widths = {t.dtype for t in tensors.values() if t.is_floating_point()}
    dtype = str(widths.pop() if len(widths) == 1 else torch.float32).removeprefix("torch.")
    own_head = any(target in tensors and source in tensors for target, source in model.all_tied_weights_keys.items())
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        if part is config or "dtype" in part:
            part["dtype"] = dtype
        if own_head and part.get("tie_word_embeddings"):
            part["tie_word_embeddings"] = False
    return config
