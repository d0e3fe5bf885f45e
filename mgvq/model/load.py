"""A model with its processor, from files that are here."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from mgvq.errors import UserError
from mgvq.model.answers import answer_logits
from mgvq.model.encode import Example, encode, image_token_id
from mgvq.model.source import Source
from mgvq.model.stress import inject
from mgvq.model.text import Passage, encode_text, is_text_only
from mgvq.types import Batch


@dataclass(frozen=True)
class Loaded:
    """`stored_dtype` is the width that the source stores its weights in; what is not quantised is stored so again. `code`: the
    Python files of a repository whose own class the model is, which a checkpoint needs too. `processor` is the tokenizer where
    the model reads nothing but text.
    """

    model: PreTrainedModel
    processor: Any
    stored_dtype: torch.dtype
    code: tuple[Path, ...] = ()


def load(source: Source, device: torch.device) -> Loaded:
    """The model in `source.dtype` in evaluation mode, without gradients; the processor pads on the left.

    Answers are greedy, whatever the repository's generation settings say. Raises UserError as `Source.identity`, `check_code`
    and `inject` do, and where teacher forcing or the image mask would be wrong (`_check`).
    """
    source.identity()
    folder = str(source.folder)
    check_code(source)
    where = {"local_files_only": True, "trust_remote_code": source.trust_remote_code}
    attention = {"attn_implementation": source.attention} if source.attention else {}
    config = AutoConfig.from_pretrained(folder, **where)
    model = model_class(config).from_pretrained(folder, dtype=getattr(torch, source.dtype), **attention, **where)
    stored = config.dtype
    assert stored is None or isinstance(stored, torch.dtype)
    model = model.eval().requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]
    _make_greedy(model.generation_config)
    code = tuple(sorted(source.folder.glob("*.py"))) if source.trust_remote_code else ()
    loaded = Loaded(model, load_processor(folder, **where), stored or torch.float32, code)
    _adjust(loaded.processor, source)
    _check(loaded, source.path)
    if source.stress.sigma is not None:
        inject(model, _probe(loaded, "yes"), source.stress)
    return loaded


def check_code(source: Source) -> None:
    """Raises UserError where transformers has no class for the model, unless the repository's own code has one and is trusted."""
    described = json.loads((source.folder / "config.json").read_text())
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


def _make_greedy(settings: GenerationConfig | None) -> None:
    """Sampling, its temperature and penalties come with some repositories; with them no two runs would answer alike."""
    assert settings is not None
    settings.do_sample = False
    for name in ("temperature", "top_p", "top_k", "repetition_penalty", "num_beams"):
        setattr(settings, name, None)


def _adjust(processor: Any, source: Source) -> None:
    """Put in the source's settings. Raises UserError for one that the image processor does not have."""
    for name, value in source.processor.items():
        if not hasattr(processor.image_processor, name):
            raise UserError(
                f"model.processor.{name} has no effect: {type(processor.image_processor).__name__} has "
                f"{', '.join(sorted(processor.image_processor.to_dict()))}."
            )
        setattr(processor.image_processor, name, value)
    if source.chat_template:
        processor.chat_template = Path(source.chat_template).read_text()


def model_class(config: PretrainedConfig) -> Any:
    """The auto class of transformers that makes a model of it."""
    return AutoModelForCausalLM if is_text_only(config) else AutoModelForImageTextToText


def _probe(loaded: Loaded, answer: str) -> Batch:
    """A question with a short answer, as the model reads it."""
    model, processor = loaded.model, loaded.processor
    if is_text_only(model.config):
        probe = encode_text(processor, [Passage("", f"Is it? {answer}")])
    else:
        probe = encode(processor, [Example("", Image.new("RGB", (64, 64), (128, 128, 128)), "Is it ?", answer)])
    return probe.to(model.device)


def _check(loaded: Loaded, path: str) -> None:
    """Model and processor mean the same image token, and no answer token sees later ones (as in a bidirectional prefix)."""
    model, processor = loaded.model, loaded.processor
    expected = getattr(model.config, "image_token_id", None)
    if expected is not None and image_token_id(processor) != expected:
        raise UserError(
            f"{path}: the model puts image features in the places of token {expected}, its processor "
            f"({type(processor).__name__}) marks them by token {image_token_id(processor)}. Processor and config.json do not fit."
        )
    with torch.inference_mode():
        yes, no = (answer_logits(model, _probe(loaded, answer))[0] for answer in ("yes", "no"))
    if (yes - no).abs().max() > 0.05 * yes.std():
        raise UserError(
            f"{path}: {type(model).__name__} predicts the first token of an answer from the whole answer: its tokens see later "
            "ones, so that calibration and teacher-forced scores would be those of a model that is shown what it is asked for."
        )


def load_processor(path: str, **where: Any) -> Any:
    """The processor, set to pad on the left as generation needs it; the tokenizer of a model that reads nothing but text."""
    if is_text_only(AutoConfig.from_pretrained(path, **where)):
        return AutoTokenizer.from_pretrained(path, padding_side="left", **where)
    processor = AutoProcessor.from_pretrained(path, **where)
    processor.tokenizer.padding_side = "left"
    return processor
