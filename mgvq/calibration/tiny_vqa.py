"""Calibration on the project's own visual question answering; pictures and handwriting that no test question uses."""

from dataclasses import dataclass

from PIL import Image

from mgvq.calibration.examples import ExampleSet
from mgvq.data.tiny_vqa.dataset import Picture, draw_pictures
from mgvq.errors import UserError
from mgvq.model.encode import Example
from mgvq.rng import entropy


@dataclass(frozen=True, kw_only=True)
class TinyVQA:
    """`num_images` pictures with `questions_per_image` questions each, then `heldout_images` more.

    `label_seed` draws the answers that are sampled from the model for its Fisher.
    """

    num_images: int
    questions_per_image: int
    heldout_images: int
    seed: int
    label_seed: int

    def __post_init__(self) -> None:
        for name in ("num_images", "questions_per_image", "heldout_images"):
            least = 0 if name == "heldout_images" else 1
            if not (isinstance(value := getattr(self, name), int) and value >= least):
                raise UserError(
                    f"calibration.{name} must be a whole number >= {least}, got {value!r}; an empty set cannot calibrate."
                )

    def draw(self) -> ExampleSet:
        seed = entropy(self.seed, "calibration")
        pictures = draw_pictures("calibration", seed, self.num_images + self.heldout_images, self.questions_per_image)
        parts = pictures[: self.num_images], pictures[self.num_images :]
        examples, heldout = ([e for p in part for e in _examples(p)] for part in parts)
        return ExampleSet(examples, heldout, self.label_seed)


def _examples(picture: Picture) -> list[Example]:
    image = Image.fromarray(picture.pixels)
    return [
        Example(f"calibration-{picture.index}-{number}", image, q.text, q.answer) for number, q in enumerate(picture.questions)
    ]
