"""A model with its processor, from files that are here."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from mgvq.digest import file_digest
from mgvq.errors import UserError
from mgvq.model.classes import model_class
from mgvq.model.family import Family, declare
from mgvq.model.files import missing_files, read_json, reading_folder
from mgvq.model.health import check_complete, check_finite, check_stored
from mgvq.model.probe import check_predictions, probe
from mgvq.model.processor import adjust, check_processor, load_processor
from mgvq.model.source import Source
from mgvq.model.streamed import StreamedWeights, places_of_blocks, streamed_weights
from mgvq.model.stress import inject
from mgvq.model.terms import licence_of, term_files
from mgvq.model.weights import InModel, Weights

log = logging.getLogger(__name__)
_TOGETHER = 2**24  # numbers that are compared at a time: a copy of a whole embedding is half a gigabyte


@dataclass(frozen=True)
class Described:
    """What is known of a model before its weights are read."""

    config: PretrainedConfig
    processor: Any  # the tokenizer where the model reads nothing but text


@dataclass(frozen=True)
class Loaded:
    """A model that is in memory."""

    model: PreTrainedModel
    processor: Any  # the tokenizer where the model reads nothing but text
    stored_dtype: torch.dtype  # in which the source stores its weights; what is not quantised is stored so again
    code: tuple[Path, ...] = ()  # the Python files of a repository whose own class the model is; a checkpoint needs them too
    terms: tuple[Path, ...] = ()  # the files that say how the source may be used, which go with what is made of it
    licence: str | None = None  # the name of the source's licence, where its model card says it
    streamed: StreamedWeights | None = None  # what reads the blocks, where they are not in memory

    @property
    def weights(self) -> Weights:
        """Where the weights of its layers are."""
        return self.streamed or InModel(self.model)

    def numbers(self, name: str, tensor: Tensor) -> Tensor:
        """The parameter or buffer of that name, read from the files where `tensor` is on the `meta` device."""
        return self.streamed.read(name) if self.streamed is not None and tensor.is_meta else tensor


def as_stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the dtype that the source's config names, if no number changes by that: a few may be wider there."""
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    narrow = tensor.to(dtype)
    runs = zip(narrow.flatten().split(_TOGETHER), tensor.flatten().split(_TOGETHER), strict=True)
    return narrow if all(torch.equal(few.to(tensor.dtype), own) for few, own in runs) else tensor


def describe(source: Source) -> Described:
    """Config and processor, with the source's settings in them; quick, so that bad input is refused before weights are read.

    Raises UserError as `Source.identity`, `check_code` and `check_processor` do, and for a source that is quantised already.
    """
    source.identity()
    folder = source.folder
    missing = missing_files(folder)
    if missing and not (missing == ["model.safetensors"] and any(folder.glob("*.bin"))):
        raise UserError(f"{source.path} is incomplete: {', '.join(missing[:3])} missing. Get the files again.")
    _check_unquantised(source, read_json(folder / "config.json"))
    check_stored(source.path, folder)
    check_code(source)
    if source.trust_remote_code and (code := sorted(folder.glob("*.py"))):
        named = ", ".join(f"{file.name} (SHA-256 {file_digest(file)[:16]})" for file in code)
        log.warning("model.trust_remote_code=true: Python code of %s may be run: %s", folder, named)
    where = {"local_files_only": True, "trust_remote_code": source.trust_remote_code}
    with reading_folder(source.path, folder):
        config = AutoConfig.from_pretrained(str(folder), **where)
    processor = load_processor(str(folder), **where)
    adjust(processor, config, source)
    declare(config, Family(**source.family))
    check_processor(processor, config, source)
    return Described(config, processor)


