"""A short question as a probe of a model: whether it can be calibrated and scored on given answers at all."""

from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from mgvq.checks import told_as
from mgvq.errors import UserError
from mgvq.model.answers import answer_logits
from mgvq.model.classes import is_text_only
from mgvq.model.encode import Example, encode
from mgvq.model.health import first_non_finite, is_finite
from mgvq.model.text import Passage, encode_text
from mgvq.types import Batch


def probe(model: PreTrainedModel, processor: Any, answer: str = "yes") -> Batch:
    """A question about a grey image with a short answer (a sentence for a model of text alone), on the model's device."""
    if is_text_only(model.config):
        batch = encode_text(processor, [Passage("probe", f"Is it? {answer}")])
    else:
        batch = encode(processor, [Example("probe", Image.new("RGB", (64, 64), (128, 128, 128)), "Is it ?", answer)])
    return batch.to(model.device)


def check_predictions(model: PreTrainedModel, processor: Any, path: str) -> None:
    """Raises UserError for a model whose answer tokens see later ones (as in a bidirectional prefix): it is shown what it is
    asked.

    So it does where its logits are not finite, with the layer where that begins: floating-point numbers of 16 bits overflow
    there.
    """
    advice = "Correct its processor_config.json, or set model.processor.NAME=VALUE."
    with told_as(f"{path}: its processor can do nothing with a grey image of 64 x 64 pixels", advice):
        yes, no = (probe(model, processor, answer) for answer in ("yes", "no"))
    if bad := sorted(name for name, tensor in yes.inputs.items() if not is_finite(tensor)):
        raise UserError(f"{path}: its processor makes {', '.join(bad)} of NaN or infinity of a grey image. {advice}")
    with torch.inference_mode():
        logits = [answer_logits(model, batch)[0] for batch in (yes, no)]
        if not all(torch.isfinite(found).all() for found in logits):
            layer = first_non_finite(model, lambda: answer_logits(model, yes))
            raise UserError(
                f"{path}: the model's answers are NaN or infinite in {model.dtype}, from {layer or 'its head'} on, though its "
                "weights are finite. Set model.dtype=float32 (or bfloat16), which has room for larger numbers."
            )
    first, second = logits
    if (first - second).abs().max() > 0.05 * first.std():
        raise UserError(
            f"{path}: {type(model).__name__} predicts the first token of an answer from the whole answer: its tokens see later "
            "ones, so that calibration and teacher-forced scores would be those of a model that is shown what it is asked for."
        )
