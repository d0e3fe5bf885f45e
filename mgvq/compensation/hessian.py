"""Second-order compensation: the error of what is rounded is corrected in what is still free (LDLQ, GPTQ)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mgvq.compensation.damping import check_damping
from mgvq.compensation.ldlq import Choose, expected_damage, ldlq
from mgvq.errors import UserError
from mgvq.protocols import FittedSlice, TargetShift
from mgvq.types import Metric, Site


@dataclass(frozen=True, kw_only=True)
class Hessian:
    """One-sided block-LDL rounding: vectors one after the other, each in the exact metric of its block.

    The vector with the most sensitive channels is rounded first, so that all others can make up for its error; where the
    sensitivity is `gram_diag` this is GPTQ's act-order, and vectors of equal score follow the order of the channels. With mixed
    rates `order=damage` goes by what the rounding of a channel is to cost: its score times the distortion of its rate. With
    `H = L D L^T` in the reverse of that order and `Delta = W - W^`, vector j is rounded at `W_j + sum_{i>j} Delta_i L_ij` in the
    metric `D_j`, and `tr(Delta H Delta^T)` is the sum of what these roundings cost (docs/method.md, eq. (ldlq)). The output
    factor of the metric would not change the feedback and is not looked at.

    Flags: `damping:<site>:<share>` where more damping was needed, and `dead_channels:<site>:<number>` for inputs that were always
    zero (their weights are rounded to nearest). Other roundings with feedback are this one with another `choice`.
    """

    damping: float
    """The share of its diagonal that is added to `h_in`, in (0, 1]; `damping_of` says how."""
    damping_of: str = "mean"
    """What `damping` is a share of: the `mean` of the diagonal, its `median`, or each `channel`'s own entry
    (`linalg.damping_unit`)."""
    order: str = "score"
    """Which vector is rounded first: the one with the most sensitive channels, or the one that its rate is to do most harm."""
    tables: str = "weights"
    """What tables are fitted to: the `weights`, or the targets that rounding to such tables would meet (`fed_back`)."""
    needs_metric: ClassVar[bool] = True
    needs_output_metric: ClassVar[bool] = False
    uses_score: ClassVar[bool] = True
    shift: ClassVar[TargetShift | None] = None

    def __post_init__(self) -> None:
        check_damping("damping", self.damping, self.damping_of)
        if self.order not in ("score", "damage"):
            raise UserError(f"compensation.order must be score or damage, got {self.order!r}")
        if self.tables not in ("weights", "fed_back"):
            raise UserError(f"compensation.tables must be weights or fed_back, got {self.tables!r}")

    @property
    def fits_targets(self) -> bool:
        return self.tables == "fed_back"

    def met(
        self, weight: Float[Tensor, "out in"], metric: Metric, slices: Sequence[FittedSlice], score: Float[Tensor, "in"]
    ) -> Float[Tensor, "out in"]:
        """See `FitsTargets`."""
        targets = weight.float().clone()
        self._ldlq(weight, metric.to(weight.device), slices, score, [], targets)
        return targets

    def priority(self, score: Float[Tensor, "in"], slices: Sequence[FittedSlice]) -> Float[Tensor, "in"]:
        """What decides which vector is rounded first, by `order`."""
        return score if self.order == "score" else expected_damage(score, slices)

    def choice(self, metric: Metric, site: Site, flags: list[str]) -> Choose:
        """Return how the codes of a vector are chosen for its target; `metric` is on the weight's device."""
        return lambda encode, target, weight: encode(target)

    def round(
        self,
        weight: Float[Tensor, "out in"],
        metric: Metric | None,
        slices: Sequence[FittedSlice],
        score: Float[Tensor, "in"],
        flags: list[str],
    ) -> Sequence[Tensor]:
        assert metric is not None, "the pipeline checks needs_metric"
        return self._ldlq(weight, metric.to(weight.device), slices, score, flags)

    def _ldlq(
        self,
        weight: Float[Tensor, "out in"],
        metric: Metric,
        slices: Sequence[FittedSlice],
        score: Float[Tensor, "in"],
        flags: list[str],
        met: Float[Tensor, "out in"] | None = None,
    ) -> Sequence[Tensor]:
        choose = self.choice(metric, slices[0].channel_slice.site, flags)
        return ldlq(weight, metric, slices, self.priority(score, slices), self.damping, self.damping_of, flags, choose, met)
