"""Values as bytes and back: nothing is lost, nothing is unpickled."""

import math

import numpy as np
import pytest
import torch

from mgvq.quantization.limits import Limit
from mgvq.quantization.rounding import Rounded
from mgvq.runs.entries import from_bytes, to_bytes
from mgvq.types import Site

SITE = Site("model.layers.0.q_proj", "language", "q_proj", 0, 3, 4)


def test_what_is_read_is_what_was_written() -> None:
    """Keys that are dataclasses, tuples, dtypes, NaN, and a view of a larger tensor."""
    view = torch.arange(12, dtype=torch.uint8).view(3, 4)[:, 1:]
    rounded = Rounded(
        decoded={SITE: torch.randn(3, 4).half()}, proxy={SITE: {"a": math.nan}}, limits={SITE: Limit(2.0, 0.1, 1.5)}
    )
    again, rest = from_bytes(to_bytes((rounded, [view, np.float64(2.5), None, True, "x", (), {}])))
    assert type(again) is Rounded
    assert again.limits == rounded.limits
    assert math.isnan(again.proxy[SITE]["a"])
    assert torch.equal(again.decoded[SITE], rounded.decoded[SITE])
    assert again.decoded[SITE].dtype == torch.float16
    assert torch.equal(rest[0], view)
    assert rest[1:] == [2.5, None, True, "x", (), {}]


def test_a_tensor_in_two_places_is_one_again() -> None:
    """A checkpoint stores tables that layers share once, by what they are."""
    table = torch.randn(4, 2)
    first, second = from_bytes(to_bytes([{"tables": table}, {"tables": table}]))
    assert first["tables"] is second["tables"]


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(TypeError, match="set is nothing that can be kept"):
        to_bytes({1, 2})


@pytest.mark.parametrize(
    ("module", "name"), [("os", "system"), ("mgvq.cli.run", "main"), ("not.there", "Thing"), ("mgvq.none", "A")]
)
def test_bytes_that_name_something_else_make_nothing(module: str, name: str) -> None:
    content = to_bytes(SITE).replace(b"mgvq.types", module.encode().ljust(10)[:10])
    with pytest.raises(ValueError, match=r".+"):
        from_bytes(content.replace(b'"Site\\"', f'"{name}\\"'.encode()))
    with pytest.raises(ValueError, match=r".+"):
        from_bytes(b"nothing of ours")
