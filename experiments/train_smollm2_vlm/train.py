"""Train projector and adapters of smollm2_vlm: every draw seeded, resumable from its last checkpoint, one thread.

    python experiments/train_smollm2_vlm/train.py --language FOLDER --out RUN
    python experiments/train_smollm2_vlm/train.py --language FOLDER --out RUN2 --start RUN/adapters.safetensors --at 900 --steps N

The second goes on from what a finished run has exported, with a fresh optimizer, at the step after its last one.
FOLDER is SmolLM2 unpacked (`results/cache/models/SHA256` after any run of model=smollm2). The vision tower is tiny_internvl's and
stays as it is. First the projector alone learns the words of the cells (projector.py); then projector and adapters learn the
questions, every image described in full among them in the first part, and at every fourth step the text of a docstring, on which
the adapted model is held to the predictions of the model without adapters (KL). The rate is constant and falls at the end.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from language import SCALE, Language
from packing import IGNORE, Packed, Packer, hits
from projector import Words, first_look
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from mgvq.data.english import docstrings
from mgvq.data.tiny_vqa.dataset import DrawnImage, draw_image, draw_test
from mgvq.data.tiny_vqa.questions import HEADLINE, TRAINING_MIX, Question, ask
from mgvq.model.grafted import ADAPTERS, config, processor
from mgvq.model.source import SHIPPED

TOWER = "tiny_internvl"
MIX = TRAINING_MIX | {"count": 3.0, "cmp_count": 1.5, "where": 1.5, "list_row": 0.8, "list_all": 0.5, "relation": 0.4}


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on, beside the code."""

    seed: int = 0
    images: int = 4000  # that the projector first looks at
    epochs: int = 16  # of that
    steps: int = 900
    decay: int = 300  # steps at the end in which the rate falls to nothing
    caption_until: int = 200  # steps in which every image is described in full
    rows: int = 2  # images a step
    row_tokens: int = 192  # filled with questions
    rate: float = 1e-3  # of the adapters
    projector_rate: float = 3e-4
    warmup: int = 20
    text_every: int = 4  # steps
    text_tokens: int = 96
    first_step: int = 0  # the steps before it are another run's


