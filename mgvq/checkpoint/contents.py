"""What a checkpoint's folder holds, before any weight is read: index, shards and their headers, held against each other.

Everything here is refused by the name of the file: a shard that is damaged or is a link out of the folder, a layer whose tensors
are not what its format and settings say, a tensor that belongs to nobody.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mgvq.checkpoint.digests import check_digests
from mgvq.checkpoint.index import ADVICE, Index, read_index
from mgvq.checkpoint.version2 import read_old_index
from mgvq.checks import told_as
from mgvq.errors import UserError
from mgvq.formats.outliers import REST_FORMATS, OutlierWeight
from mgvq.model.files import INDEX, OLD_INDEX

FORMATS = {**REST_FORMATS, OutlierWeight.format: OutlierWeight}
# By their names in the header of a safetensors file.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
          "BOOL": torch.bool}  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """A checkpoint whose parts fit each other."""

    folder: Path
    """Where it lies."""
    index: Index
    """Which layers are packed."""
    headers: Mapping[str, Tensor]
    """Every stored tensor on the `meta` device: its size and dtype, and no numbers."""
    shard: Mapping[str, Path]
    """The file of every stored tensor."""

    @property
    def shards(self) -> Sequence[Path]:
        return [self.folder / name for name in self.index.shards]

    @property
    def index_file(self) -> Path:
        return self.folder / (INDEX if (self.folder / INDEX).exists() else OLD_INDEX)

    def plain(self) -> list[str]:
        """The tensors that are stored as they are, whose names are those of the model's parameters and buffers."""
        packed = {name for layer in self.index.layers.values() for name in layer.tensors.values()}
        return [name for name in self.headers if name not in packed]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Read all tensors, one after the other. Raises UserError, with the file, for one that cannot be read."""
        for file in self.shards:
            with told_as(f"{file} cannot be read", ADVICE), safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (no dictionary)
                    yield name, stored.get_tensor(name)


def open_checkpoint(folder: Path, *, verify: bool = True, weights: bool = True) -> Contents:
    """Read index and headers. `verify`: all files are held against their digests; without `weights` the shards are left out.

    Raises UserError, with the file, where the folder is no checkpoint, is damaged, altered, or of another version.
    """
    if not any((folder / name).exists() for name in (INDEX, OLD_INDEX)):
        raise UserError(f"{folder} is no mgvq checkpoint: it needs {INDEX}; a run keeps it in RUN/checkpoint.")
    for file in sorted(folder.iterdir()):
        if not file.is_dir() or file.is_symlink():
            check_place(folder, file.name)
    has_digests = True
    if (folder / INDEX).exists():
        index = read_index(folder / INDEX)
    else:
        index, has_digests = read_old_index(folder / OLD_INDEX)
    for name in index.shards:
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise UserError(f"{folder / INDEX} names {name!r}, which is no file of weights beside it. {ADVICE}")
    if verify and has_digests:
        check_digests(folder, leave_out=() if weights else index.shards)
    return _with_headers(folder, index) if weights else Contents(folder, index, {}, {})


def _with_headers(folder: Path, index: Index) -> Contents:
    headers: dict[str, Tensor] = {}
    shard: dict[str, Path] = {}
    for name in index.shards:
        file = folder / name
        with told_as(f"{file} cannot be read", ADVICE), safe_open(file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (no dictionary)
                part = stored.get_slice(key)
                if key in headers:
                    raise UserError(f"{file} has {key}, which {shard[key].name} has too. {ADVICE}")
                headers[key] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
                shard[key] = file
    contents = Contents(folder, index, headers, shard)
    own = {f"{name}.{role}" for name, layer in index.layers.items() for role in layer.tensors}
    for name, layer in index.layers.items():
        if strange := sorted(set(layer.tensors.values()) - own):
            raise UserError(f"{contents.index_file}: {', '.join(strange)} of layer {name} belongs to no packed layer. {ADVICE}")
        if lacking := sorted(set(layer.tensors.values()) - set(headers)):
            raise UserError(f"{_files(contents)} lacks {', '.join(lacking)} of layer {name}. {ADVICE}")
        check_layer(contents, name, {role: headers[key] for role, key in layer.tensors.items()})
    return contents


def check_layer(contents: Contents, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Hold a layer's tensors against its format and settings: sizes and dtypes; indices too, unless they are on `meta`.

    Raises UserError, with the files and the layer.
    """
    layer = contents.index.layers[name]
    if layer.format not in FORMATS:
        raise UserError(
            f"{contents.index_file}: layer {name} has the format {layer.format!r}; this mgvq reads {', '.join(FORMATS)}."
        )
    with told_as(f"{contents.index_file} and {_files(contents)} do not fit each other: layer {name}", ADVICE):
        FORMATS[layer.format].check(tensors, **layer.settings)


def check_place(folder: Path, name: str) -> None:
    """Raises UserError unless the file lies in the folder itself, or is a link into the blobs of the hub's cache."""
    file = folder / name
    if file.is_symlink() and file.resolve().parent not in (folder.resolve(), folder.resolve().parent.parent / "blobs"):
        raise UserError(f"{file} is a link to {file.resolve()}, outside of the checkpoint. {ADVICE}")
    if not file.is_file():
        raise UserError(f"{file} is missing, or no plain file. {ADVICE}")


def _files(contents: Contents) -> str:
    return f"{contents.folder}/{', '.join(contents.index.shards)}"
