"""Tuning: gradients against finite differences, codes and bits as they were, never worse on held-out samples."""

from dataclasses import replace

import pytest
import torch
from variants import built, variants

from mgvq.errors import UserError
from mgvq.formats.columns import ColumnWeight
from mgvq.formats.exponent import ExponentWeight
from mgvq.formats.grid import GridWeight
from mgvq.formats.grouped import GroupedWeight, pack_groups
from mgvq.formats.lattice import LatticeWeight
from mgvq.formats.outliers import Outliers, OutlierWeight
from mgvq.formats.rotated import RotatedWeight
from mgvq.formats.scalar import ScalarWeight
from mgvq.formats.trellis import TrellisWeight
from mgvq.formats.vector import VectorWeight, store_table
from mgvq.protocols import Tuning
from mgvq.quantization.tuning import Decoders
from mgvq.trellis.code import trellis_code
from mgvq.tuning.tables import Tables
from mgvq.types import Site

SHAPE = 16, 24


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(top, *shape):
    return torch.randint(top, shape, generator=torch.Generator().manual_seed(1), dtype=torch.int32)


def vector_weight(kind="fp16"):
    table, step = store_table(normal(16, 2), kind)
    scale = torch.tensor(0.5).half()
    return VectorWeight(integers(16, 16, 12, 1), table[None], 24, step[None] if step is not None else None, scale)


def weights():
    vector = vector_weight()
    scalar = ScalarWeight(integers(4, *SHAPE), integers(4, 16, 3), (normal(16, 3).abs() + 0.1).half(), 2, 8)
    code = trellis_code(2.0, 8)
    trellis = TrellisWeight(integers(256, 1, 2, code.num_bytes(256)).to(torch.uint8), code, torch.tensor(0.3).half(), 16, 24)
    halves = tuple(ScalarWeight(integers(4, 16, 12), integers(4, 16, 1), torch.ones(16, 1).half(), 2, 12) for _ in range(2))
    groups = pack_groups(torch.arange(24) % 2)
    outliers = Outliers.of(torch.tensor([3, 50]), torch.tensor([4.0, -5.0]), 0, SHAPE)
    signs = [torch.full((n // 8,), 0b10110100, dtype=torch.uint8) for n in (24, 16)]
    return {
        "vector": vector,
        "int8": vector_weight("int8"),
        "columns": ColumnWeight(VectorWeight(integers(16, 24, 8, 1), vector.table, 16)),
        "scalar": scalar,
        "grid": GridWeight(integers(4, *SHAPE), integers(8, 16, 3), torch.tensor([0.1, 0.7]).half(), 2, 3, 8),
        "lattice": LatticeWeight(integers(2**16, 16, 3, 1), torch.tensor([0.4]).half(), 2, 24),
        "trellis": trellis,
        "exponent": ExponentWeight(vector, 3),
        "grouped": GroupedWeight(halves, groups, 24),
        "rotated": RotatedWeight(trellis, signs[0], signs[1], "layer"),
        "outliers": OutlierWeight(RotatedWeight(trellis, signs[0], signs[1], "layer"), outliers),
    }


WEIGHTS = weights()
each_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())


@each_weight
def test_the_gradient_of_the_decoder_is_a_finite_difference(weight) -> None:
    decode, direction = weight.decoder(), normal(*SHAPE, seed=7)
    start = {role: tensor.float().requires_grad_() for role, tensor in weight.tunable.items()}
    assert start
    torch.testing.assert_close(decode(start).detach(), weight.decode())
    (decode(start) * direction).sum().backward()
    for role, tensor in start.items():
        step = 0.02 * tensor.detach().abs().mean() * normal(*tensor.shape, seed=8)
        if weight.format == "grid":  # its levels are rounded to fp16
            continue
        ends = [decode({**start, role: tensor.detach() + sign * step}) for sign in (1, -1)]
        slope = float(((ends[0] - ends[1]) * direction).sum().detach())
        assert 2 * float((tensor.grad * step).sum().detach()) == pytest.approx(slope, rel=2e-3, abs=2e-3)


@each_weight
def test_moved_tensors_keep_codes_dtypes_and_bits(weight) -> None:
    site = Site("layer", "language", "layer", 0, *SHAPE)
    decoders = Decoders({site: weight})
    torch.testing.assert_close(decoders(weight_start(decoders))["layer.weight"], weight.decode(), rtol=1e-5, atol=1e-5)
    assert decoders.stored(decoders.start)[site] is weight
    moved = {key: (tensor.float() * 1.25).to(tensor.dtype) for key, tensor in decoders.start.items()}
    found, before = decoders.stored(moved)[site], weight.tensors()
    assert not torch.equal(found.decode(), weight.decode())
    for role, tensor in found.tensors().items():
        assert tensor.dtype == before[role].dtype
        assert tensor.shape == before[role].shape
        assert role in weight.tunable or torch.equal(tensor, before[role])


def weight_start(decoders):
    return {key: tensor.float() for key, tensor in decoders.start.items()}


def test_a_shared_table_is_one_tensor_and_stays_one() -> None:
    sites = [Site(f"layer.{i}", "language", "layer", i, *SHAPE) for i in range(2)]
    vector = vector_weight()
    decoders = Decoders({site: replace(vector, scale=None) for site in sites})
    assert len(decoders.start) == 1
    stored = decoders.stored({key: tensor * 2 for key, tensor in decoders.start.items()})
    assert stored[sites[0]].tunable["table"] is stored[sites[1]].tunable["table"]


class Quadratic:
    """Batches that pull a tensor towards their targets; the held-out samples towards another."""

    num_batches = 3

    def __init__(self, heldout: float) -> None:
        self.target, self.seen = heldout, []

    def tokens(self, batch: int) -> int:
        return 10

    def loss(self, values, batch):
        self.seen.append(batch)
        return (values["x"] - 2.0).square().mean()

    def heldout(self, values) -> float:
        assert torch.equal(values["x"], values["x"].half().float()), "what is scored is what is stored"
        return float((values["x"] - self.target).square().mean())


def test_the_best_state_on_held_out_samples_is_kept_and_never_a_worse_one() -> None:
    tuning = Tables(steps=30, learning_rate=0.05, checks=10, seed=0)
    start = {"x": torch.tensor([1.0, 1.5]).half(), "zero": torch.zeros(3)}
    helped = tuning.descend("t", start, objective := Quadratic(2.0))
    assert min(row["heldout_loss"] for row in helped.rows) == Quadratic(2.0).heldout({"x": helped.tensors["x"].float()})
    assert helped.rows[-1]["heldout_loss"] < 0.5 * helped.rows[0]["heldout_loss"]
    assert helped.tensors["x"].dtype == torch.half
    assert helped.tensors["zero"] is start["zero"]
    assert helped.rows[-1]["tokens"] == 300
    assert all(sorted(objective.seen[i : i + 3]) == [0, 1, 2] for i in range(0, 30, 3)), "epoch after epoch"
    harmed = tuning.descend("t", start, Quadratic(-2.0))
    assert harmed.tensors["x"] is start["x"]


@pytest.mark.parametrize("name", variants("tuning"))
def test_every_variant_meets_the_protocol_and_refuses_what_cannot_work(name: str) -> None:
    tuning = built("tuning", name)
    assert isinstance(tuning, Tuning)
    assert tuning.within in ("block", "model")
    for bad, said in (
        (("steps=0",), "tuning.steps"),
        (("learning_rate=1.5",), "tuning.learning_rate"),
        (("checks=999",), "checks"),
    ):
        with pytest.raises(UserError, match=said):
            built("tuning", name, *bad)
