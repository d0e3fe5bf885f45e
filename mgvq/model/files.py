"""The files of a model's folder: read so that a damaged one is named, and searched for the one that a library stumbled over."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from safetensors import safe_open

from mgvq.checks import short_words, told_as
from mgvq.errors import UserError

INDEX, OLD_INDEX = "mgvq.index", "mgvq.json"  # what only a packed checkpoint has, and what it had in version 2
SHARDS = "model.safetensors.index.json"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a json file. Raises UserError, with the file's name, where it is missing, damaged or no object."""
    with told_as(f"{file} cannot be read", "Get the file again, from where it came."):
        content = json.loads(file.read_bytes().decode())
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no object but {type(content).__name__}. Get the file again, from where it came.")
    return content


def missing_files(folder: Path) -> list[str]:
    """What a folder in the hub's format lacks: its config.json, or weights that its index of shards names."""
    index = folder / SHARDS
    places = read_json(index).get("weight_map") if index.is_file() else None
    if index.is_file() and not isinstance(places, dict):
        raise UserError(f"{index} has no weight_map, which says where the weights are. Get the file again, from where it came.")
    shards = set(map(str, places.values())) if places else {"model.safetensors"}
    return sorted(name for name in {"config.json", *shards} if not (folder / name).is_file())


@contextmanager
def reading_folder(path: object, folder: Path) -> Iterator[None]:
    """Whatever transformers raises while it reads a model's folder becomes a UserError.

    It names the damaged file where one is found (by reading all of them, which is done only then), else `path` and what was
    raised.
    """
    try:
        with told_as(
            f"{path} cannot be loaded", "The folder must be in the hub's format, whole, and of a version that is known."
        ):
            yield
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and str(cause.filename or "").startswith(HF_HOME):
            raise UserError(f"{HF_HOME} must be writable ({short_words(cause)}): HF_HOME says where that folder is.") from error
        if cause is not None and (found := damaged_file(folder)):
            file, why = found
            raise UserError(f"{file} is damaged ({short_words(why)}). Get the file again, from where it came.") from error
        raise


def damaged_file(folder: Path) -> tuple[Path, Exception] | None:
    """The first file of a model's folder that is not what its name says, and what says so."""
    for file in sorted(folder.iterdir()):
        try:
            if file.suffix == ".json" and not isinstance(found := json.loads(file.read_bytes().decode()), dict):
                raise TypeError(f"it holds no object but {type(found).__name__}")
            if file.suffix in (".jinja", ".txt"):
                file.read_bytes().decode()
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
        except Exception as error:  # whatever it is: the libraries raise all sorts of things
            return file, error
    return None
