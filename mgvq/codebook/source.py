"""The vectors that tables are fitted to: those of every channel slice of a table group, or a sample of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mgvq.codebook.lloyd import exact_sum
from mgvq.formats.vector import to_vectors

_SMALLEST_SCALE = 2.0**-14  # the smallest normal fp16 number


@dataclass(frozen=True, slots=True)
class Source:
    """The vectors of one channel slice."""

    vectors: Float[Tensor, "out v d"]
    """The rows cut into vectors, the last one padded with zeros."""
    scale: Float[Tensor, ""] | None
    """What the vectors are divided by, in fp16; None: nothing."""
    channel_weight: Float[Tensor, "v d"] | None
    """How much each coordinate counts, 0 for padding; None: all alike."""
    row_weight: Float[Tensor, "out"] | None = None
    """How much each row counts beside that, in the fit alone; None: all alike."""

    @classmethod
    def of(
        cls, weight: Float[Tensor, "out c"], channel_weight: Float[Tensor, "c"], vector_length: int, *, scaled: bool
    ) -> "Source":
        """The vectors of a weight; `scaled` divides them by its root mean square, so that slices can share a table."""
        scale = None
        if scaled:
            mean = exact_sum(weight.double().square()) / weight.numel()
            scale = torch.tensor(max(mean**0.5, _SMALLEST_SCALE), device=weight.device).half()
        vectors = to_vectors(weight, vector_length)
        if weight.shape[1] % vector_length == 0 and (channel_weight == channel_weight[0]).all():
            return cls(vectors, scale, None)
        return cls(vectors, scale, to_vectors(channel_weight[None], vector_length)[0])

    def subspace(self, subspace: int, subspaces: int) -> "Source":
        """The vectors `subspace`, `subspace + subspaces`, ... of every row."""
        channel_weight = None if self.channel_weight is None else self.channel_weight[subspace::subspaces]
        return Source(self.vectors[:, subspace::subspaces], self.scale, channel_weight, self.row_weight)


def draw(
    sources: Sequence[Source], limit: int, draws: torch.Generator
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"] | None]:
    """Take at most `limit` vectors of all sources (0: all of them), over their scales, and the weights of their coordinates.

    They are drawn with replacement, and repeated ones dropped. The weights are None where all coordinates count alike.
    """
    sizes = [s.vectors.shape[0] * s.vectors.shape[1] for s in sources]
    total = sum(sizes)
    chosen = torch.randint(total, (limit,), generator=draws).unique() if 0 < limit < total else torch.arange(total)
    points, weight, start = [], [], 0
    for source, size in zip(sources, sizes, strict=True):
        own = chosen[(chosen >= start) & (chosen < start + size)].to(source.vectors.device) - start
        start += size
        per_row = max(1, source.vectors.shape[1])
        found = source.vectors[own // per_row, own % per_row].float()
        points.append(found if source.scale is None else found / source.scale.float())
        counts = torch.ones_like(found) if source.channel_weight is None else source.channel_weight[own % per_row]
        weight.append(counts if source.row_weight is None else counts * source.row_weight[own // per_row, None])
    plain = all(s.channel_weight is None and s.row_weight is None for s in sources)
    return torch.cat(points), None if plain else torch.cat(weight)
