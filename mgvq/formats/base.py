"""What all formats have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor


class Stored(ABC):
    """A weight whose decoded values are a function of what is tunable in it, its codes being what they are."""

    def decode(self) -> Float[Tensor, "out in"]:
        """The weight in float32, in the layer's own basis, exactly the same on every device."""
        return self.decoder()(self.tunable)

    @property
    @abstractmethod
    def tunable(self) -> Mapping[str, Tensor]:
        """See `mgvq.protocols.QuantizedWeight`, as for `decoder`."""

    @abstractmethod
    def decoder(self) -> Callable[[Mapping[str, Tensor]], Float[Tensor, "out in"]]: ...
