"""The index of a checkpoint, `mgvq.index`: which layers are packed, in what format, and which stored tensors are theirs.

Byte by byte in docs/reference/checkpoint.md. Layers of one format, shape and settings share a *kind*; names are told by what
they have in common with the name before.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgvq.checks import told_as
from mgvq.errors import UserError

MAGIC, VERSION = b"MGVQ", 3
FIRST_SHARD = "mgvq.safetensors"
ADVICE = "The checkpoint is damaged: take the run's own copy, or make it again."


@dataclass(frozen=True)
class Packed:
    """A layer, embedding or head that is stored packed."""

    format: str
    """A key of `mgvq.checkpoint.contents.FORMATS`."""
    settings: Mapping[str, Any]
    """What the format needs beside the tensors."""
    tensors: Mapping[str, str]
    """The stored tensor of each role; layers that share a table name the same one."""


@dataclass(frozen=True)
class Index:
    """What `mgvq.index` says."""

    source_dtype: str
    """In which dtype the source stores its weights, as torch names it: that of what is not packed."""
    shards: Sequence[str]
    """The files that hold the tensors."""
    layers: Mapping[str, Packed]
    """The packed weights by the names of their modules."""


def to_bytes(index: Index) -> bytes:
    """The content of the file; equal for equal indices, in whatever order the layers come."""
    layers = sorted(index.layers.items())
    shared = sorted({t for name, layer in layers for role, t in layer.tensors.items() if t != f"{name}.{role}"})
    texts = [_kind(layer) for _, layer in layers]
    kinds = sorted(set(texts))
    out = bytearray(MAGIC + VERSION.to_bytes(4, "little"))
    out += _names([index.source_dtype]) + _names(index.shards) + _names(shared) + _names(kinds) + _names([n for n, _ in layers])
    numbers, places = {kind: at for at, kind in enumerate(kinds)}, {name: at + 1 for at, name in enumerate(shared)}
    for (_, layer), text in zip(layers, texts, strict=True):
        out += _number(numbers[text])
        for role in sorted(layer.tensors):
            out += _number(places.get(layer.tensors[role], 0))
    return bytes(out)


def read_index(file: Path) -> Index:
    """Read `mgvq.index`. Raises UserError, with the file, where it is damaged, or of a version that is not known."""
    with told_as(f"{file} cannot be read", ADVICE):
        content = file.read_bytes()
        if content[:4] != MAGIC or len(content) < 8:
            raise ValueError(f"it begins with {content[:4]!r} instead of {MAGIC!r} and a version")
    version = int.from_bytes(content[4:8], "little")
    if version != VERSION:
        raise UserError(f"{file} has version {version}; this mgvq reads versions 2 and {VERSION}. A newer mgvq may read it.")
    with told_as(f"{file} does not describe layers", ADVICE):
        return _parse(content)


def _parse(content: bytes) -> Index:
    reader = _Reader(content, 8)
    ((source_dtype,), shards, shared, kinds, names) = (reader.names() for _ in range(5))
    described = [json.loads(kind) for kind in kinds]
    layers = {}
    for name in names:
        kind = dict(described[reader.number()])
        roles, form = kind.pop("tensors"), str(kind.pop("format"))
        places = {role: reader.number() for role in roles}
        tensors = {role: shared[at - 1] if at else f"{name}.{role}" for role, at in places.items()}
        layers[name] = Packed(form, kind, tensors)
    if reader.at != len(content):
        raise ValueError(f"{len(content) - reader.at} bytes too many")
    if len(layers) != len(names):
        raise ValueError("a layer is there twice")
    return Index(source_dtype, shards, layers)


def _kind(layer: Packed) -> str:
    described = {**layer.settings, "format": layer.format, "tensors": sorted(layer.tensors)}
    return json.dumps(described, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _number(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit of a byte says that another follows."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _names(names: Sequence[str]) -> bytes:
    """How many there are; of each the bytes it shares with the one before, the number of the others, and these."""
    out, before = bytearray(_number(len(names))), b""
    for name in map(str.encode, names):
        same = next((at for at, (a, b) in enumerate(zip(before, name, strict=False)) if a != b), min(len(before), len(name)))
        out += _number(same) + _number(len(name) - same) + name[same:]
        before = name
    return bytes(out)


class _Reader:
    """Reads what `_number` and `_names` write. Raises ValueError and IndexError for what they would not have written."""

    def __init__(self, content: bytes, at: int) -> None:
        self.content, self.at = content, at

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.content[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 28:
                raise ValueError("a number is too large")

    def names(self) -> list[str]:
        names, before, total = [], b"", 0
        for _ in range(self.number()):
            same, rest = self.number(), self.number()
            if same > len(before) or self.at + rest > len(self.content):
                raise ValueError("a name goes beyond the end")
            before = before[:same] + self.content[self.at : self.at + rest]
            self.at += rest
            names.append(before.decode())
            if (total := total + len(before)) > 64 * len(self.content) + 2**20:
                raise ValueError("the names are longer than any index has them")
        return names
