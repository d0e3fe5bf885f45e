"""Peers on grids of scalars, each as its preset makes it from tokens to codes, against a slow textbook version.

The formulas of GPTQ, AWQ, MBQ, VLMQ and FOEM were read where docs/method.md says.
"""

from dataclasses import replace

import torch
from textbook import (
    NUM_IN,
    SAMPLES,
    SEEDS,
    TOKENS,
    by_size,
    damped,
    gptq_loop,
    grid_scales,
    layer,
    loud,
    nearest_level,
    nearest_on_grid,
    normal,
    one,
    preset,
    quantized,
    quiet_images,
    same_codes,
    weighted_moment,
)


@SEEDS
def test_rtn(seed):
    item = layer(seed)
    same_codes(one(preset("method=rtn"), item), nearest_on_grid(item.weight, grid_scales(item.weight, 4)))


@SEEDS
def test_gptq(seed):
    item = layer(seed)
    hessian = item.moment()
    scales = grid_scales(item.weight, 4, hessian.diagonal())
    expected = gptq_loop(item.weight, hessian, by_size(hessian.diagonal()), lambda column: nearest_level(column, scales))
    same_codes(one(preset("method=gptq"), item), expected)


def awq_search(layers, x, token_weights):
    """20 exponents; the outputs of all layers that read x, token by token."""
    power = (token_weights[:, None] * x.square()).sum(0) / token_weights.sum()
    best = None
    for exponent in (i / 20 for i in range(20)):
        wanted = power.sqrt() ** exponent
        steps = (2 * (wanted.max() / wanted).log2()).round().clamp(max=7)
        stretch = 2 ** ((steps.max() - steps) / 2)
        tried, loss = [], 0.0
        for item in layers:
            wide = (item.weight * stretch.float()).float()
            value = nearest_on_grid(wide, grid_scales(wide, 2)) / stretch
            for token, weight in zip(x, token_weights, strict=True):
                loss += float(weight * ((value - item.weight.double()) @ token).square().sum())
            tried.append(value)
        if best is None or loss < best[0] * (1 - 1e-9):
            best = loss, tried, exponent
    return best


@SEEDS
def test_awq_two_layers_share_an_exponent(seed):
    first = loud(layer(seed))
    second = replace(first, weight=normal(5, NUM_IN, seed=seed + 9), g=first.g[..., :5])
    _, expected, exponent = awq_search([first, second], first.all_x, torch.ones(SAMPLES * TOKENS, dtype=torch.float64))
    found, _ = quantized(preset("method=awq"), first, second)
    assert exponent > 0
    for value, textbook in zip(found, expected, strict=True):
        same_codes(value, textbook)


@SEEDS
def test_mbq(seed):
    """Its loss is r |dy| of an image token, of which the square has r^2."""
    item = quiet_images(loud(layer(seed)))
    half = TOKENS // 2
    ratio = item.g[:, :half].abs().mean() / item.g[:, half:].abs().mean()  # one layer: its own median
    weights = torch.cat([ratio.square().expand(SAMPLES, half), torch.ones(SAMPLES, half)], 1).double().flatten()
    same_codes(one(preset("method=mbq"), item), awq_search([item], item.all_x, weights)[1][0])


@SEEDS
def test_vlmq(seed):
    item = layer(seed)
    hessian = weighted_moment(item.all_x, item.all_g.square().sum(1))
    scales = grid_scales(item.weight, 4, hessian.diagonal())
    order = by_size(item.moment().diagonal())
    same_codes(one(preset("method=vlmq"), item), gptq_loop(item.weight, hessian, order, lambda c: nearest_level(c, scales)))


@SEEDS
def test_foem(seed):
    """Every column at its weight and nine tenths of what would make up best for the errors made so far."""
    item = layer(seed)
    scales, hessian = grid_scales(item.weight, 4, item.moment().diagonal()), damped(item.moment())
    order, value = by_size(item.moment().diagonal()), item.weight.double().clone()
    for q, column in enumerate(order):
        fixed, free = order[:q], order[q:]
        error = item.weight.double()[:, fixed] - value[:, fixed]
        best = error @ hessian[fixed][:, free] @ torch.linalg.inv(hessian[free][:, free])
        value[:, column] = nearest_level(item.weight[:, column] + 0.9 * best[:, 0], scales)
    same_codes(one(preset("method=foem"), item), value)