class Trainer:
    """The model and what its training needs."""

    def __init__(self, language: Path, recipe: Recipe, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.processor = processor(language, SHIPPED / TOWER)
        self.tokenizer = self.processor.tokenizer
        self.packer = Packer(self.processor)
        self.image_token: int = self.processor.image_token_id
        self.language = Language(AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32), recipe.seed)
        tower = AutoModelForImageTextToText.from_pretrained(SHIPPED / TOWER, dtype=torch.bfloat16)  # as it will be stored
        self.tower = tower.float().model.eval()
        torch.manual_seed(recipe.seed)
        self.projector = InternVLMultiModalProjector(config(language, SHIPPED / TOWER))
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [*self.language.adapters.values()], "peak": recipe.rate},
                {"params": [*self.projector.parameters()], "peak": recipe.projector_rate},
            ],
            betas=(0.9, 0.98),
            weight_decay=0.0,
        )
        self.texts = list(docstrings().passages.items())
        self.step = recipe.first_step

    @torch.no_grad()
    def features(self, images: list[DrawnImage]) -> Tensor:
        """(b, 16, 512): what the shipped tower makes of each cell, before any projector."""
        pixels = torch.from_numpy(np.stack([p.pixels for p in images])).permute(0, 3, 1, 2) / 127.5 - 1
        patches = self.tower.vision_tower(pixels).last_hidden_state[:, 1:].unflatten(1, (8, 8))
        return self.tower.pixel_shuffle(patches, scale_factor=0.5).flatten(1, 2)

    def look(self) -> None:
        """The projector's first look."""
        recipe = self.recipe
        images = [draw_image("train", recipe.seed + 1, i, 1) for i in range(recipe.images)]
        features = torch.cat([self.features(images[at : at + 100]) for at in range(0, len(images), 100)])
        words = Words(self.tokenizer, self.language.embedding)
        course = first_look(self.projector, features, [p.scene for p in images], words, recipe.epochs, 2e-3, recipe.seed)
        self.note(
            {"first_look": [[round(share, 4) for share in epoch] for epoch in course[:: max(1, len(course) // 4)] + course[-1:]]}
        )

    def note(self, row: dict[str, object]) -> None:
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")

    def embedded(self, packed: Packed, images: list[DrawnImage]) -> Tensor:
        """The embeddings of a batch, with the images in their places."""
        embeds = self.language.embedding[packed.ids]
        shown = self.projector(self.features(images))
        return embeds.masked_scatter((packed.ids == self.image_token)[..., None], shown)

    def answer_logits(self, packed: Packed, images: list[DrawnImage]) -> Tensor:
        """Logits at the answer positions only: (answers, vocabulary)."""
        hidden = self.language(self.embedded(packed, images), packed.positions, packed.mask)
        return self.language.logits(hidden[packed.labels != IGNORE])

    def images(self, step: int) -> list[DrawnImage]:
        """Fresh images at every step; in the first part the first question describes the whole scene."""
        drawn = []
        for index in range(step * 8, step * 8 + self.recipe.rows):
            p = draw_image("train", self.recipe.seed, index, 11, MIX)
            if step < self.recipe.caption_until:
                whole = ask(p.scene, "list_all", np.random.default_rng(0))
                assert isinstance(whole, Question)
                p = DrawnImage(p.index, p.scene, p.pixels, (whole, *(q for q in p.questions if q.type != "list_all")))
            drawn.append(p)
        return drawn

    def answer_loss(self, step: int) -> Tensor:
        """Cross-entropy of the answer tokens of fresh images."""
        images = self.images(step)
        packed = self.packer.pack([self.packer.row(p.questions, self.recipe.row_tokens) for p in images])
        return F.cross_entropy(self.answer_logits(packed, images), packed.labels[packed.labels != IGNORE])

    def text_loss(self, step: int) -> Tensor:
        """KL from the model without adapters to the one with them, on a piece of a docstring."""
        rng = np.random.default_rng([self.recipe.seed, step])
        ids = self.tokenizer(self.texts[rng.integers(len(self.texts))][1]).input_ids
        start = rng.integers(max(1, len(ids) - self.recipe.text_tokens))
        piece = torch.tensor([ids[start : start + self.recipe.text_tokens]])
        embeds, positions = self.language.embedding[piece], torch.arange(piece.shape[1])[None]
        with torch.no_grad():
            self.language.adapted = False
            teacher = self.language.logits(self.language(embeds, positions, None)).log_softmax(-1)
            self.language.adapted = True
        student = self.language.logits(self.language(embeds, positions, None)).log_softmax(-1)
        return F.kl_div(student[0], teacher[0], reduction="batchmean", log_target=True)

    def rate(self) -> float:
        """The share of the peak rate: a linear warm-up, constant, and linear to 2 % at the end."""
        left = (self.recipe.steps - self.step) / self.recipe.decay
        return min(1.0, (self.step - self.recipe.first_step + 1) / self.recipe.warmup, max(0.02, left))

    def train_step(self) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.rate()
        self.optimizer.zero_grad()
        answer = self.answer_loss(self.step)
        answer.backward()
        told = {"answer": answer.item()}
        if self.step % self.recipe.text_every == 0:
            text = self.text_loss(self.step)
            text.backward()
            told["text_kl"] = text.item()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        told["gradient"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        self.optimizer.step()
        self.step += 1
        return told

    @torch.no_grad()
    def validate(self, num_questions: int) -> dict[str, float]:
        """Teacher-forced exact match by type on validation images (equal to greedy decoding)."""
        found: dict[str, list[bool]] = {}
        drawn = draw_test("validation", 0, num_questions, 12)
        for at in range(0, len(drawn), 4):
            part = drawn[at : at + 4]
            packed = self.packer.pack([self.packer.row(p.questions, 10_000) for p in part])
            for kind, hit in hits(packed, self.answer_logits(packed, part), part):
                found.setdefault(kind, []).append(hit)
        accuracy = {kind: float(np.mean(v)) for kind, v in sorted(found.items())}
        return {"headline": float(np.mean([accuracy[k] for k in HEADLINE if k in accuracy])), **accuracy}

    def save(self) -> None:
        state = {"step": self.step, "projector": self.projector.state_dict(), "adapters": self.language.adapters.state_dict()}
        temporary = self.out / "checkpoint.tmp"
        torch.save({**state, "optimizer": self.optimizer.state_dict()}, temporary)
        temporary.rename(self.out / "checkpoint.pt")

    def resume(self) -> bool:
        """Whether there was a checkpoint to go on from."""
        if not (path := self.out / "checkpoint.pt").exists():
            return False
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.projector.load_state_dict(state["projector"])
        self.language.adapters.load_state_dict(state["adapters"])
        self.optimizer.load_state_dict(state["optimizer"])
        return True

    def learned(self) -> dict[str, Tensor]:
        """The parameters that learn, by the names that they have in the file of adapters."""
        adapters = {
            f"layers.{name.replace('_proj_', '_proj.').replace('_', '.', 1)}": t for name, t in self.language.adapters.items()
        }
        return {f"projector.{name}": tensor for name, tensor in self.projector.state_dict().items()} | adapters

    @torch.no_grad()
    def start(self, exported: Path) -> None:
        """Go on from the adapters of another run."""
        tensors = load_file(exported)
        for name, tensor in self.learned().items():
            tensor.copy_(tensors.pop(name))
        assert not tensors, f"{exported} has other adapters: {sorted(tensors)}"

    def export(self) -> None:
        """Write what is committed: the projector and the adapters, in bfloat16."""
        tensors = {name: tensor.detach().bfloat16().contiguous() for name, tensor in self.learned().items()}
        save_file(tensors, self.out / ADAPTERS, {"scale": str(SCALE)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", type=Path, required=True, help="folder of SmolLM2, unpacked")
    parser.add_argument("--out", type=Path, required=True, help="run folder: log.jsonl, checkpoint.pt, adapters.safetensors")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--start", type=Path, help="adapters.safetensors of a run to go on from")
    parser.add_argument("--at", type=int, default=0, help="with --start: the step to go on at")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = replace(Recipe(), steps=arguments.steps, first_step=arguments.at)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(arguments.language, recipe, arguments.out)
    if not trainer.resume():
        trainer.note({"recipe": asdict(recipe)})
        if arguments.start:
            trainer.start(arguments.start)
        else:
            trainer.look()
        trainer.save()
    started, spent = time.time(), time.process_time()
    sums: dict[str, list[float]] = {}
    while trainer.step < recipe.steps:
        for name, value in trainer.train_step().items():
            sums.setdefault(name, []).append(value)
        last = trainer.step == recipe.steps
        if trainer.step % 5 == 0 or last:
            trainer.save()
        if trainer.step % 20 == 0 or last:
            row: dict[str, object] = {"step": trainer.step, **{k: round(float(np.mean(v)), 4) for k, v in sums.items()}}
            row |= {"cpu_s": round(time.process_time() - spent), "wall_s": round(time.time() - started)}
            sums = {}
            if trainer.step % 100 == 0 or last:
                row["validation"] = {k: round(v, 3) for k, v in trainer.validate(1000 if last else 208).items()}
            trainer.note(row)
        if not math.isfinite(sum(v[-1] for v in sums.values()) if sums else 0.0):
            raise FloatingPointError(f"the loss of step {trainer.step} is not finite")
    trainer.export()


if __name__ == "__main__":
    main()
