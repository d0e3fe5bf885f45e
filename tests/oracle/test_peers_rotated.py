"""YAQA, QuIP# and QTIP, each as its preset makes it from tokens to codes, against a slow textbook version.

YAQA's formulas were read where docs/method.md says; QuIP#'s E8P and block LDLQ in arXiv 2402.04396v2, sections 4.1 to 4.3; QTIP's
codes, tail-biting and use of block LDLQ in arXiv 2406.11235, sections 3.1, 3.2 and 4.
"""

import torch
from textbook import (
    NUM_IN,
    NUM_OUT,
    SEEDS,
    SMALL_TILES,
    damped,
    layer,
    one,
    preset,
    quantized,
    rotated,
    same_codes,
    table_of,
    unit_lower,
)

from mgvq.distortion import measured
from mgvq.lattice.points import e8p_points


@SEEDS
def test_yaqa(seed):
    """Method 2.5: W^ = Q(W + L_O'^T D L_I' + L_O'^T D + D L_I'), tiles of one row and two columns from the last corner."""
    item = layer(seed)
    (found,), (codebook,) = quantized(preset("method=yaqa", *SMALL_TILES), item)
    table = table_of(codebook)[0]
    gradients = [g.T @ x for g, x in zip(item.g.double(), item.x.double(), strict=True)]
    h_out, h_in = (damped(sum(parts)) for parts in ([G @ G.T for G in gradients], [G.T @ G for G in gradients]))
    rows = h_out.diagonal().argsort(descending=True).flip(0)  # the one of most curvature is rounded first, hence last
    columns = torch.arange(NUM_IN).view(-1, 2).flip(0).flatten()
    weight = item.weight.double()[rows][:, columns]
    lower_out = unit_lower(h_out[rows][:, rows], 1)[0]
    lower_in, blocks = unit_lower(h_in[columns][:, columns], 2)
    strict_out, strict_in = (lower - torch.eye(len(lower), dtype=torch.float64) for lower in (lower_out, lower_in))
    delta, value = torch.zeros_like(weight), torch.zeros_like(weight)
    for j in reversed(range(NUM_IN // 2)):
        tile = slice(2 * j, 2 * j + 2)
        for r in reversed(range(NUM_OUT)):
            feedback = strict_out.T @ delta @ strict_in + strict_out.T @ delta + delta @ strict_in
            error = weight[r, tile] + feedback[r, tile] - table
            value[r, tile] = table[((error @ blocks[j]) * error).sum(1).argmin()]
            delta[r, tile] = weight[r, tile] - value[r, tile]
    expected = torch.empty_like(value)
    expected[rows[:, None], columns] = value
    same_codes(found, expected)


@SEEDS
def test_yaqa_with_its_code(seed):
    """The same with tiles of 16 x 16 trellis codes, rotated on both sides; rows that fill up the last tile are zero."""
    item, method = (
        layer(seed, num_out=40, num_in=32),
        preset("method=yaqa", "sensitivity=uniform", "codebook.state_bits=8", "codebook.values=computed"),
    )
    (found,), (codebook,) = quantized(method, item)
    turned, turn = rotated(method, item)
    gradients = [g.T @ x for g, x in zip(turned.g.double(), turned.x.double(), strict=True)]
    h_out, h_in = (damped(sum(parts), 0.1) for parts in ([G @ G.T for G in gradients], [G.T @ G for G in gradients]))
    h_out = torch.block_diag(h_out, torch.eye(8, dtype=torch.float64))
    columns = torch.arange(32).view(-1, 16).flip(0).flatten()
    weight = torch.nn.functional.pad(turned.weight.double(), (0, 0, 0, 8))[:, columns]
    lower_out, lower_in = unit_lower(h_out, 16)[0], unit_lower(h_in[columns][:, columns], 16)[0]
    strict_out, strict_in = (lower - torch.eye(len(lower), dtype=torch.float64) for lower in (lower_out, lower_in))
    delta, value = torch.zeros_like(weight), torch.zeros_like(weight)
    for j in (1, 0):
        for r in (2, 1, 0):
            rows, across = slice(16 * r, 16 * r + 16), slice(16 * j, 16 * j + 16)
            feedback = strict_out.T @ delta @ strict_in + strict_out.T @ delta + delta @ strict_in
            aim = (weight + feedback)[rows, across].float()
            value[rows, across] = codebook.encode(aim[:, None], 0, None)[1][:, 0].double()
            delta[rows, across] = weight[rows, across] - value[rows, across]
    expected = torch.empty_like(value)
    expected[:, columns] = value
    same_codes(found, turn.weight_back(expected[:40].float()).double())


def block_ldlq(weight, hessian, length, choose):
    """QuIP#, section 4.1, from the first vector to the last: each at its weights and what is fed back of those before it."""
    columns = torch.arange(len(hessian)).view(-1, length).flip(0).flatten()
    weight, lower = weight.double()[:, columns], unit_lower(hessian[columns][:, columns], length)[0]
    value = torch.zeros_like(weight)
    for j in reversed(range(len(columns) // length)):
        own = slice(j * length, (j + 1) * length)
        later = slice((j + 1) * length, None)
        value[:, own] = choose(weight[:, own] + (weight - value)[:, later] @ lower[later, own])
    expected = torch.empty_like(value)
    expected[:, columns] = value
    return expected


@SEEDS
def test_quip_sharp(seed):
    """Eight weights at a time, the nearest of all 65,536 points in plain distance, at the scale that serves a Gaussian best."""
    item, method = layer(seed, num_out=16, num_in=32), preset("method=quip_sharp")
    turned, turn = rotated(method, item)
    scale = float((turned.weight.double().square().mean().sqrt() * measured("lattice", 2.0).scales[0]).half())
    points = e8p_points(torch.arange(2**16)).double() * scale

    def choose(aims):
        return points[(points.square().sum(1) - 2 * aims @ points.T).argmin(1)]

    expected = block_ldlq(turned.weight, damped(turned.moment()), 8, choose)
    same_codes(one(method, item), turn.weight_back(expected.float()).double())


@SEEDS
def test_qtip(seed):
    """Blocks of 16 columns; 16 rows of one are a sequence of 256 weights, which the trellis search codes (test_trellis.py)."""
    item, method = layer(seed, num_out=32, num_in=32), preset("method=qtip", "codebook.state_bits=8")
    turned, turn = rotated(method, item)
    (found,), (codebook,) = quantized(method, item)

    def choose(aims):
        return codebook.encode(aims[:, None].float(), 0, None)[1][:, 0].double()

    expected = block_ldlq(turned.weight, damped(turned.moment()), 16, choose)
    same_codes(found, turn.weight_back(expected.float()).double())
