"""The processor of a model: loading it, the settings in place of the repository's, and the tokens that no run can do without."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PretrainedConfig

from mgvq.checks import told_as
from mgvq.errors import UserError
from mgvq.model.chat import Turn, write_chat
from mgvq.model.classes import is_text_only
from mgvq.model.encode import chat_prompt, image_token_id
from mgvq.model.files import read_json, reading_folder
from mgvq.model.source import Source


def load_processor(path: str, **where: Any) -> Any:
    """The processor, set to pad on the left as generation needs it; the tokenizer of a model that reads nothing but text.

    `where` goes to transformers: local_files_only, trust_remote_code. Raises UserError, with the file, for one that cannot be
    read.
    """
    folder = Path(path)
    with reading_folder(path, folder):
        config = AutoConfig.from_pretrained(path, **where)
        if is_text_only(config):
            return AutoTokenizer.from_pretrained(path, padding_side="left", **where)
        processor = AutoProcessor.from_pretrained(path, **where)
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise UserError(f"{path}: it loads as {type(processor).__name__}, which lacks a tokenizer or an image processor.")
    processor.tokenizer.padding_side = "left"
    _note_end(processor, config, _generation(folder))
    return processor


def prepared(processor: Any, config: PretrainedConfig, generation: Mapping[str, Any]) -> Any:
    """A copy of a processor that was loaded elsewhere, set as `load_processor` sets it; `generation` are the model's settings."""
    processor = copy.deepcopy(processor)
    getattr(processor, "tokenizer", processor).padding_side = "left"
    if not is_text_only(config):
        _note_end(processor, config, generation)
    return processor


def adjust(processor: Any, config: PretrainedConfig, source: Source) -> None:
    """Put in the source's settings; what the model's config says of the same thing (tiles) is set too.

    Raises UserError for a setting of the image processor that it does not have, a token that the tokenizer does not have, and a
    chat template that cannot be read.
    """
    images = getattr(processor, "image_processor", None)
    for name, value in source.processor.items():
        if images is None or not hasattr(images, name):
            known = (
                f"{type(images).__name__} has {', '.join(sorted(images.to_dict()))}" if images else "it reads nothing but text"
            )
            raise UserError(f"model.processor.{name} has no effect: {known}.")
        with told_as(f"model.processor.{name}={value!r} is refused by {type(images).__name__}", "Give a value of the same form."):
            setattr(images, name, value)
        if hasattr(config, name):
            setattr(config, name, value)
    tokenizer = getattr(processor, "tokenizer", processor)
    for setting, role in (("end_token", "eos_token"), ("pad_token", "pad_token")):
        if (token := getattr(source, setting)) is not None:
            if token not in tokenizer.get_vocab():
                raise UserError(f"model.{setting}={token!r} is no token of {type(tokenizer).__name__}; give one that is.")
            setattr(tokenizer, role, token)
    if source.chat_template:
        with told_as(f"model.chat_template={source.chat_template} cannot be read", "Give a jinja file in UTF-8."):
            processor.chat_template = Path(source.chat_template).read_bytes().decode()
    if source.end_token or source.chat_template:
        _note_end(processor, config, _generation(source.folder))


def check_processor(processor: Any, config: PretrainedConfig, source: Source) -> None:
    """Raises UserError, with the setting that gives it, where a token or the chat template that a run needs is missing.

    So it does where the tiles that the processor cuts are not those that the model puts together again, and where the two mean
    different image tokens.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    named = f"{source.path}: its tokenizer ({type(tokenizer).__name__})"
    if tokenizer.pad_token is None:
        raise UserError(
            f"{named} has no pad token, and rows of a batch are filled up with it: set "
            f"model.pad_token=TOKEN{_hint(config, tokenizer)}."
        )
    if is_text_only(config):
        return
    if tokenizer.eos_token is None:
        raise UserError(
            f"{named} has no end token, and an answer ends with it: set model.end_token=TOKEN{_hint(config, tokenizer)}."
        )
    if not processor.chat_template:
        raise UserError(
            f"{source.path}: its processor ({type(processor).__name__}) has no chat template, and questions are asked in one: "
            "set model.chat_template=FILE, the .jinja file that the model was trained with."
        )
    chat_prompt(processor, "Is it ?")  # raises where the template is no jinja, or does not take messages
    expected = getattr(config, "image_token_id", None)
    if expected is not None and image_token_id(processor) != expected:
        raise UserError(
            f"{source.path}: the model puts image features in the places of token {expected}, its processor "
            f"({type(processor).__name__}) marks them by token {image_token_id(processor)}. Processor and config.json do not fit."
        )
    cut, joined = (getattr(part, "image_grid_pinpoints", None) for part in (processor.image_processor, config))
    if cut is not None and joined is not None and sorted(map(list, cut)) != sorted(map(list, joined)):
        raise UserError(
            f"{source.path}: its processor cuts images into the tiles image_grid_pinpoints={_short(cut)}, its config.json has "
            f"{_short(joined)}: there would be other numbers of tokens than of features. Set both, or leave both to "
            "model.processor.image_grid_pinpoints=[[HEIGHT,WIDTH],..], which sets both."
        )


def end_tokens(config: PretrainedConfig, generation: Mapping[str, Any]) -> list[int]:
    """The tokens at which the model stops, by its generation settings, else by its config: none where neither names one."""
    for found in (generation.get("eos_token_id"), getattr(config.get_text_config(decoder=True), "eos_token_id", None)):
        if found is not None:
            return list(found) if isinstance(found, list | tuple) else [found]
    return []


def _generation(folder: Path) -> Mapping[str, Any]:
    file = folder / "generation_config.json"
    return read_json(file) if file.is_file() else {}


def _note_end(processor: Any, config: PretrainedConfig, generation: Mapping[str, Any]) -> None:
    """Find out which of several end tokens the chat template writes behind an answer; `chat.end_token` tells it from then on."""
    tokenizer = processor.tokenizer
    ids = end_tokens(config, generation)
    ends = {token for token in map(tokenizer.convert_ids_to_tokens, ids) if token} | {tokenizer.eos_token} - {None}
    tokenizer.end_of_answer = tokenizer.eos_token
    if len(ends) > 1 and processor.chat_template:
        mark = "mgvq"
        try:
            chat = [Turn("user", ("Is it ?",)).message(), Turn("assistant", (mark,)).message()]
            behind = write_chat(processor, chat, "").rpartition(mark)[2].strip()
        except UserError:  # told when a sample is written
            return
        tokenizer.end_of_answer = next(
            (e for e in sorted(ends, key=len, reverse=True) if behind.startswith(e)), tokenizer.eos_token
        )


def _hint(config: PretrainedConfig, tokenizer: Any) -> str:
    """What to give for a missing token, where the model's config names one."""
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(config.get_text_config(decoder=True), name, None)
        token = tokenizer.convert_ids_to_tokens(found) if isinstance(found, int) else None
        if token:
            return f", such as {token!r} (its config.json has {name} {found})"
    known = ", ".join(map(repr, tokenizer.all_special_tokens[:5]))
    return f"; its special tokens are {known}" if known else ""


def _short(tiles: Iterable[Any]) -> str:
    text = str([list(tile) for tile in tiles])
    return text if len(text) <= 60 else f"{text[:57]}..."
