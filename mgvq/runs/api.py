"""`mgvq.quantize`: what a run does to a model, for a program of one's own: no command line, run folder or evaluation."""

import copy
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from hydra.errors import HydraException
from omegaconf import DictConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

import mgvq
from mgvq.calibration.drawn import marks
from mgvq.calibration.examples import ExampleSet, further_batches, further_examples
from mgvq.calibration.rows import Row, open_image, question_turns
from mgvq.calibration.text import PassageSet
from mgvq.checkpoint.ledger import Ledger
from mgvq.checkpoint.load import load
from mgvq.checkpoint.save import save
from mgvq.checks import told_as, whole_number
from mgvq.compiled import get_num_threads, set_num_threads
from mgvq.curvature.statistics import collect
from mgvq.errors import UserError
from mgvq.model.chat import Chat
from mgvq.model.classes import is_text_only
from mgvq.model.fit import check_samples
from mgvq.model.load import Described, Loaded, give_tokens, stored_dtype
from mgvq.model.processor import check_processor, prepared
from mgvq.model.sites import list_sites
from mgvq.model.source import Source
from mgvq.model.terms import licence_of, term_files
from mgvq.model.text import Passage
from mgvq.protocols import CalibrationSet
from mgvq.quantization.embeddings import round_embeddings
from mgvq.quantization.pipeline import quantize as quantize_layers
from mgvq.quantization.report import QuantReport
from mgvq.runs.build import check, chosen
from mgvq.runs.compose import composer
from mgvq.runs.identity import scientific_settings
from mgvq.runs.method import build_method
from mgvq.runs.overrides import override
from mgvq.runs.quantise import samples_as_batches

Samples = CalibrationSet | Sequence[Mapping[str, Any]] | Sequence[str]
_HELDOUT = 5  # one of so many rows is held out
_ELSEWHERE = (
    "model",
    "calibration",
    "evaluation",
    "tracker",
    "paths",
    "device",
    "threads",
    "tf32",
    "dry",
    "objective",
    "memory",
    "method",
    "seed",
    "scope",
    "budget",
)


@dataclass(frozen=True)
class Quantized:
    """What `mgvq.quantize` gives."""

    model: PreTrainedModel
    """The quantised model, its layers packed, as `mgvq.load` reads it back from the files that `save` copies."""
    processor: Any
    """A copy of the processor, set to pad on the left as generation needs it."""
    report: QuantReport
    """Bits, errors, rates and flags, layer by layer: tables for pandas, explained in docs/run_folder.md."""
    ledger: Ledger
    """Every stored byte by what it is for; `ledger.bits()` are the measured bits a weight."""
    _files: "_Files" = field(repr=False)

    def save(self, folder: str | Path) -> Path:
        """Write the checkpoint into a new folder, and return it. Raises UserError where there is one already, or none can be."""
        folder = Path(folder)
        if folder.exists():
            raise UserError(f"{folder} is there already: give a folder that is not.")
        with told_as(f"{folder} cannot be written", "Give a folder in a place where you may write, with room for it."):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:  # whole, or not at all
                made = Path(scratch) / folder.name
                shutil.copytree(self._files.checkpoint, made, copy_function=shutil.copyfile)
                return made.rename(folder)