def load(source: Source, device: torch.device, described: Described | None = None, *, streamed: bool = False) -> Loaded:
    """The model in `source.dtype` in evaluation mode, without gradients; the processor pads on the left.

    `described` saves reading config and processor twice. `streamed`: the blocks stay in the files and are read when they run
    (`mgvq.model.streamed`); the numbers are the same. Raises UserError as `describe` does, for weights that are missing,
    unexpected, of another shape, NaN or infinite, for answers that teacher forcing would score wrongly, and as `inject` does.
    """
    known = described or describe(source)
    folder = source.folder
    settings: dict[str, Any] = {"attn_implementation": source.attention} if source.attention else {}
    where = {"local_files_only": True, "trust_remote_code": source.trust_remote_code}
    blocks: list[str] = []
    if streamed:
        _check_streamed(source)
        blocks, settings["device_map"] = places_of_blocks(_empty(source, known.config), device)
    with reading_folder(source.path, folder), _without_warnings():
        model, info = model_class(known.config).from_pretrained(
            str(folder),
            config=known.config,
            dtype=getattr(torch, source.dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **settings,
            **where,
        )
    check_complete(source.path, info)
    weights = streamed_weights(model, blocks, device) if streamed else None
    check_finite(model, source.path, folder, read=weights.read if weights else None)
    stored = stored_dtype(known.config, model)
    model = model.eval().requires_grad_(False)
    if not streamed:
        model.to(device)  # type: ignore[arg-type]
    give_tokens(model, known.processor)
    code = tuple(sorted(folder.glob("*.py"))) if source.trust_remote_code else ()
    check_predictions(model, known.processor, source.path)
    if source.stress.sigma is not None:
        inject(model, probe(model, known.processor), source.stress)
    return Loaded(model, known.processor, stored, code, term_files(folder), licence_of(folder), weights)


def _check_streamed(source: Source) -> None:
    if source.stress.sigma is not None:
        raise UserError(
            "memory=streamed reads weights from files as they are, and model.stress changes them: set memory=resident."
        )
    if not any(source.folder.glob("*.safetensors")):
        raise UserError(
            f"memory=streamed reads single weights, which {source.folder} has in .bin files that can only be read whole: convert "
            "them to safetensors, or set memory=resident."
        )


def _empty(source: Source, config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(config).from_config(copy.deepcopy(config), trust_remote_code=source.trust_remote_code)


def check_code(source: Source) -> None:
    """Raises UserError where transformers has no class for the model, unless the repository's own code has one and is trusted."""
    described = read_json(source.folder / "config.json")
    kind, code = described.get("model_type"), described.get("auto_map", {})
    if kind in CONFIG_MAPPING:
        return
    known = f"{source.path}: transformers {transformers.__version__} has no class for model_type {kind!r}"
    if code and not source.trust_remote_code:
        known += (
            f". The repository has code for it ({', '.join(sorted(code.values()))}), of which nothing is run unless you have "
            "read it and say model.trust_remote_code=true."
        )
    elif code and "AutoModelForImageTextToText" not in code:
        known += f", and the repository's own code offers {', '.join(sorted(code))}, but no AutoModelForImageTextToText."
    elif code:
        return
    raise UserError(known + (f" What to do:\n{source.setup}" if source.setup else ""))


def _check_unquantised(source: Source, described: dict[str, Any]) -> None:
    parts = [described, *(part for part in described.values() if isinstance(part, dict))]
    if how := next((part["quantization_config"] for part in parts if part.get("quantization_config")), None):
        method = how.get("quant_method", "an unnamed method") if isinstance(how, dict) else how
        raise UserError(
            f"{source.path} is quantised already ({method}, says quantization_config in its config.json): give the model that "
            "it was made of, in 16 or 32 bits."
        )


def stored_dtype(config: PretrainedConfig, model: PreTrainedModel) -> torch.dtype:
    """The dtype that config.json says the weights have, in its own part or in that of the language model; else the model's."""
    for part in (config, config.get_text_config(decoder=True)):
        if isinstance(part.dtype, torch.dtype):
            return part.dtype
    return model.dtype


def give_tokens(model: PreTrainedModel, processor: Any) -> None:
    """Where the generation settings name no end or pad token, they are those of the tokenizer; all else stays as it comes."""
    settings, tokenizer = model.generation_config, getattr(processor, "tokenizer", processor)
    if settings is None:
        return
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(settings, name) is None:
            setattr(settings, name, getattr(tokenizer, name))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Inside, transformers prints no report of missing weights (it is told as one error), and accelerate none of those that stay
    on disk."""
    before, other = transformers.utils.logging.get_verbosity(), logging.getLogger("accelerate")
    level = other.level
    transformers.utils.logging.set_verbosity_error()
    other.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following device_map keys do not match", UserWarning)  # they are parameters
            yield
    finally:
        transformers.utils.logging.set_verbosity(before)
        other.setLevel(level)
