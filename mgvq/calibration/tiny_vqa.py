"""Calibration on the project's own visual question answering; pictures and handwriting that no test question uses."""

from dataclasses import dataclass

from PIL import Image

from mgvq.calibration.examples import ExampleSet
from mgvq.data.tiny_vqa.dataset import Picture, draw_pictures
from mgvq.errors import UserError
from mgvq.model.chat import Chat, Turn
from mgvq.model.encode import Example, Sample
from mgvq.rng import entropy

_SHOWN = ("both", "text", "image")


@dataclass(frozen=True, kw_only=True)
class TinyVQA:
    """`num_images` pictures with `questions_per_image` questions each, then `heldout_images` more.

    `shown` leaves out a part of the prompts: `text`, the questions without their pictures, as of a corpus of text; `image`, the
    pictures without questions. The answers stay. `label_seed` draws the answers that are sampled from the model for its Fisher.
    """

    num_images: int
    questions_per_image: int
    heldout_images: int
    shown: str
    seed: int
    label_seed: int

    def __post_init__(self) -> None:
        for name in ("num_images", "questions_per_image", "heldout_images"):
            least = 0 if name == "heldout_images" else 1
            if not (isinstance(value := getattr(self, name), int) and value >= least):
                raise UserError(
                    f"calibration.{name} must be a whole number >= {least}, got {value!r}; an empty set cannot calibrate."
                )
        if self.shown not in _SHOWN:
            raise UserError(f"calibration.shown must be one of {', '.join(_SHOWN)}, got {self.shown!r}")

    @property
    def shows_images(self) -> bool:
        return self.shown != "text"

    def draw(self) -> ExampleSet:
        seed = entropy(self.seed, "calibration")
        pictures = draw_pictures("calibration", seed, self.num_images + self.heldout_images, self.questions_per_image)
        parts = pictures[: self.num_images], pictures[self.num_images :]
        examples, heldout = ([e for p in part for e in self._examples(p)] for part in parts)
        return ExampleSet(examples, heldout, self.label_seed)

    def _examples(self, picture: Picture) -> list[Sample]:
        image = Image.fromarray(picture.pixels)
        samples: list[Sample] = []
        for number, q in enumerate(picture.questions):
            name = f"calibration-{picture.index}-{number}"
            if self.shown == "both":
                samples.append(Example(name, image, q.text, q.answer))
            else:
                asked = Turn("user", (q.text if self.shown == "text" else image,))
                samples.append(Chat(name, (asked, Turn("assistant", (q.answer,)))))
        return samples
