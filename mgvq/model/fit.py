"""Whether samples are what a model can take: looked at with its processor, before its weights are read."""

from collections.abc import Iterable, Sequence
from typing import Any

from PIL.Image import Image

from mgvq.checks import told_as
from mgvq.errors import UserError
from mgvq.model.chat import begins_itself
from mgvq.model.classes import num_positions
from mgvq.model.encode import Sample
from mgvq.model.load import Described
from mgvq.model.text import Passage
from mgvq.model.windows import Windows


def check_samples(described: Described, samples: Iterable[Sample | Passage | Windows]) -> None:
    """Raises UserError, with the sample, for the first one that the model cannot take.

    That is one whose texts the chat template refuses or that hold a special token, whose images the processor refuses (for their
    aspect ratio, say), and one of more tokens than the model has positions. Images of equal sizes are processed once.
    """
    processor, limit = described.processor, num_positions(described.config)
    added: dict[tuple[tuple[int, int], ...], int] = {}
    for sample in samples:
        if isinstance(sample, Windows):
            if limit is not None and sample.length > limit:
                raise UserError(
                    f"{sample.group}.window={sample.length}, and the model was made for {limit} positions "
                    "(max_position_embeddings in its config.json). Give a shorter window."
                )
            sample.cut(processor)  # raises for too little text
            continue
        if isinstance(sample, Passage):
            length = len(getattr(processor, "tokenizer", processor)(sample.text).input_ids)
        else:
            text = sample.render(processor).text
            sizes = tuple(image.size for image in sample.images)
            if sizes not in added:
                added[sizes] = _tokens_of_images(processor, sample.sample_id, text, sample.images)
            length = len(processor.tokenizer(text, **begins_itself(processor, text)).input_ids) + added[sizes]
        if limit is not None and length > limit:
            raise UserError(
                f"{sample.sample_id}: the sample has {length} tokens, and the model was made for {limit} positions "
                "(max_position_embeddings in its config.json). Shorten it or take it out."
            )


def _tokens_of_images(processor: Any, sample_id: str, text: str, images: Sequence[Image]) -> int:
    """How many tokens the images of a sample add to its text."""
    if not images:
        return 0
    sizes = ", ".join(f"{width} x {height}" for width, height in (image.size for image in images))
    with told_as(
        f"{sample_id}: {type(processor).__name__} refuses its images of {sizes} pixels", "Take the sample out, or other images."
    ):
        inputs = processor(images=[list(images)], text=[text], return_tensors="pt", **begins_itself(processor, text))
    return inputs["input_ids"].shape[1] - len(processor.tokenizer(text, **begins_itself(processor, text)).input_ids)
