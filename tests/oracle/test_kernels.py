"""Products with packed weights against the decoded weight and a matrix product in float64, for every format and odd sizes."""

import pickle
from copy import deepcopy

import pytest
import torch

from mgvq.checkpoint.linear import PackedLinear
from mgvq.checkpoint.load import FORMATS
from mgvq.formats.columns import ColumnWeight
from mgvq.formats.exponent import ExponentWeight
from mgvq.formats.grid import GridWeight, pack_channels
from mgvq.formats.grouped import GroupedWeight, pack_groups
from mgvq.formats.lattice import LatticeWeight
from mgvq.formats.outliers import Outliers, OutlierWeight
from mgvq.formats.packing import pack
from mgvq.formats.rotated import RotatedWeight
from mgvq.formats.scalar import ScalarWeight
from mgvq.formats.trellis import TrellisWeight
from mgvq.formats.vector import VectorWeight, store_table
from mgvq.kernels import workers
from mgvq.kernels.linear import FEW, has_kernel
from mgvq.lattice.coding import STAGES
from mgvq.rng import generator
from mgvq.trellis.code import STEPS, trellis_code

DRAWS = generator(0, "kernels")


def normal(*shape):
    return torch.randn(*shape, generator=DRAWS)


def integers(top, *shape):
    return torch.randint(top, shape, generator=DRAWS, dtype=torch.int32)