def quantize(
    model: PreTrainedModel,
    processor: Any,
    samples: Samples | None = None,
    *,
    method: str = "mgvq2",
    bits: float = 2.0,
    seed: int = 0,
    scope: str = "all",
    settings: Mapping[str, Any] | None = None,
    threads: int = 1,
) -> Quantized:
    """Quantise a transformers model to `bits` stored bits a weight; the model itself stays as it is.

    `samples` are what the method calibrates on: rows `{"image", "question", "answer"}`, texts for a model of text, or what a
    calibration of mgvq has drawn; None for a method that looks at no data. Of rows and texts the last fifth is held out, no
    image of which is among the others. `method` is a preset of mgvq-run, `settings` are any further settings of its by their
    names, `{"codebook.state_bits": 8}`. `scope` says which towers' linear layers are quantised: `language`, `language_projector`
    (with what lies between the towers) or `all` (the vision tower too). `seed` draws everything that is random; which rows are
    held out does not depend on it. `threads` are those of the CPU, and the last digits may move with them. With equal samples,
    settings and `threads` the checkpoint has the bytes of a run's.

    Raises UserError for bad settings, before any work, and as a run does for models and samples that cannot be used.
    """
    cfg = _configuration(method, bits, seed, scope, settings or {}, _stand_in(samples))
    whole_number("threads", threads, least=1)
    recipe = build_method(cfg)
    assert recipe is not None, "_configuration refuses methods that quantise nothing"
    drawn = _drawn(samples, seed)
    if drawn is not None and (recipe.shift is not None or recipe.tuning is not None) and not drawn.heldout_examples:
        raise UserError(
            f"method={method} keeps what is best on held-out samples, and none is left of samples: give {_HELDOUT} or more, of "
            "at least two images."
        )
    everything = [] if drawn is None else [*drawn.examples, *drawn.heldout_examples, *further_examples(drawn)]
    if is_text_only(model.config) and any(getattr(example, "images", ()) for example in everything):
        raise UserError(f"{type(model).__name__} reads only text, and samples show it images: give texts.")
    with _as_in_a_run(threads):
        loaded = _loaded(model, processor)
        if drawn is not None:
            check_samples(Described(loaded.model.config, loaded.processor), everything)
        sites = list_sites(loaded.model, cfg.scope)
        bank = {}
        if drawn is not None:
            batches, further = drawn.batches(loaded.processor), further_batches(drawn, loaded.processor)
            bank = collect(loaded.model, sites, batches, recipe.needs, drawn.label_seed, further)
        walked = None
        if drawn is not None and recipe.runs_on_samples:
            walked = samples_as_batches(loaded, drawn, for_grams=recipe.prefix is not None)
        bits_per_weight, dtype = cfg.budget.bits_per_weight, loaded.stored_dtype
        report = quantize_layers(loaded.model, sites, bank, recipe, bits_per_weight, walked, stored_dtype=dtype)
        rounded = round_embeddings(loaded.model, cfg.embedding_bits) if cfg.embedding_bits else {}
    files = _Files()
    made_of = _made_of(cfg, model, drawn, threads)
    ledger = save(files.checkpoint, loaded, sites, report.weights, rounded, report.parameters, provenance=made_of)
    if ledger.scope_bits() != report.stored_bits:
        raise AssertionError(f"{report.stored_bits} bits were predicted, {ledger.scope_bits()} are stored")
    packed = load(files.checkpoint, dtype=model.dtype, device=model.device, packed=True, verify=False)
    return Quantized(packed, loaded.processor, report, ledger, files)


def _made_of(cfg: DictConfig, model: PreTrainedModel, drawn: CalibrationSet | None, threads: int) -> dict[str, Any]:
    """How the checkpoint was made, as that of a run says it; of a model and samples that were given, what is known of them."""
    settings = {name: value for name, value in scientific_settings(cfg).items() if name not in ("model", "evaluation")}
    name = Path(model.name_or_path or type(model).__name__).name
    settings |= {"model": {"name": name, "dtype": str(model.dtype).removeprefix("torch.")}}
    settings |= {"threads": float(threads), "device": model.device.type}
    if drawn is not None:
        numbers = {"samples": len(drawn.examples), "heldout_samples": len(drawn.heldout_examples)}
        settings |= {"calibration": {"variant": "samples that mgvq.quantize was given", **numbers}}
    return {"mgvq": mgvq.__version__, "settings": settings}


class _Files:
    """A temporary folder that goes with the last who holds it, silently: `TemporaryDirectory` would warn."""

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="mgvq-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.checkpoint = Path(folder) / "checkpoint"


def _configuration(
    method: str, bits: float, seed: int, scope: str, settings: Mapping[str, Any], stand_in: Sequence[str]
) -> DictConfig:
    """The settings of the run that would do the same."""
    if idle := sorted(key for key in settings if key.partition(".")[0] in _ELSEWHERE):
        raise UserError(
            f"settings: {', '.join(idle)} has no effect here; model, processor, samples, method, bits, seed, scope and threads "
            "are arguments of their own."
        )
    words = [f"method={method}", override("seed", seed), override("budget.bits_per_weight", bits), override("scope", scope)]
    try:
        with composer() as compose:
            cfg = compose(*words, *(override(key, value) for key, value in settings.items()), *stand_in)
    except HydraException as error:
        raise UserError(f"method={method!r}, settings={dict(settings)!r}: {' '.join(str(error).split())}") from error
    if not chosen(cfg, "codebook"):
        raise UserError(f"method={method!r} quantises nothing: choose another, such as mgvq2.")
    check(cfg)
    return cfg


