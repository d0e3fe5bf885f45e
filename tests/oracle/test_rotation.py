"""Rotations against the dense matrix, and a layer's problem that keeps its value under them."""

import math

import pytest
import torch

from mgvq.rotation import (
    Rotation,
    dct,
    random_rotation,
    random_signs,
    rotate,
    rotate_back,
    rotate_factor,
    rotate_matrix,
    rotate_matrix_back,
)
from mgvq.types import Metric

SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 12, 37, 64, 72, 148, 269, 576]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def dense(signs):
    """`Sylvester (x) DCT-II` times the signs, from the definitions."""
    n = len(signs)
    power = n & -n
    m = n // power
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < power:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), sylvester)
    cosines = torch.tensor([[math.cos(math.pi * k * (i + 0.5) / m) for i in range(m)] for k in range(m)], dtype=torch.float64)
    cosines /= cosines.norm(dim=1, keepdim=True)
    return torch.kron(sylvester / math.sqrt(power), cosines) * signs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", SIZES)
def test_it_is_the_dense_matrix_and_back(n, dtype):
    signs = random_signs(n, stream(n))
    x = torch.randn(2, 3, n, generator=stream(1), dtype=dtype)
    turned = rotate(x, signs)
    assert turned.dtype == dtype
    expected = x.double() @ dense(signs).T
    assert torch.allclose(turned.double(), expected, atol=TOLERANCE[dtype])
    assert torch.allclose(rotate_back(turned, signs), x, atol=TOLERANCE[dtype])
    assert torch.allclose(rotate_back(x, signs).double(), x.double() @ dense(signs), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("n", SIZES)
def test_it_is_orthogonal(n):
    matrix = rotate(torch.eye(n, dtype=torch.float64), random_signs(n, stream()))
    assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(dct(n) @ dct(n).T, torch.eye(n, dtype=torch.float64), atol=1e-12)


def test_one_large_weight_is_spread_over_all_of_a_power_of_two():
    x = torch.zeros(512)
    x[17] = 1
    assert torch.allclose(rotate(x, random_signs(512, stream())).abs(), torch.full((512,), 512**-0.5))


def test_signs_come_from_the_stream():
    assert torch.equal(random_signs(100, stream()), random_signs(100, stream()))
    assert not torch.equal(random_signs(100, stream()), random_signs(100, stream(1)))
    assert set(random_signs(100, stream()).tolist()) == {-1.0, 1.0}
    assert abs(float(random_signs(10_000, stream()).mean())) < 0.05


def problem(num_out=12, num_in=20):
    draws = stream(5)
    weight, gradient, error = (torch.randn(num_out, num_in, generator=draws, dtype=torch.float64) for _ in range(3))
    h_in, h_out = ((x := torch.randn(n, 2 * n, generator=draws, dtype=torch.float64)) @ x.T for n in (num_in, num_out))
    return weight, gradient, error, h_in, h_out


GROUPS = {"whole": [torch.arange(20)], "groups": [torch.arange(0, 20, 3), torch.tensor([1, 4, 7, 10, 13, 16, 19]),
                                                  torch.arange(2, 20, 3)]}  # fmt: skip


def matrix_of(rotation, n):
    return rotation.apply(torch.eye(n, dtype=torch.float64)).T


@pytest.mark.parametrize("inputs", [None, "whole", "groups"])
@pytest.mark.parametrize("outputs", [False, True])
def test_a_turned_problem_has_the_same_values(inputs, outputs):
    weight, gradient, error, h_in, h_out = problem()
    v = None if inputs is None else random_rotation(GROUPS[inputs], stream(1))
    u = random_rotation([torch.arange(12)], stream(2)) if outputs else None
    v_dense = torch.eye(20, dtype=torch.float64) if v is None else matrix_of(v, 20)
    u_dense = torch.eye(12, dtype=torch.float64) if u is None else matrix_of(u, 12)
    turned = rotate_matrix(weight, u, v)
    assert torch.allclose(turned, u_dense @ weight @ v_dense.T)
    assert torch.allclose(rotate_matrix_back(turned, u, v), weight)
    new_in = h_in if v is None else rotate_factor(h_in, v)
    new_out = h_out if u is None else rotate_factor(h_out, u)
    assert torch.allclose(new_in, v_dense @ h_in @ v_dense.T)
    assert torch.allclose(new_out, u_dense @ h_out @ u_dense.T)
    assert torch.equal(new_in, new_in.T) or v is None
    before, after = Metric((h_in,), h_out).loss(error), Metric((new_in,), new_out).loss(rotate_matrix(error, u, v))
    assert after == pytest.approx(before, rel=1e-9)
    assert float((rotate_matrix(gradient, u, v) * rotate_matrix(error, u, v)).sum()) == pytest.approx(
        float((gradient * error).sum()), rel=1e-9
    )
    x = torch.randn(20, generator=stream(9), dtype=torch.float64)
    y = turned @ (x if v is None else v.apply(x))
    assert torch.allclose(y if u is None else u.apply_back(y), weight @ x)


def test_groups_stay_among_themselves():
    blocks = GROUPS["groups"]
    matrix = matrix_of(random_rotation(blocks, stream()), 20)
    for block in blocks:
        outside = torch.ones(20, dtype=torch.bool)
        outside[block] = False
        assert (matrix[block][:, outside] == 0).all()
        assert (matrix[block][:, block] != 0).any()


@pytest.mark.parametrize("blocks", [[[0, 1], [1, 2]], [[0, 1], [3]], [[0, -1]]])
def test_blocks_that_are_no_partition_are_refused(blocks):
    with pytest.raises(ValueError, match="disjoint"):
        random_rotation([torch.tensor(b) for b in blocks], stream())


def test_signs_of_another_number_are_refused():
    with pytest.raises(ValueError, match="one sign"):
        Rotation([torch.arange(3)], [torch.ones(2)])
