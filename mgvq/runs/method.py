"""The method of a run from its configuration, and the checks that need its stages: all that is set has an effect."""

from omegaconf import DictConfig

from mgvq.codebook.columns import Columns
from mgvq.compensation.gradient_hessian import GradientHessian
from mgvq.compensation.hessian_two_sided import HessianTwoSided
from mgvq.curvature.kronecker import KroneckerFisher
from mgvq.errors import UserError
from mgvq.grouping.modality import Modality
from mgvq.protocols import Compensation
from mgvq.quantization.method import Method
from mgvq.runs.build import STAGES, TEXT_ONLY, build, chosen


def build_method(cfg: DictConfig) -> Method | None:
    """None for full precision. Raises UserError for stages that lack what they need, or that nothing looks at."""
    if not chosen(cfg, "codebook"):
        return None
    method = Method(**{stage: build(cfg, stage) for stage in STAGES})
    _check_metric(method)
    _check_scores(method, cfg)
    _check_calibration(method, cfg)
    _check_modalities(method, cfg)
    return method


def _check_metric(method: Method) -> None:
    users = [
        name
        for name, uses in (
            ("codebook", method.codebook.needs_importance),
            ("compensation", method.compensation.needs_metric),
            ("refit", method.refit is not None),
        )
        if uses
    ]
    if users and method.curvature is None:
        raise UserError(
            f"{' and '.join(users)} weigh errors by the curvature, but curvature=none: add curvature=input (or another) and a "
            "calibration set such as calibration=tiny_vqa, or choose codebook.weight_power=0 and compensation=none."
        )
    if method.compensation.needs_output_metric and not isinstance(method.curvature, KroneckerFisher):
        raise UserError(
            "this compensation weighs output channels too, for which only curvature=kronecker has a metric: choose that one."
        )
    if _corrects_rows(method.compensation) and isinstance(method.codebook, Columns):
        raise UserError(
            "this compensation corrects errors from row to row, but a vector of codebook=columns takes several rows at once: "
            "choose codebook=kmeans, or compensation=hessian."
        )
    if method.refit is not None and not method.refit.can_refit(method.codebook):
        raise UserError("refit has no effect: it moves the tables of codebook=kmeans, product and residual; set refit=none.")
    if method.curvature is not None and not users:
        raise UserError(
            "curvature has no effect: nothing in this run looks at the metric. Leave it out (curvature=none), or set "
            "codebook.weight_power above 0, or a compensation."
        )


def _corrects_rows(compensation: Compensation) -> bool:
    gradient = isinstance(compensation, GradientHessian) and compensation.output_damping is not None
    return gradient or isinstance(compensation, HessianTwoSided)


def _check_scores(method: Method, cfg: DictConfig) -> None:
    sorts = cfg.grouping["_target_"].endswith(".Score")
    allocates = not cfg.allocation["_target_"].endswith(".Uniform")
    if sorts or allocates or method.compensation.uses_score:
        return
    if not cfg.sensitivity["_target_"].endswith(".Uniform"):
        raise UserError(
            "sensitivity has no effect: it neither groups channels (grouping=score), nor gives out bits (an allocation other "
            "than uniform), nor orders a compensation. Leave it out (sensitivity=uniform)."
        )


def _check_calibration(method: Method, cfg: DictConfig) -> None:
    readers = {"curvature": method.curvature, "sensitivity": method.sensitivity, "grouping": method.grouping}
    readers = [name for name, stage in readers.items() if stage is not None and stage.needs]
    if readers and not chosen(cfg, "calibration"):
        raise UserError(
            f"{' and '.join(readers)} reads statistics of the activations: add a calibration set, such as calibration=tiny_vqa."
        )
    if chosen(cfg, "calibration") and not readers:
        raise UserError(
            "calibration has no effect: no stage of this run reads statistics. Leave it out (calibration=none), or choose a "
            "curvature, or a sensitivity or grouping that looks at data."
        )


def _check_modalities(method: Method, cfg: DictConfig) -> None:
    """Nothing may turn on images where calibration shows none."""
    asked = {
        "curvature.fusion=mbq_ratio": getattr(method.curvature, "fusion", None) == "mbq_ratio",
        "sensitivity.modality=image": getattr(method.sensitivity, "modality", None) == "image",
        "grouping=modality": isinstance(method.grouping, Modality),
    }
    if cfg.calibration.get("_target_") in TEXT_ONLY and (idle := [name for name, on in asked.items() if on]):
        raise UserError(
            f"{' and '.join(idle)} tells images from text, and calibration=text shows no image: without that, method=mbq is awq, "
            "fusion none, and grouping score or one."
        )
