"""Calibration on the project's own visual question answering; images and handwriting that no test question uses."""

from dataclasses import dataclass

from PIL import Image

from mgvq.calibration.examples import ExampleSet, check_gram_samples
from mgvq.checks import whole_number
from mgvq.data.tiny_vqa.dataset import MOST_QUESTIONS, DrawnImage, draw_images
from mgvq.errors import UserError
from mgvq.model.chat import Chat, Turn
from mgvq.model.encode import Example, Sample
from mgvq.rng import entropy

_SHOWN = ("both", "text", "image")


@dataclass(frozen=True, kw_only=True)
class TinyVQA:
    """Images of the tiny VQA with their questions."""

    num_images: int  # images for the statistics
    questions_per_image: int
    heldout_images: int  # images that choose the gradient step, drawn after the others
    shown: str  # both | text: questions without their images, as in a corpus of text | image: images without questions
    seed: int  # draws images and questions
    label_seed: int  # draws the answers that are sampled from the model for its Fisher
    gram_samples: int | None = None  # images for the Gram, num_images among them, the others drawn last; None: num_images

    def __post_init__(self) -> None:
        for name, least in (("num_images", 1), ("questions_per_image", 1), ("heldout_images", 0)):
            whole_number(f"calibration.{name}", getattr(self, name), least=least, most=MOST_QUESTIONS)
        for name in ("seed", "label_seed"):
            whole_number(f"calibration.{name}", getattr(self, name))
        check_gram_samples(self.gram_samples, "num_images", self.num_images)
        if (number := self._num_drawn * self.questions_per_image) > MOST_QUESTIONS:
            first = "num_images" if self.gram_samples is None else "gram_samples"
            raise UserError(
                f"calibration asks {number:,} questions ({first} and heldout_images times questions_per_image); at most "
                f"{MOST_QUESTIONS:,} fit into memory. Lower one of them."
            )
        if self.shown not in _SHOWN:
            raise UserError(f"calibration.shown must be one of {', '.join(_SHOWN)}, got {self.shown!r}")

    @property
    def shows_images(self) -> bool:
        return self.shown != "text"

    def draw(self) -> ExampleSet:
        seed = entropy(self.seed, "calibration")
        images = draw_images("calibration", seed, self._num_drawn, self.questions_per_image)
        first = self.num_images + self.heldout_images
        parts = images[: self.num_images], images[self.num_images : first], images[first:]
        examples, heldout, further = ([e for drawn in part for e in self._examples(drawn)] for part in parts)
        return ExampleSet(examples, heldout, self.label_seed, gram_examples=further)

    @property
    def _num_drawn(self) -> int:
        return (self.gram_samples or self.num_images) + self.heldout_images

    def _examples(self, drawn: DrawnImage) -> list[Sample]:
        image = Image.fromarray(drawn.pixels)
        samples: list[Sample] = []
        for number, q in enumerate(drawn.questions):
            name = f"calibration-{drawn.index}-{number}"
            if self.shown == "both":
                samples.append(Example(name, image, q.text, q.answer))
            else:
                asked = Turn("user", (q.text if self.shown == "text" else image,))
                samples.append(Chat(name, (asked, Turn("assistant", (q.answer,)))))
        return samples
