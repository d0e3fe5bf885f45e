"""A method: one variant of each stage."""

from dataclasses import dataclass

from mgvq.protocols import Allocation, Codebook, Compensation, Curvature, Grouping, Refit, Sensitivity, TargetShift, Transform
from mgvq.types import Needs


@dataclass(frozen=True, kw_only=True)
class Method:
    """One variant of each stage: together a quantisation method."""

    curvature: Curvature | None
    sensitivity: Sensitivity
    grouping: Grouping
    allocation: Allocation
    codebook: Codebook
    compensation: Compensation
    refit: Refit | None = None
    transform: Transform | None = None

    @property
    def shift(self) -> TargetShift | None:
        """The compensation, where it moves its targets by a gradient."""
        return self.compensation if isinstance(self.compensation, TargetShift) else None

    @property
    def needs(self) -> Needs:
        """The statistics that its stages read."""
        curvature = self.curvature.needs if self.curvature else Needs()
        static = Needs(gradients=self.shift is not None and not self.shift.refresh)
        return curvature | static | self.sensitivity.needs | self.grouping.needs
