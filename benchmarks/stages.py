"""What the stages of a run cost that have no page of their own here, against products and passes that they cannot do without."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mgvq.allocation.greedy import Greedy
from mgvq.calibration.tiny_vqa import TinyVQA
from mgvq.checkpoint.load import load as load_checkpoint
from mgvq.checkpoint.save import save
from mgvq.evaluation.forced import score
from mgvq.grouping.score import Score
from mgvq.model.answers import answer_logits
from mgvq.model.blocks import Block, by_block
from mgvq.model.load import Loaded, load
from mgvq.model.sites import list_sites, site_weights
from mgvq.model.source import SHIPPED, Source
from mgvq.model.walk import BlockWalk
from mgvq.prefix.quantized import QuantizedPrefix
from mgvq.quantization.sequential import _by_input, _Streams
from mgvq.quantization.subject import Samples, Subject
from mgvq.quantization.teacher import Teacher
from mgvq.rng import generator
from mgvq.runs.api import quantize
from mgvq.sensitivity.global_local import GlobalLocal
from mgvq.transform.hadamard import Hadamard
from mgvq.types import Batch, Modality, Rate, RateTable, Site, SiteStats, TableGroupInfo

Pairs = dict[str, tuple[Callable[[], object], str, Callable[[], object]]]
_SIZE, _LAYERS = 1024, 256


def pairs() -> Pairs:
    """Name -> (what is measured, what it is held against, that)."""
    return {**_of_a_layer(), **_of_many_layers(), **_of_a_model()}


def _of_a_layer() -> Pairs:
    draws = generator(0, "benchmark stages")
    weight, tokens = (torch.randn(_SIZE, _SIZE, generator=draws) for _ in range(2))
    gram, wide = tokens.T @ tokens / _SIZE, weight.double()
    site = _site(0)
    factors: dict[Modality, Tensor] = {"image": gram, "text": gram}
    num_tokens: dict[Modality, int] = {"image": _SIZE, "text": _SIZE}
    stats = SiteStats(num_tokens=num_tokens, gram=factors, num_answers=_SIZE, fisher=factors)
    sensitivity = GlobalLocal(reading="scope", alpha=0.5, modality="both", damping=0.01)
    prefix = QuantizedPrefix(residual=True, asymmetric=True, ridge=[1.0, 3.0, 10.0])
    turned = Hadamard(sides="both", within="layer", seed=0)([site], None)[site]

    def products(number: int) -> tuple[str, Callable[[], object]]:
        return f"{number} x 1024^3 matrix product, float64", lambda: [wide @ wide for _ in range(number)]

    return {
        "sensitivity=global_local of a 1024 x 1024 layer": (partial(sensitivity, {site: weight}, {site: stats}), *products(2)),
        "transform=hadamard of a 1024 x 1024 layer and its Gram": (
            lambda: (turned.weight(weight), turned.input_factor(gram)), *products(2)
        ),
        "prefix=quantized, the target of a 1024 x 1024 layer, one of three ridges": (
            lambda: prefix.correction("stream", wide, gram, (wide, gram)), *products(6)
        ),
    }  # fmt: skip


def _of_many_layers() -> Pairs:
    draws = generator(0, "benchmark stages")
    scores = {_site(number): torch.rand(_SIZE, generator=draws) for number in range(_LAYERS)}
    shares = torch.rand(4 * _LAYERS, generator=draws).tolist()
    groups = [
        TableGroupInfo(f"{n}", "language", "layer", n // 4, 0.5, n % 4, _SIZE**2 // 4, share, 0.5)
        for n, share in enumerate(shares)
    ]
    rates = [Rate(f"{bits}", float(bits)) for bits in range(1, 9)]
    bits = torch.tensor([[group.num_weights * int(rate.index_bits) for rate in rates] for group in groups])
    loss = torch.tensor([[group.score * 4.0**-rate.index_bits for rate in rates] for group in groups], dtype=torch.float64)
    table, budget = RateTable(groups, rates, bits, loss), 2 * int(bits[:, 0].sum())
    policy = Greedy(distortion="gaussian", min_bits=None, min_bits_kv=None)
    product = torch.randn(_SIZE, _SIZE, generator=draws)
    return {
        "grouping=score, 256 layers of 1,024 channels": (
            partial(Score(num_groups=4), scores, {}),
            "as many sorts in float64",
            lambda: [torch.argsort(own.double(), stable=True) for own in scores.values()],
        ),
        "allocation=greedy, 1,024 groups at 8 rates": (
            partial(policy, table, budget), "1024^3 matrix product", partial(torch.mm, product, product)
        ),
    }  # fmt: skip


def _of_a_model() -> Pairs:
    source = Source(name="tiny_internvl", path=str(SHIPPED / "tiny_internvl"), revision=None, dtype="float32")
    loaded = load(source, torch.device("cpu"))
    drawn = TinyVQA(num_images=16, questions_per_image=8, heldout_images=0, shown="both", seed=0, label_seed=0).draw()
    sites, batches = list_sites(loaded.model, "language"), list(drawn.batches(loaded.processor))
    teacher, block = Teacher(Subject(loaded.model, sites, Samples([], batches)), "kl"), next(iter(by_block(sites)))
    walk = BlockWalk(loaded.model, sites, batches)
    weights = quantize(loaded.model, loaded.processor, method="rtn", scope="language").report.weights
    scratch = tempfile.TemporaryDirectory(prefix="mgvq-benchmark-")  # as long as what is measured
    passes = "their forward passes", partial(_forward, loaded, batches)
    return {
        "128 answers teacher-forced": (partial(score, loaded.model, None, batches), *passes),
        "held-out loss of 128 answers, divergence": (teacher.heldout_loss, *passes),
        "moments behind the quantised prefix of a block, 128 samples": (
            partial(_moments, walk, block, site_weights(loaded.model, block)),
            "the block's passes alone",
            partial(_visits, walk, block, site_weights(loaded.model, block)),
        ),
        "checkpoint of tiny_internvl, written": (
            partial(_in_a_folder, scratch, lambda folder: save(folder, loaded, sites, weights)),
            "transformers' save_pretrained",
            partial(_in_a_folder, scratch, lambda folder: _save_pretrained(loaded, folder)),
        ),
        "checkpoint of tiny_internvl, read": (
            partial(load_checkpoint, _in_a_folder(scratch, lambda folder: save(folder, loaded, sites, weights))),
            "transformers' from_pretrained",
            partial(type(loaded.model).from_pretrained, source.path, dtype=torch.float32, local_files_only=True),
        ),
    }


@torch.inference_mode()
def _forward(loaded: Loaded, batches: Sequence[Batch]) -> None:
    for batch in batches:
        answer_logits(loaded.model, batch)


def _moments(walk: BlockWalk, block: Block, originals: Mapping[Site, Tensor]) -> None:
    walk.unsettle()
    streams = _Streams(walk, block, originals)
    for together in _by_input(block):
        streams.moments(together)


def _visits(walk: BlockWalk, block: Block, originals: Mapping[Site, Tensor]) -> None:
    """Once at full precision, and behind the quantised prefix as far as each of the layers in turn."""
    walk.unsettle()
    visit = walk.visit(block, originals)
    for _ in visit.run("full_precision"):
        pass
    for together in _by_input(block):
        for _ in visit.run("quantized", [together[0].name.removeprefix(f"{visit.name}.")], whole=False):
            pass


def _in_a_folder(scratch: tempfile.TemporaryDirectory[str], write: Callable[[Path], object]) -> Path:
    folder = Path(tempfile.mkdtemp(dir=scratch.name)) / "checkpoint"
    write(folder)
    return folder


def _save_pretrained(loaded: Loaded, folder: Path) -> None:
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)


def _site(number: int) -> Site:
    return Site(f"layer{number}", "language", "layer", number, _SIZE, _SIZE)
