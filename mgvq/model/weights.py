"""Where the weights of the layers live while a model is quantised, and the one way to write them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from mgvq.model.blocks import install
from mgvq.model.sites import linear
from mgvq.protocols import QuantizedWeight
from mgvq.types import Site


@runtime_checkable
class Weights(Protocol):
    """The weights of a model's layers. Whoever writes them has called `unchanged`, which puts them back."""

    @property
    def streamed(self) -> bool:
        """Whether those of a few blocks alone are in memory, so that nobody may hold the numbers of all layers."""
        ...

    def install(self, decoded: Mapping[Site, Tensor], stored: Mapping[Site, QuantizedWeight]) -> None:
        """Let layers compute with `decoded`, (out, in) each; `stored` is what `decoded` was decoded from, to the bit."""
        ...

    def unchanged(self, sites: Sequence[Site]) -> AbstractContextManager[Mapping[Site, Tensor]]:
        """Gives copies of the present weights of `sites`, which these have again afterwards, whatever happens inside."""
        ...

    def at_full_precision(self, weights: Mapping[Site, Tensor]) -> AbstractContextManager[None]:
        """Inside, layers compute with `weights`, those of full precision, and afterwards with what they have now."""
        ...

    def bias(self, site: Site) -> Tensor | None:
        """The layer's bias."""
        ...

    def whole_graph(self, block: str) -> AbstractContextManager[None]:
        """Inside, a pass of the block keeps its own graph, whatever goes in."""
        ...


class InModel:
    """All weights are the parameters of a model that is in memory."""

    streamed = False

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def install(self, decoded: Mapping[Site, Tensor], stored: Mapping[Site, QuantizedWeight]) -> None:
        install(self._model, decoded)

    @contextmanager
    def unchanged(self, sites: Sequence[Site]) -> Iterator[Mapping[Site, Tensor]]:
        present = {site: linear(self._model, site).weight.detach().clone() for site in sites}
        try:
            yield present
        finally:
            install(self._model, present)

    @contextmanager
    def at_full_precision(self, weights: Mapping[Site, Tensor]) -> Iterator[None]:
        with self.unchanged(list(weights)):
            install(self._model, weights)
            yield

    def bias(self, site: Site) -> Tensor | None:
        return linear(self._model, site).bias

    def whole_graph(self, block: str) -> AbstractContextManager[None]:
        return nullcontext()  # it always does