def scalar(shape, bits, group_size):
    groups = -(-shape[1] // group_size)
    scales = (normal(shape[0], groups).abs() + 0.1).half()
    return ScalarWeight(integers(2**bits, *shape), integers(2**bits, shape[0], groups), scales, bits, group_size)


def grid(shape, bits, scale_bits, group_size, stretched):
    channels = pack_channels(integers(8, shape[1])) if stretched else None
    scales = integers(2**scale_bits, shape[0], -(-shape[1] // group_size))
    span = torch.tensor([0.1, 0.7]).half()
    return GridWeight(integers(2**bits, *shape), scales, span, bits, scale_bits, group_size, channels)


def vector(shape, length, number, kind="fp16", subspaces=1, stages=1, scale=None):
    codes = integers(number, shape[0], -(-shape[1] // length), stages)
    stored = [store_table(normal(number, length), kind) for _ in range(subspaces * stages)]
    step = torch.stack([s for _, s in stored]) if kind == "int8" else None
    return VectorWeight(codes, torch.stack([t for t, _ in stored]), shape[1], step, scale)


def trellis(shape, rate=2.0, state_bits=12, values="hybrid"):
    code = trellis_code(rate, state_bits, values)
    codes = integers(256, -(-shape[0] // 16), -(-shape[1] // 16), code.num_bytes(256)).to(torch.uint8)
    return TrellisWeight(codes, code, torch.tensor(0.3).half(), *shape)


def lattice(shape, bits):
    codes = torch.stack([integers(2**width, shape[0], -(-shape[1] // 8)) for width in STAGES[bits]], 2)
    return LatticeWeight(codes, torch.tensor([0.5, 0.25])[: len(STAGES[bits])].half(), bits, shape[1])


def grouped(make, num_in=45, num_groups=3):
    group = torch.cat([torch.arange(num_groups), integers(num_groups, num_in - num_groups)])
    return GroupedWeight(tuple(make(n) for n in torch.bincount(group).tolist()), pack_groups(group), num_in)


def rotated(inner, within="layer", inputs=True, outputs=True):
    signs = [pack(integers(2, n), 1) if turned else None for n, turned in zip(inner.shape[::-1], (inputs, outputs), strict=True)]
    return RotatedWeight(inner, *signs, within)


def with_outliers(rest, number):
    total = rest.shape[0] * rest.shape[1]
    places = torch.randperm(total, generator=DRAWS)[:number].sort().values
    return OutlierWeight(rest, Outliers.of(places, 9 * normal(number), 0, rest.shape))


WEIGHTS = {
    **{f"scalar {bits} by {size}": scalar((9, 72), bits, size) for bits in (1, 2, 3, 4, 8) for size in (3, 16, 72)},
    "scalar, an odd row": scalar((9, 71), 2, 64),
    "scalar, many bytes a group": scalar((5, 200), 2, 128),
    "grid": grid((9, 72), 2, 4, 16, stretched=False),
    "grid, stretched, odd": grid((7, 45), 3, 3, 8, stretched=True),
    "grid of 8 bits": grid((7, 45), 8, 8, 45, stretched=True),
    "k-means 256 x 4": vector((1100, 200), 4, 256),
    "k-means 256 x 4, padded": vector((300, 67), 4, 256, "int8", scale=torch.tensor(0.5).half()),
    "k-means 16 x 2": vector((33, 72), 2, 16),
    "k-means 16 x 2, an odd row": vector((33, 71), 3, 16),
    "k-means 200 x 4, a table with a gap": vector((300, 64), 4, 200),
    "k-means 64 x 3": vector((100, 70), 3, 64, "int8"),
    "k-means 1,024 x 5": vector((1030, 17), 5, 1024),
    "k-means beyond look-up": vector((11, 530), 8, 300),
    "product": vector((40, 61), 4, 16, subspaces=3),
    "product beyond look-up": vector((9, 61), 4, 16, "int8", subspaces=3, stages=2),
    "residual": vector((300, 61), 8, 256, stages=2),
    "columns": ColumnWeight(vector((72, 61), 8, 256)),
    "columns of a small table": ColumnWeight(vector((1100, 61), 8, 16, subspaces=2)),
    "columns, two stages": ColumnWeight(vector((45, 30), 3, 16, "int8", subspaces=2, stages=2, scale=torch.tensor(2.0).half())),
    **{f"trellis {rate} bits, {bits}": trellis((35, 45), rate, bits) for rate in STEPS for bits in (8, 12)},
    "trellis of 16 bits": trellis((16, 40), 3.0, 16),
    "trellis, computed": trellis((16, 40), 2.0, 10, "computed"),
    **{f"lattice {bits}": lattice((21, 531), bits) for bits in STAGES},
    "exponent": ExponentWeight(vector((40, 64), 4, 16), 20),
    "grouped": grouped(lambda n: vector((20, n), 2, 16)),
    "grouped, of several": grouped(lambda n: ExponentWeight(scalar((20, n), 2, 8), 3)),
    "rotated": rotated(trellis((48, 96))),
    "rotated, odd": rotated(vector((45, 77), 2, 16)),
    "rotated inputs": rotated(lattice((24, 40), 2), outputs=False),
    "rotated outputs": rotated(lattice((24, 40), 3), inputs=False),
    "rotated within groups": rotated(grouped(lambda n: vector((20, n), 2, 16)), "group"),
    "outliers": with_outliers(vector((40, 64), 2, 16), 30),
    "outliers of a rotated": with_outliers(rotated(trellis((35, 45))), 50),
    "no outliers": with_outliers(scalar((9, 24), 2, 8), 0),
}


def layer_of(weight, bias=None):
    return PackedLinear(FORMATS[weight.format], weight.settings(), weight.tensors(), bias)


def expected(layer, inputs):
    exact = inputs.double() @ layer.weight.double().T
    return exact if layer.bias is None else exact + layer.bias.double()


def assert_close(outputs, exact, places=1e-5):
    size = exact.abs().max() if exact.numel() else 1.0
    torch.testing.assert_close(outputs.double() / size, exact / size, rtol=0, atol=places)


def test_every_format_is_here():
    assert {weight.format for weight in WEIGHTS.values()} == set(FORMATS)
    assert all(hasattr(kind, "multiply") for kind in FORMATS.values())


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_a_kernel_equals_the_decoded_product(name, num_tokens):
    layer = layer_of(WEIGHTS[name], bias=torch.nn.Parameter(normal(WEIGHTS[name].shape[0]), requires_grad=False))
    inputs = normal(num_tokens, layer.in_features)
    assert has_kernel(inputs, layer)
    assert_close(layer(inputs), expected(layer, inputs))


@pytest.mark.parametrize("name", WEIGHTS)
def test_on_the_meta_device_a_layer_has_a_weight_without_numbers(name):
    """transformers asks for it while a model is loaded, before the layer has what is stored."""
    layer = layer_of(WEIGHTS[name])
    shape = layer.weight.shape
    layer.to("meta")
    assert layer.weight.is_meta
    assert layer.weight.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (1,), (1, 1), (2, 3), (FEW + 1,)])
def test_shapes_and_dtypes(dtype, shape):
    layer = layer_of(WEIGHTS["k-means 16 x 2"])
    inputs = normal(*shape, layer.in_features).to(dtype)
    outputs = layer(inputs)
    assert outputs.dtype == dtype
    assert outputs.shape == (*shape, layer.out_features)
    assert_close(outputs, expected(layer, inputs), 1e-2 if dtype.itemsize == 2 else 1e-5)


def test_a_vector_alone_and_inputs_that_do_not_lie_in_a_row():
    layer = layer_of(WEIGHTS["rotated"])
    inputs = normal(layer.in_features, 3).T
    assert_close(layer(inputs), expected(layer, inputs))
    assert_close(layer(inputs[0]), expected(layer, inputs[0]))


def test_gradients_pass_as_through_a_linear_layer():
    layer, inputs = layer_of(WEIGHTS["residual"]), normal(2, 61).requires_grad_()
    assert not has_kernel(inputs, layer)
    layer(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, layer.weight.sum(0).expand(2, -1))


@pytest.mark.parametrize("name", ["k-means 256 x 4", "lattice 3", "scalar, an odd row", "columns", "rotated"])
def test_threads_change_nothing(name, monkeypatch):
    monkeypatch.setattr(workers, "_LEAST", 1)
    layer, threads = layer_of(WEIGHTS[name]), torch.get_num_threads()
    inputs, outputs = normal(2, layer.in_features), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            outputs.append(layer(inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_what_is_not_a_number_stays_so():
    layer = layer_of(WEIGHTS["k-means 256 x 4"])
    inputs = normal(2, layer.in_features)
    inputs[0, 5] = torch.nan
    outputs = layer(inputs)
    assert outputs[0].isnan().all()
    assert outputs[1].isfinite().all()


def test_a_format_without_a_kernel_is_decoded():
    class Plain:
        load = staticmethod(VectorWeight.load)

    weight = WEIGHTS["product"]
    layer = PackedLinear(Plain, weight.settings(), weight.tensors(), None)
    inputs = normal(3, layer.in_features)
    assert not has_kernel(inputs, layer)
    assert_close(layer(inputs), expected(layer, inputs))


def test_copies_compute_the_same():
    layer = layer_of(WEIGHTS["outliers of a rotated"])
    inputs = normal(1, layer.in_features)
    for other in (deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(inputs), layer(inputs))


@pytest.mark.parametrize("stages", [1, 2])
def test_a_layer_of_two_bits_takes_a_seventh_of_fp16(stages):
    """k-means 256 x 4 and residual 2 x 256 x 8; after a call too, which leaves nothing behind in the layer."""
    layer = layer_of(vector((1024, 1024), 4 * stages, 256, stages=stages))
    layer(normal(1, 1024))
    held = sum(t.nbytes for t in [*layer.buffers(), *layer.parameters()])
    assert held <= 2 * 1024 * 1024 / 7
