"""k-means vector quantisation: runs of `vector_length` input channels are indices into learned centroids."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.codebook.lloyd import kmeans, nearest
from mgvq.errors import UserError
from mgvq.formats.vector import VectorWeight, codes_bits, table_bits, to_vectors
from mgvq.rng import generator
from mgvq.types import Quantized, Rate, Site, StatsBank

_MAX_CENTROIDS = 4096


@dataclass(frozen=True, kw_only=True)
class KMeans:
    """Lloyd's k-means on the weights.

    `share`: a table for every `layer`, or one for all layers of a `kind` (q_proj, say) in a tower, each layer then with one fp16
    scale (its root mean square). `weight_power`: an input channel counts with (mean square activation)^weight_power in fit
    and assignment; 0 leaves the calibration data unused. `sample`: vectors per centroid that the fit looks at, null: all.
    """

    vector_length: int
    share: str  # layer | kind
    weight_power: float
    iterations: int
    sample: int | None
    seed: int

    def __post_init__(self) -> None:
        if not (isinstance(self.vector_length, int) and 1 <= self.vector_length <= 16):
            raise UserError(f"codebook.vector_length must be a whole number of 1 to 16, got {self.vector_length!r}")
        if self.share not in ("layer", "kind"):
            raise UserError(f"codebook.share must be layer or kind, got {self.share!r}")
        if not 0 <= self.weight_power <= 1:
            raise UserError(f"codebook.weight_power must lie in [0, 1], got {self.weight_power!r}")
        if not (isinstance(self.iterations, int) and self.iterations >= 1):
            raise UserError(f"codebook.iterations must be a whole number >= 1, got {self.iterations!r}")
        if self.sample is not None and not (isinstance(self.sample, int) and self.sample >= 1):
            raise UserError(f"codebook.sample must be a whole number >= 1 or null, got {self.sample!r}")

    def rates(self) -> Sequence[Rate]:
        widths = range(1, _MAX_CENTROIDS.bit_length())
        return [Rate(f"{self.vector_length}x{2**w}", 2**w, w / self.vector_length) for w in widths]

    def storage_bits(self, sites: Sequence[Site], rate: Rate) -> int:
        codes = sum(codes_bits((s.out_features, s.in_features), self.vector_length, rate.size) for s in sites)
        scales = 16 * len(sites) if self.share == "kind" else 0
        return codes + scales + len(self._tables(sites)) * table_bits(self.vector_length, rate.size)

    def quantize(self, weights: Mapping[Site, Tensor], rate: Rate, bank: StatsBank | None) -> Quantized:
        if self.weight_power and bank is None:
            raise UserError(
                f"codebook.weight_power={self.weight_power} weighs channels by their activations, but there are no "
                "statistics: choose curvature=input and a calibration set, or codebook.weight_power=0"
            )
        done: dict[Site, VectorWeight] = {}
        flags: list[str] = []
        for name, sites in self._tables(list(weights)).items():
            scales = {s: self._scale(weights[s]) for s in sites}
            vectors = {s: to_vectors(weights[s].float() / scales[s].float(), self.vector_length) for s in sites}
            importance = {s: self._importance(s, weights[s], bank, flags) for s in sites}
            table, num_reseeded = self._fit(name, list(vectors.values()), list(importance.values()), rate.size)
            if num_reseeded:
                flags.append(f"empty_cluster:{name}:{num_reseeded}")
            for s in sites:
                codes, _ = nearest(vectors[s], table.float(), importance[s])
                scale = scales[s] if self.share == "kind" else None
                done[s] = VectorWeight(codes.view(s.out_features, -1).int(), table, s.in_features, scale)
        return Quantized({s: done[s] for s in weights}, tuple(flags))

    def _tables(self, sites: Sequence[Site]) -> dict[str, list[Site]]:
        tables: dict[str, list[Site]] = defaultdict(list)
        for s in sites:
            tables[s.name if self.share == "layer" else f"{s.tower}.{s.kind}"].append(s)
        return tables

    def _scale(self, weight: Tensor) -> Tensor:
        if self.share == "layer":
            return torch.ones((), dtype=torch.float16, device=weight.device)
        return weight.float().square().mean().sqrt().clamp(min=2.0**-14).half()

    def _importance(self, site: Site, weight: Tensor, bank: StatsBank | None, flags: list[str]) -> Float[Tensor, "n d"] | None:
        """Weight of each coordinate; none for the padding of a row's last vector. None: all alike."""
        energy = torch.ones(site.in_features, device=weight.device)
        if self.weight_power:
            assert bank is not None
            activation = bank[site].second_moment().diagonal().clamp(min=0).to(weight.device)
            if activation.max() > 0:
                energy = (activation / activation.max()).float() ** self.weight_power
            else:
                flags.append(f"no_activation:{site.name}")
        elif site.in_features % self.vector_length == 0:
            return None
        return to_vectors(energy[None], self.vector_length).repeat(site.out_features, 1)

    def _fit(
        self, name: str, vectors: list[Tensor], importance: list[Tensor | None], num_centroids: int
    ) -> tuple[Float[Tensor, "k d"], int]:
        """The fp16 table, and how many empty clusters were moved."""
        draws = generator(self.seed, "kmeans", name)
        points = torch.cat(vectors)
        weight = None
        if any(w is not None for w in importance):  # layers that share a table may differ in whether they are padded
            weight = torch.cat([torch.ones_like(v) if w is None else w for v, w in zip(vectors, importance, strict=True)])
        if self.sample and len(points) > self.sample * num_centroids:
            chosen = torch.randperm(len(points), generator=draws)[: self.sample * num_centroids].sort().values
            chosen = chosen.to(points.device)
            points, weight = points[chosen], None if weight is None else weight[chosen]
        clusters = kmeans(points, num_centroids, draws, weight, self.iterations)
        return clusters.centroids.half(), clusters.num_reseeded
