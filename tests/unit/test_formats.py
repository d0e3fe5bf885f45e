"""Stored weights decode as before saving, cost exactly the predicted bits, and min-max grids keep their error bound."""

import pytest
import torch

from mgvq.formats.scalar import ScalarWeight, min_max
from mgvq.formats.vector import VectorWeight, codes_bits, index_width, table_bits, to_vectors

SHAPES = [(3, 1), (1, 5), (5, 7), (4, 64), (2, 130)]
FP16 = 2.0**-11  # relative rounding error of fp16 outside its subnormals


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits_of(tensors):
    return 8 * sum(t.nbytes for t in tensors.values())


def vector_weight(shape, vector_length, num_centroids, scale=None):
    codes = torch.randint(num_centroids, (shape[0], -(-shape[1] // vector_length)), generator=torch.Generator().manual_seed(1))
    return VectorWeight(codes.int(), normal(num_centroids, vector_length).half(), shape[1], scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("group_size", [1, 3, 64])
def test_scalar_round_trip_and_bits(shape, bits, group_size):
    weight = min_max(normal(*shape), bits, group_size)
    loaded = ScalarWeight.load(weight.tensors(), **weight.settings())
    assert loaded.shape == weight.shape == shape
    assert torch.equal(loaded.decode(), weight.decode())
    assert bits_of(weight.tensors()) == ScalarWeight.storage_bits(shape, bits, group_size)


def test_scalar_bits_by_hand():
    # 15 codes of 3 bits: 6 bytes; 9 groups: 4 bytes of zero points and 18 of scales.
    assert ScalarWeight.storage_bits((3, 5), 3, 2) == 8 * (6 + 4 + 18)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vector_length", [1, 3, 4])
@pytest.mark.parametrize("num_centroids", [1, 3, 256])
@pytest.mark.parametrize("scaled", [False, True])
def test_vector_round_trip_and_bits(shape, vector_length, num_centroids, scaled):
    weight = vector_weight(shape, vector_length, num_centroids, torch.tensor(0.37).half() if scaled else None)
    loaded = VectorWeight.load(weight.tensors(), **weight.settings())
    assert loaded.shape == weight.shape == shape
    assert torch.equal(loaded.decode(), weight.decode())
    predicted = codes_bits(shape, vector_length, num_centroids) + table_bits(vector_length, num_centroids)
    assert bits_of(weight.tensors()) == predicted + 16 * scaled


def test_vector_bits_by_hand():
    # 3 x 3 vectors of 4 bits: 5 bytes; 16 centroids of 2 fp16: 64 bytes.
    assert (codes_bits((3, 5), 2, 16), table_bits(2, 16)) == (8 * 5, 8 * 64)
    assert [index_width(k) for k in (1, 2, 3, 4, 5, 256, 257)] == [1, 1, 2, 2, 3, 8, 9]


def test_vector_decode_by_hand():
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).half()
    codes = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    assert VectorWeight(codes, table, 3).decode().tolist() == [[1, 2, 3], [3, 4, 1]]
    scaled = VectorWeight(codes, table, 3, torch.tensor(0.5).half())
    assert scaled.decode().tolist() == [[0.5, 1, 1.5], [1.5, 2, 0.5]]


def test_vector_decode_ignores_what_lies_in_the_padding():
    table = torch.tensor([[1.0, 2.0, 3.0], [4.0, torch.nan, torch.inf]]).half()
    codes = torch.tensor([[0, 1]], dtype=torch.int32)
    assert VectorWeight(codes, table, 4).decode().tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("vector_length", [1, 2, 3, 4])
def test_to_vectors_pads_each_row_with_zeros(vector_length):
    weight = normal(3, 5)
    rows = to_vectors(weight, vector_length).view(3, -1)
    assert torch.equal(rows[:, :5], weight)
    assert (rows[:, 5:] == 0).all()
    assert 0 <= rows.shape[1] - 5 < vector_length


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [3, 16])
@pytest.mark.parametrize(("spread", "shift"), [(1.0, 0.0), (0.02, 0.01), (30.0, -50.0), (1.0, 5.0)])
def test_no_weight_is_off_by_more_than_half_a_step(bits, group_size, spread, shift):
    """The last step of a range may be cut by what rounding the scale to fp16 takes from `top` steps."""
    weight = spread * normal(8, 16) + shift
    quantized = min_max(weight, bits, group_size)
    step = quantized.scales.double().repeat_interleave(group_size, 1)[:, :16]
    bound = step / 2 + (2**bits - 1) * FP16 * step + 1e-6 * weight.abs().max()
    assert ((quantized.decode().double() - weight).abs() <= bound).all()


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_grid_reaches_from_minimum_to_maximum(bits):
    """The bound above would hold for a step of any size; this one is the smallest that covers the range with 0."""
    weight = normal(8, 16)
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    step = min_max(weight, bits, 16).scales[:, 0].float()
    assert torch.allclose(step * (2**bits - 1), high - low, rtol=2 * FP16)  # rounded up, not to nearest


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shift", [-2.0, -0.3, 0.0, 0.4, 3.0])
def test_zero_is_exact(bits, shift):
    weight = normal(6, 10) + shift
    weight[:, ::3] = 0
    assert (min_max(weight, bits, 5).decode()[:, ::3] == 0).all()


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("value", [-3.3, -0.01, 0.07, 1.0, 12.3])
def test_constant_rows_are_met_up_to_fp16(bits, value):
    weight = torch.full((2, 7), value)
    assert torch.allclose(min_max(weight, bits, 3).decode(), weight, rtol=2 * FP16, atol=0)


@pytest.mark.parametrize("bits", [1, 8])
def test_all_zero_rows_stay_zero_beside_others(bits):
    weight = normal(3, 8)
    weight[1] = 0
    quantized = min_max(weight, bits, 4)
    assert (quantized.decode()[1] == 0).all()
    assert (quantized.scales > 0).all()


@pytest.mark.parametrize("bits", [1, 8])
def test_codes_use_the_bits_and_no_more(bits):
    quantized = min_max(normal(4, 600), bits, 600)
    for row in quantized.codes:
        assert int(row.max()) - int(row.min()) == 2**bits - 1
    assert 0 <= int(quantized.zeros.min()) <= int(quantized.zeros.max()) < 2**bits


@pytest.mark.parametrize("shift", [-5.0, 5.0])
def test_a_short_last_group_is_quantised_as_if_it_were_alone(shift):
    weight = normal(4, 8) + shift
    short = min_max(weight, 3, 5).decode()[:, 5:]
    assert torch.equal(short, min_max(weight[:, 5:], 3, 3).decode())


@pytest.mark.parametrize("size", [3e-7, 1e-6, 1e-5])
def test_tiny_weights_keep_the_bound_where_the_scale_is_subnormal(size):
    """A scale that is rounded down too far would cut off the largest weights."""
    weight = size * normal(32, 16)
    quantized = min_max(weight, 8, 16)
    error = (quantized.decode().double() - weight).abs()
    assert (error <= quantized.scales.double()).all()
