"""Gradient descent over tensors that are stored in few bits: every loss is that of the tensors as they will be stored."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mgvq.checks import whole_number
from mgvq.errors import UserError
from mgvq.progress import Counted, progress
from mgvq.protocols import Descended, Objective
from mgvq.rng import generator

_WARM_UP = 0.1  # the share of the steps in which the learning rate rises to its full size; behind that it falls as a cosine


@dataclass(frozen=True, kw_only=True)
class Descent:
    """AdamW without decay: a fixed number of steps, one batch each, and the best state that a check on held-out samples has seen,
    the start among them (docs/method.md, eq. (tuning)).

    A tensor moves in units of its own root mean square, so that one learning rate serves tables, scales and norms alike; a tensor
    of zeros stays. Its value is rounded to the dtype that it is stored in before any loss is taken, and the gradient passes that
    rounding as it is.
    """

    steps: int
    """How many batches are learned from, 1 or more; they come in a random order, epoch after epoch."""
    learning_rate: float
    """The largest step, as a share of a tensor's root mean square: > 0 and below 1."""
    checks: int
    """How often the held-out samples are asked, at equal distances and in the end."""
    seed: int
    """Of the order of the batches."""

    def __post_init__(self) -> None:
        whole_number("tuning.steps", self.steps, least=1)
        whole_number("tuning.checks", self.checks, least=1, most=self.steps, why="More checks than steps there cannot be.")
        whole_number("tuning.seed", self.seed)
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1:
            raise UserError(f"tuning.learning_rate must be a number above 0 and below 1, got {rate!r}")

    def descend(self, name: str, start: Mapping[str, Shaped[Tensor, "..."]], objective: Objective) -> Descended:
        """The best of the states that were checked, as it is stored; `name` is that of the random stream.

        A loss that is not finite ends the descent, with the flag `tuning_ended:NAME:STEP`. Without tensors, batches, or a finite
        loss on held-out samples (none of them reaches a block, say) nothing moves, with the flag `not_tuned:NAME`.
        """
        moving = {key: tensor for key, tensor in start.items() if float(tensor.float().square().mean()) > 0}
        clock, tokens = time.perf_counter(), 0
        floats = {key: tensor.float() for key, tensor in start.items()}
        best, least = dict(start), objective.heldout(floats)
        rows: list[dict[str, int | float]] = [
            {"step": 0, "tokens": 0, "seconds": time.perf_counter() - clock, "loss": math.nan, "heldout_loss": least}
        ]
        flags: list[str] = []
        sizes = {key: tensor.float().square().mean().sqrt() for key, tensor in moving.items()}
        shares = {key: torch.zeros(tensor.shape, device=tensor.device, requires_grad=True) for key, tensor in moving.items()}
        if not (shares and objective.num_batches and math.isfinite(least)):
            return Descended(best, rows, [f"not_tuned:{name}"])

        def values() -> dict[str, Tensor]:
            """In float32, as they will be stored, with a graph to the shares."""
            moved = {key: moving[key].float() + sizes[key] * share for key, share in shares.items()}
            return {**floats, **{key: _straight_through(value, moving[key]) for key, value in moved.items()}}

        optimiser = torch.optim.AdamW(list(shares.values()), lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        checked = {round(self.steps * (i + 1) / self.checks) for i in range(self.checks)}
        since: list[float] = []
        order = Counted(self._order(name, objective.num_batches), self.steps)
        for step, batch in enumerate(progress(order, "steps of tuning"), start=1):
            with torch.enable_grad():
                loss = objective.loss(values(), batch)
            if not torch.isfinite(loss):
                flags.append(f"tuning_ended:{name}:{step}")
                break
            optimiser.param_groups[0]["lr"] = self.learning_rate * _schedule(step, self.steps)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            since.append(loss.item())
            tokens += objective.tokens(batch)
            if step in checked:
                with torch.no_grad():
                    state = values()
                found, mean = objective.heldout(state), sum(since) / len(since)
                seconds = time.perf_counter() - clock
                rows.append({"step": step, "tokens": tokens, "seconds": seconds, "loss": mean, "heldout_loss": found})
                since.clear()
                if found < least:
                    best, least = {key: rounded_like(state[key], t) if key in moving else t for key, t in start.items()}, found
        return Descended(best, rows, flags)

    def _order(self, name: str, num_batches: int) -> Iterator[int]:
        """The batch of every step: all of them in a random order, then all in another."""
        draws, order = generator(self.seed, "tuning", name), list[int]()
        for _ in range(self.steps):
            order = order or torch.randperm(num_batches, generator=draws).tolist()
            yield order.pop()


def _schedule(step: int, steps: int) -> float:
    """The share of the learning rate at a step, from 1: up in a line, down as a cosine."""
    warm = max(1, round(_WARM_UP * steps))
    return min(step / warm, (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm + 1))) / 2)


def rounded_like(value: Float[Tensor, "..."], like: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The value rounded to the dtype of `like`: a floating-point one, or int8 between -127 and 127."""
    return value.to(like.dtype) if like.is_floating_point() else value.round().clamp(-127, 127).to(like.dtype)


def _straight_through(value: Float[Tensor, "..."], like: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`rounded_like`, in float32, through which a gradient passes as if nothing were rounded."""
    return value + (rounded_like(value.detach(), like).float() - value.detach())
