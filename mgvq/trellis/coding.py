"""Sequences of weights to bits and back, by a bit-shift trellis."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mgvq.trellis.code import TrellisCode
from mgvq.trellis.values import state_values
from mgvq.trellis.viterbi import tail_biting


def encode(targets: Float[Tensor, "n t"], code: TrellisCode) -> UInt8[Tensor, "n bytes"]:
    """The bits of every sequence: those that step 0 shifts in first, lowest first; the last byte filled up with zeros.

    On the CPU, with numba's threads (`numba.set_num_threads`), whose number changes nothing. Targets are in units of the values
    (variance 1): the caller scales. Errors are summed in float32, so a target far beyond them (a thousand) blurs the others of
    its sequence. Raises ValueError for non-finite targets and lengths that the code has not (`TrellisCode.num_steps`).
    """
    num_steps = code.num_steps(targets.shape[1])
    if not torch.isfinite(targets).all():
        raise ValueError("a trellis needs finite targets")
    steps = targets.detach().float().cpu().reshape(len(targets), num_steps, code.step_weights).contiguous().numpy()
    new = tail_biting(steps, state_values(code).numpy(), code.step_bits)
    bits = new[:, :, None] >> np.arange(code.step_bits, dtype=np.uint8) & 1
    packed = np.packbits(bits.reshape(len(new), num_steps * code.step_bits), axis=1, bitorder="little")
    return torch.from_numpy(packed).to(targets.device)


def decode(codes: UInt8[Tensor, "n bytes"], code: TrellisCode, length: int) -> Float[Tensor, "n t"]:
    """What the bits of `encode` stand for, float32, exact for every device.

    The state at a step is the last L bits that were shifted in, taken around the sequence's end at its first steps (tail-biting).
    Raises ValueError where the bytes are not those of `length` weights.
    """
    num_steps, num_bytes = code.num_steps(length), code.num_bytes(length)
    if codes.shape[1] != num_bytes:
        raise ValueError(f"{length} weights take {num_bytes} bytes, found {codes.shape[1]}")
    bits = codes[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=codes.device) & 1
    bits = bits.flatten(1)[:, : num_steps * code.step_bits].unflatten(1, (num_steps, code.step_bits)).int()
    new = (bits << torch.arange(code.step_bits, dtype=torch.int32, device=codes.device)).sum(2, dtype=torch.int32)
    state = torch.zeros_like(new)
    for back in range(-(-code.state_bits // code.step_bits)):
        state |= new.roll(back, 1) << back * code.step_bits
    state &= (1 << code.state_bits) - 1
    return state_values(code).to(codes.device)[state.long()].flatten(1)
