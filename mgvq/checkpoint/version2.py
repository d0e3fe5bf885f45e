"""Reading checkpoints of version 2, and of the first ones of 3: their index is `mgvq.json`, and their tensors are the same.

Version 2 has no digests. Neither has a `quantization_config`, so that `mgvq.load` reads them and transformers alone does not.
"""

from pathlib import Path

from mgvq.checkpoint.index import ADVICE, FIRST_SHARD, Index, Packed
from mgvq.checks import told_as
from mgvq.errors import UserError
from mgvq.model.files import read_json


def read_old_index(file: Path) -> tuple[Index, bool]:
    """The index, and whether the folder has digests. Raises UserError, with the file, as `read_index` does."""
    content = read_json(file)
    version = content.get("version")
    if version not in (2, 3):
        raise UserError(f"{file} has version {version}; this mgvq reads versions 2 and 3. A newer mgvq may read it.")
    with told_as(f"{file} does not describe layers", ADVICE):
        layers = {}
        for name, entry in content["layers"].items():
            settings = dict(entry)
            form, roles = str(settings.pop("format")), dict(settings.pop("tensors"))
            layers[name] = Packed(form, settings, roles)
        return Index(str(content["source_dtype"]), (FIRST_SHARD,), layers), version == 3
