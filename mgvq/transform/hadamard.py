"""Randomised Hadamard rotations of a layer's inputs and outputs: they make its weights Gaussian and spread outliers (QuIP#)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mgvq.errors import UserError
from mgvq.formats.rotated import RotatedWeight, pack_signs
from mgvq.protocols import QuantizedWeight
from mgvq.rng import generator
from mgvq.rotation import Rotation, random_rotation, rotate_factor, rotate_matrix, rotate_matrix_back
from mgvq.types import Kronecker, Site, SiteStats

Side = Literal["in", "out", "both"]


@dataclass(frozen=True, kw_only=True)
class LayerRotation:
    """`W' = U W V^T` of one layer, with the stored signs of U and V; None: that side stays as it is."""

    outputs: Rotation | None
    inputs: Rotation | None
    signs_out: UInt8[Tensor, "out_bytes"] | None
    signs_in: UInt8[Tensor, "in_bytes"] | None  # the same object for all layers that read the same activations
    within: str

    def weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """A weight, or a gradient with respect to it, in the turned basis; float32, rounded once."""
        return rotate_matrix(weight.double(), self.outputs, self.inputs).float()

    def weight_back(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The inverse of `weight`."""
        return rotate_matrix_back(weight, self.outputs, self.inputs)

    def input_factor(self, factor: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
        """`V H V^T`."""
        return factor if self.inputs is None else rotate_factor(factor, self.inputs).float()

    def output_factor(self, factor: Float[Tensor, "out out"]) -> Float[Tensor, "out out"]:
        """`U H U^T`."""
        return factor if self.outputs is None else rotate_factor(factor, self.outputs).float()

    def statistics(self, stats: SiteStats) -> SiteStats:
        """The statistics that the turned layer would have had.

        The saliency is left as it is: it compares modalities, not channels. Raises UserError for Grams of several groups of
        output channels (curvature=guided) where outputs are turned, which have no equivalent there.
        """
        channel_gram = stats.channel_gram
        if channel_gram is not None:
            if self.outputs is not None and len(channel_gram) > 1:
                raise UserError(
                    "curvature=guided weighs groups of output channels, which transform.sides=out and both mix: set "
                    "transform.sides=in, or curvature.num_groups=1."
                )
            channel_gram = torch.stack([self.input_factor(gram) for gram in channel_gram])
        return replace(
            stats,
            gram={m: self.input_factor(gram) for m, gram in stats.gram.items()},
            fisher={m: self.output_factor(fisher) for m, fisher in stats.fisher.items()},
            gradient=None if stats.gradient is None else self.weight(stats.gradient),
            channel_gram=channel_gram,
            sequence=self._kronecker(stats.sequence),
            token=self._kronecker(stats.token),
        )

    def _kronecker(self, pair: Kronecker | None) -> Kronecker | None:
        return None if pair is None else Kronecker(self.input_factor(pair.h_in), self.output_factor(pair.h_out))

    def stored(self) -> Sequence[UInt8[Tensor, "bytes"]]:
        """What has to be stored for the transform; a tensor that several layers hold is stored once."""
        return [signs for signs in (self.signs_in, self.signs_out) if signs is not None]

    def wrap(self, weight: QuantizedWeight) -> RotatedWeight:
        """The stored weight of the turned layer as one of the layer itself."""
        return RotatedWeight(weight, self.signs_in, self.signs_out, self.within)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Hadamard:
    """`H_n S` for every n, S random signs (`mgvq.rotation`); layers that read the same activations share the one of their inputs.

    `within=group` turns each channel group by itself, so that the groups, and the bits that each gets, keep their meaning.
    """

    sides: Side
    within: Literal["layer", "group"]
    seed: int

    def __post_init__(self) -> None:
        if self.sides not in ("in", "out", "both"):
            raise UserError(f"transform.sides must be in, out or both, got {self.sides!r}")
        if self.within not in ("layer", "group"):
            raise UserError(f"transform.within must be layer or group, got {self.within!r}")
        if self.within == "group" and self.sides == "out":
            raise UserError("transform.within=group has no effect with transform.sides=out: groups are of input channels.")

    def __call__(self, sites: Sequence[Site], groups: Mapping[Site, Int[Tensor, "_"]] | None) -> Mapping[Site, LayerRotation]:
        """A rotation for each layer; `groups` are those of the input channels, None where they do not matter."""
        inputs = {s.reads: self._inputs(s, groups[s] if groups else None) for s in sites} if self.sides != "out" else {}
        packed = {reads: pack_signs(rotation) for reads, rotation in inputs.items()}
        rotations = {}
        for site in sites:
            outputs = None
            if self.sides != "in":
                outputs = random_rotation([torch.arange(site.out_features)], generator(self.seed, "hadamard", site.name, "out"))
            rotations[site] = LayerRotation(
                outputs=outputs,
                inputs=inputs.get(site.reads),
                signs_out=None if outputs is None else pack_signs(outputs),
                signs_in=packed.get(site.reads),
                within=self.within,
            )
        return rotations

    def _inputs(self, site: Site, groups: Int[Tensor, "in"] | None) -> Rotation:
        numbers = torch.zeros(site.in_features, dtype=torch.int64) if groups is None else groups
        blocks = [torch.nonzero(numbers == g).flatten() for g in range(int(numbers.max()) + 1)]
        return random_rotation([block for block in blocks if len(block)], generator(self.seed, "hadamard", site.reads, "in"))
