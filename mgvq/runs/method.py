"""The method of a run from its configuration, and the checks that need the configuration: all that is set has an effect."""

from typing import Any

from omegaconf import DictConfig
from transformers import PretrainedConfig

from mgvq.errors import UserError
from mgvq.model.classes import is_text_only
from mgvq.quantization.method import Method
from mgvq.runs.build import STAGES, build, chosen
from mgvq.runs.declared import is_idle


def build_method(cfg: DictConfig) -> Method | None:
    """The method of a run; None for full precision. Raises UserError for stages that lack what they need, or have no effect."""
    if not chosen(cfg, "codebook"):
        return None
    method = Method(**{stage: build(cfg, stage) for stage in STAGES}, outliers=cfg.outliers)
    if not method.uses_score and not is_idle(cfg.sensitivity):
        raise UserError(
            "sensitivity has no effect: it neither groups channels (grouping=score), nor gives out bits (an allocation other "
            "than uniform), nor orders a compensation. Leave it out (sensitivity=uniform)."
        )
    _check_calibration(method, cfg)
    _check_budget(method, cfg)
    if cfg.memory == "streamed":
        _check_streamed(method, cfg)
    return method


def _check_streamed(method: Method, cfg: DictConfig) -> None:
    """Refuse what has more than one block in memory."""
    if method.tuning is not None:
        raise UserError(
            f"memory=streamed has one block in memory, and tuning={cfg.variants.tuning} is not made for that: set tuning=none, "
            "or memory=resident."
        )


def _check_budget(method: Method, cfg: DictConfig) -> None:
    """Refuse a budget that the smallest rate exceeds by its indices alone; `predicted_bits` counts tables, scales and padding."""
    least = min(method.codebook.rates(), key=lambda rate: rate.index_bits)
    bits = cfg.budget.bits_per_weight
    if bits * (1 + cfg.allocation.get("tolerance", 0)) < least.index_bits:
        raise UserError(
            f"budget.bits_per_weight={bits:g} is below the smallest rate of this codebook: {least.name} takes "
            f"{least.index_bits:g} index bits a weight, before tables and scales. Raise the budget."
        )


def _check_calibration(method: Method, cfg: DictConfig) -> None:
    stages = {"curvature": method.curvature, "sensitivity": method.sensitivity, "grouping": method.grouping}
    readers = [name for name, stage in stages.items() if stage is not None and stage.needs]
    calibration = build(cfg, "calibration")
    if readers and calibration is None:
        raise UserError(
            f"{' and '.join(readers)} reads statistics of the activations: add a calibration set, such as calibration=tiny_vqa."
        )
    if method.tuning is not None and calibration is None:
        raise UserError(
            f"tuning={cfg.variants.tuning} learns from samples: add a calibration set, such as calibration=tiny_vqa or text."
        )
    choosing = [group for group, part in (("tuning", method.tuning), ("compensation", method.shift)) if part is not None]
    for held in ("heldout_images", "heldout_samples"):
        if choosing and cfg.calibration.get(held) == 0:
            who = " and ".join(f"{group}={cfg.variants[group]}" for group in choosing)
            raise UserError(f"{who} keeps what is best on held-out samples, and calibration.{held}=0 leaves none: raise it.")
    if calibration is not None and not readers and method.tuning is None:
        raise UserError(
            "calibration has no effect: no stage of this run reads statistics. Leave it out (calibration=none), or choose a "
            "curvature, or a sensitivity or grouping that looks at data."
        )
    if method.tuning is not None and method.tuning.embeddings and cfg.embedding_bits:
        raise UserError(
            f"tuning.embeddings=true and embedding_bits={cfg.embedding_bits} are about the same weights, and only one can have "
            "them: set tuning.embeddings=false, or embedding_bits=null."
        )
    further = cfg.calibration.get("gram_samples")
    if further is not None and not method.needs.gram and method.prefix is None:
        raise UserError(
            f"calibration.gram_samples={further} has no effect: {' and '.join(readers) or 'what is'} as set here reads no plain "
            "Gram (all its statistics take gradients), and the Gram alone sees these samples. Set it to null, or raise the "
            "number of samples."
        )
    turned = [name for name, stage in stages.items() if stage is not None and stage.needs_images]
    if turned and calibration is not None and not calibration.shows_images:
        raise UserError(
            f"{' and '.join(turned)} as set here tells images from text, and calibration={cfg.variants.calibration} shows no "
            "image. Without one method=mbq is awq, curvature.fusion none, sensitivity.modality both, and grouping score or one."
        )


def check_images(config: PretrainedConfig, **parts: Any) -> None:
    """Raises UserError where one of the `parts` (`calibration`, `evaluation`; None: left out) shows images to a model that reads
    only text."""
    words = {"calibration": "calibration=text", "evaluation": "evaluation=perplexity"}
    shown = [group for group, part in parts.items() if part is not None and part.shows_images]
    if shown and is_text_only(config):
        raise UserError(
            f"{(config.architectures or [config.model_type])[0]} reads only text, and {' and '.join(shown)} shows it images: set "
            f"{' '.join(words[group] for group in shown)}."
        )
