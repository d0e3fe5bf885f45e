"""A method: one variant of each stage, and whether they fit together."""

from dataclasses import dataclass

from mgvq.errors import UserError
from mgvq.protocols import (
    Allocation,
    Codebook,
    Compensation,
    Curvature,
    Grouping,
    Prefix,
    Refit,
    Sensitivity,
    TargetShift,
    Transform,
    Tuning,
)
from mgvq.types import Needs


@dataclass(frozen=True, kw_only=True)
class Method:
    """One variant of each stage, and the outliers: together a quantisation method.

    Raises UserError for stages that lack what they need of each other, or that none of the others looks at.
    """

    curvature: Curvature | None
    sensitivity: Sensitivity
    grouping: Grouping
    allocation: Allocation
    codebook: Codebook
    compensation: Compensation
    refit: Refit | None = None
    transform: Transform | None = None
    prefix: Prefix | None = None
    tuning: Tuning | None = None
    outliers: int = 0
    """How many weights of each layer are stored exactly."""

    def __post_init__(self) -> None:
        self._check_metric()
        if self.prefix is not None and self.shift is not None:
            raise UserError(
                "prefix=quantized and a compensation that moves its targets by a gradient both decide in which order layers are "
                "rounded and towards what: choose prefix=none, or a compensation such as hessian."
            )
        if self.tunes_blocks and self.shift is not None:
            raise UserError(
                "tuning=block and a compensation that moves its targets by a gradient both walk through the blocks, each in its "
                "own way: choose tuning=tables or end_to_end, or a compensation such as hessian."
            )
        if self.prefix is not None and self.curvature is not None and (clip := self.curvature.needs.clip) is not None:
            raise UserError(
                f"prefix=quantized takes the input factors of all layers anew, of the quantised prefix and without clipping, so "
                f"curvature.clip={clip:g} would not reach what layers are rounded by: set curvature.clip=null, or prefix=none."
            )
        if self.refit is not None and not self.codebook.can_be_refitted:
            raise UserError(
                "refit has no effect: this codebook has no tables that it could move, as kmeans, product and residual have; set "
                "refit=none."
            )

    def _check_metric(self) -> None:
        users = [
            name
            for name, uses in (
                ("codebook", self.codebook.needs_importance),
                ("compensation", self.compensation.needs_metric),
                ("refit", self.refit is not None),
                ("prefix", self.prefix is not None),
            )
            if uses
        ]
        if users and self.curvature is None:
            raise UserError(
                f"{' and '.join(users)} weigh errors by the curvature, but curvature=none: add curvature=input (or another) and "
                "a calibration set such as calibration=tiny_vqa, or choose codebook.weight_power=0 and compensation=none."
            )
        if self.curvature is not None and not users:
            raise UserError(
                "curvature has no effect: nothing in this run looks at the metric. Leave it out (curvature=none), or set "
                "codebook.weight_power above 0, or a compensation."
            )
        if self.compensation.needs_output_metric and not (self.curvature and self.curvature.has_output_factor):
            raise UserError(
                "this compensation weighs output channels too, for which this curvature has no metric: choose "
                "curvature=kronecker."
            )

    @property
    def shift(self) -> TargetShift | None:
        """What moves the targets of rounding by a gradient; None where the weights themselves are the targets."""
        return self.compensation.shift

    @property
    def is_blockwise(self) -> bool:
        """Whether layers are rounded behind those that are quantised before them, for which the model runs on samples."""
        return self.shift is not None or self.prefix is not None or self.tunes_blocks

    @property
    def runs_on_samples(self) -> bool:
        """Whether the model runs on samples while layers are rounded, or tuned afterwards."""
        return self.is_blockwise or self.tuning is not None

    @property
    def tunes_blocks(self) -> bool:
        """Whether a block is tuned before the next one is rounded."""
        return self.tuning is not None and self.tuning.within == "block"

    @property
    def uses_score(self) -> bool:
        """Whether any stage looks at the sensitivity of the channels."""
        return self.grouping.uses_score or self.allocation.uses_score or self.compensation.uses_score

    @property
    def needs(self) -> Needs:
        """The statistics that its stages read."""
        curvature = self.curvature.needs if self.curvature else Needs()
        static = Needs(gradient=self.shift is not None and not self.shift.refresh)
        return curvature | static | self.sensitivity.needs | self.grouping.needs