def _stand_in(samples: Samples | None) -> list[str]:
    """What the configuration says in the place of samples, so that it is checked as that of a run."""
    if samples is None:
        return ["calibration=none"]
    sees = any(getattr(sample, "images", ()) for sample in samples.examples) if isinstance(samples, CalibrationSet) else (
        any(isinstance(row, Mapping) for row in samples)
    )  # fmt: skip
    return ["calibration=tiny_vqa", f"calibration.shown={'both' if sees else 'text'}"]


def _drawn(samples: Samples | None, seed: int) -> CalibrationSet | None:
    """The samples as a calibration set. Raises UserError, with the number of the row, for rows that are none."""
    if samples is None or isinstance(samples, CalibrationSet):
        return samples
    if not samples:
        raise UserError("samples is empty: give rows {'image', 'question', 'answer'}, or texts.")
    if all(isinstance(sample, str) for sample in samples):
        passages = [Passage(f"text {number}-0", str(text)) for number, text in enumerate(samples)]
        kept = len(passages) - len(passages) // _HELDOUT
        return PassageSet(passages[:kept], passages[kept:], (), seed)  # type: ignore[return-value]  (`packable` is of the class)
    groups: dict[str, list[Chat]] = {}
    for number, content in enumerate(samples):
        chat = _chat(number, content)
        groups.setdefault(min(marks(chat)), []).append(chat)
    heldout: list[Chat] = []
    while len(groups) > 1 and len(heldout) < len(samples) // _HELDOUT:
        heldout = [*groups.popitem()[1], *heldout]
    return ExampleSet([chat for group in groups.values() for chat in group], heldout, seed, batch_size=8)


def _chat(number: int, content: Any) -> Chat:
    row = Row("samples", f"row {number}", lambda: content)
    found = row.content("image", "question", "answer")
    image = open_image(row, found["image"], Path())
    return Chat(row.sample_id, question_turns(row, [image], found["question"], found["answer"]))


def _loaded(model: PreTrainedModel, processor: Any) -> Loaded:
    """The model's weights in modules of their own, which share them, and the processor set as a run sets it."""
    twin = cast(PreTrainedModel, copy.deepcopy(model, _shared(model)))
    generation = model.generation_config.to_dict() if model.generation_config is not None else {}
    ready = prepared(processor, model.config, generation)
    dtype = str(model.dtype).removeprefix("torch.")
    check_processor(ready, model.config, Source(name="model", path=model.name_or_path or "the model", revision=None, dtype=dtype))
    give_tokens(twin, ready)
    folder = _folder(model)
    if folder is None:
        return Loaded(twin.eval(), ready, model.dtype)
    described = type(model.config).from_pretrained(folder, local_files_only=True)
    return Loaded(twin.eval(), ready, stored_dtype(described, model), terms=term_files(folder), licence=licence_of(folder))


def _folder(model: PreTrainedModel) -> Path | None:
    """The files that the model was loaded from, in a folder or in the hub's cache; None for a model that was made in memory."""
    commit = getattr(model.config, "_commit_hash", None)
    lenient = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    if not model.name_or_path:
        return None
    try:
        found = cached_file(model.name_or_path, "config.json", local_files_only=True, revision=commit, **lenient)
    except OSError:  # the name of a folder that is gone, which it takes for one of the hub's
        return None
    return Path(found).parent if found else None


def _shared(model: nn.Module) -> dict[int, Any]:
    """What `deepcopy` need not copy: the numbers of parameters, which get objects of their own without gradients, and buffers."""
    parameters = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return {**parameters, **{id(buffer): buffer for buffer in model.buffers()}}


@contextmanager
def _as_in_a_run(threads: int) -> Iterator[None]:
    """Inside, torch and compiled loops have so many threads, and torch its repeatable algorithms; afterwards all is as before."""
    before = torch.get_num_threads(), get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.set_num_threads(threads)
        set_num_threads(threads)
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        torch.set_num_threads(before[0])
        set_num_threads(before[1])
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])
