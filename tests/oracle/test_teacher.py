"""Gradients, held-out losses and shifted targets against definitions and finite differences, on the shipped models."""

import pytest
import torch

from mgvq.calibration.tiny_vqa import TinyVQA
from mgvq.compensation.gradient_hessian import GradientHessian
from mgvq.errors import UserError
from mgvq.model.answers import answer_logits, num_answers, vocabulary_of
from mgvq.model.blocks import block_name, by_block
from mgvq.model.encode import batches
from mgvq.model.pack import can_pack, packed_batches
from mgvq.model.sites import linear, list_sites
from mgvq.quantization import teacher
from mgvq.quantization.subject import Samples, Subject
from mgvq.quantization.teacher import Teacher
from mgvq.types import Metric


def compensation(**settings):
    rounding, gradient = dict(damping=0.01, output_damping=None), dict(source="kl", start="full_precision", refresh=True)
    defaults = rounding | gradient | dict(sweeps=1, steps=[0.0, 0.1], shift_damping=0.05)
    return GradientHessian(**(defaults | settings))


def moved_by(compensation, weight, metric, gradient, step):
    return compensation.target(weight, compensation.direction(metric, gradient), step)


def draw():
    return TinyVQA(num_images=3, questions_per_image=4, heldout_images=2, shown="both", seed=0, label_seed=0).draw()


def noise(shape, size, seed=0):
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drift_of(loaded, source, **settings):
    examples = draw()
    batched = packed_batches if can_pack(loaded.model) else batches
    parts = (list(batched(loaded.processor, part, 2)) for part in (examples.examples, examples.heldout_examples))
    return Teacher(Subject(loaded.model, list_sites(loaded.model, "language"), Samples(*parts)), source, **settings)


@pytest.fixture(params=["kl"])
def drift(loaded, request):
    """The drift of a model whose first language block is disturbed after the teacher was taken."""
    made = drift_of(loaded, request.param)
    layer = linear(loaded.model, list_sites(loaded.model, "language")[3])
    kept = made.whole = layer.weight.detach().clone()
    layer.weight.data.add_(noise(kept.shape, 0.3 * kept.std()))
    yield made
    layer.weight.data.copy_(kept)


def ask_own_samples(drift):
    """Held-out losses are those of the gradient's own samples."""
    drift._heldout_walk, drift._taught_heldout, drift._num_heldout = drift._walk, drift._taught, len(drift._taught)
    drift._places = {number: number for number in range(len(drift._taught))}


def later_block(model):
    return list(by_block(list_sites(model, "language")))[2]


@pytest.mark.parametrize("drift", ["kl", "sft"], indirect=True)
def test_gradients_are_finite_differences_of_the_loss(loaded, drift) -> None:
    ask_own_samples(drift)
    block = later_block(loaded.model)
    gradient = drift.gradient(block)
    for site in block[::3]:
        weight = linear(loaded.model, site).weight
        kept, losses = weight.detach().clone(), []
        direction = gradient[site] / gradient[site].norm()
        for sign in (1, -1):
            weight.data.copy_(kept + sign * 3e-3 * direction)
            losses.append(drift.heldout_loss().mean)
        weight.data.copy_(kept)
        slope = (losses[0] - losses[1]) / 6e-3
        assert slope == pytest.approx(float(gradient[site].norm()), rel=2e-2)


@pytest.mark.parametrize("source", ["kl", "sft", "block"])
def test_minibatches_are_all_samples_together(loaded, source) -> None:
    """The gradients of the parts, by their answers, add up to that of all; there are no more parts than batches."""
    parts = {number: drift_of(loaded, source, minibatches=number) for number in (1, 2, 9)}
    site = list_sites(loaded.model, "language")[3]
    weight = linear(loaded.model, site).weight
    kept = weight.detach().clone()
    weight.data.add_(noise(kept.shape, 0.3 * kept.std()))
    block = later_block(loaded.model)
    whole = parts[1].gradient(block)[block[0]]
    sizes = [num_answers(batch) for batch in parts[1].batches]
    assert 2 <= len(sizes) < 9
    for number, weights in ((2, [sum(sizes[::2]), sum(sizes[1::2])]), (9, sizes)):
        found = [parts[number].gradient(block, turn)[block[0]] for turn in range(len(weights) + 1)]
        together = sum(size * gradient for size, gradient in zip(weights, found[:-1], strict=True)) / sum(sizes)
        torch.testing.assert_close(together, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))
        assert torch.equal(found[-1], found[0]), "the first one's turn again"
        assert not torch.equal(found[0], found[1])
    weight.data.copy_(kept)


@pytest.mark.parametrize("drift", ["block"], indirect=True)
def test_the_gradient_of_a_block_is_a_finite_difference_of_its_drift(loaded, drift) -> None:
    """The drift is written out here: the block's output and the gradient of the right answers' loss, by hooks of this test."""
    block = later_block(loaded.model)
    module = loaded.model.get_submodule(block_name(block))
    disturbed = linear(loaded.model, list_sites(loaded.model, "language")[3])
    noisy = disturbed.weight.detach().clone()

    def output(batch, retain=False):
        seen = []
        handle = module.register_forward_hook(lambda _m, _i, out: seen.append(out))
        with torch.set_grad_enabled(retain):
            logits = answer_logits(loaded.model, batch)
        handle.remove()
        return seen[0], logits

    parameter = module.mlp.down_proj.weight.requires_grad_()
    taught = []
    disturbed.weight.data.copy_(drift.whole)
    for batch in drift.batches:
        expected, logits = output(batch, retain=True)
        labels = batch.inputs["input_ids"][batch.loss_mask]
        (importance,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), expected)
        taught.append((expected.detach(), importance.square().sum(-1), len(labels)))
    parameter.requires_grad_(False)
    disturbed.weight.data.copy_(noisy)

    def loss():
        parts = [(w * (output(b)[0] - e).square().mean(-1)).sum() for b, (e, w, _) in zip(drift.batches, taught, strict=True)]
        return float(0.5 * sum(parts)) / sum(n for *_, n in taught)

    gradient = drift.gradient(block)
    for site in block[::3]:
        weight, losses = linear(loaded.model, site).weight, []
        kept, direction = weight.detach().clone(), gradient[site] / gradient[site].norm()
        for sign in (1, -1):
            weight.data.copy_(kept + sign * 3e-3 * direction)
            losses.append(loss())
        weight.data.copy_(kept)
        assert (losses[0] - losses[1]) / 6e-3 == pytest.approx(float(gradient[site].norm()), rel=2e-2)


@pytest.mark.parametrize("drift", ["sft"], indirect=True)
def test_packed_and_single_rows_give_the_same_gradient(loaded, drift) -> None:
    examples = draw()
    parts = (list(batches(loaded.processor, part, 5)) for part in (examples.examples, examples.heldout_examples))
    single = Teacher(Subject(loaded.model, list_sites(loaded.model, "language"), Samples(*parts)), "sft")
    block = later_block(loaded.model)
    one, other = drift.gradient(block), single.gradient(block)
    for site in block:
        torch.testing.assert_close(one[site], other[site], rtol=1e-3, atol=1e-4 * float(other[site].abs().max()))


def test_a_small_step_against_the_gradient_lowers_the_loss(loaded, drift) -> None:
    ask_own_samples(drift)
    block, before = later_block(loaded.model), drift.heldout_loss().mean
    gradient = drift.gradient(block)
    kept = {site: linear(loaded.model, site).weight.detach().clone() for site in block}
    for site in block:
        metric = Metric((torch.eye(site.in_features),), torch.eye(site.out_features))
        shifted = moved_by(compensation(), kept[site], metric, gradient[site], 2e-4)
        linear(loaded.model, site).weight.data.copy_(shifted)
    after = drift.heldout_loss().mean
    for site in block:
        linear(loaded.model, site).weight.data.copy_(kept[site])
    assert after < before


def test_the_divergence_of_an_undisturbed_model_is_zero(loaded) -> None:
    assert drift_of(loaded, "kl").heldout_loss().mean == pytest.approx(0, abs=1e-7)


def test_gradient_and_heldout_samples_are_apart(loaded) -> None:
    part = list(packed_batches(loaded.processor, draw().examples, 2))
    with pytest.raises(AssertionError, match="held out"):
        Teacher(Subject(loaded.model, [], Samples(part, part)), "kl")
    with pytest.raises(UserError, match="heldout_images"):
        Teacher(Subject(loaded.model, [], Samples(part, [])), "kl")


def test_the_target_completes_the_square() -> None:
    """f(D) = <G, D> + 1/2 tr(H_O D H_I D^T) is, up to a constant, the quadratic about W - N (docs/method.md, eq. (shift))."""
    weight, gradient = noise((4, 6), 1.0), noise((4, 6), 0.5, 1)
    h_in, h_out = (m @ m.T + torch.eye(len(m)) for m in (noise((6, 6), 1.0, 2), noise((4, 4), 1.0, 3)))
    target = moved_by(compensation(shift_damping=1e-9), weight, Metric((h_in,), h_out), gradient, 1.0).double()
    weight, gradient, h_in, h_out = (t.double() for t in (weight, gradient, h_in, h_out))

    def loss(other):
        return float((gradient * (other - weight)).sum() + 0.5 * ((h_out @ (other - weight) @ h_in) * (other - weight)).sum())

    def about(other):
        return float(0.5 * ((h_out @ (other - target) @ h_in) * (other - target)).sum())

    constants = [loss(other) - about(other) for other in (weight, *(weight + noise((4, 6), 1.0, s).double() for s in (4, 5)))]
    assert constants == pytest.approx([constants[0]] * 3, rel=1e-3)


def test_the_step_is_capped_and_zero_moves_nothing() -> None:
    weight, gradient = noise((4, 6), 1.0), noise((4, 6), 100.0, 1)
    metric = Metric((torch.eye(6),), torch.eye(4))
    moved = moved_by(compensation(), weight, metric, gradient, 0.1)
    assert float((moved - weight).norm() / weight.norm()) == pytest.approx(0.1, rel=1e-5)
    assert torch.equal(moved_by(compensation(), weight, metric, gradient, 0.0), weight)
    assert torch.equal(moved_by(compensation(), weight, metric, torch.zeros_like(weight), 0.4), weight)


def test_runs_of_rows_are_moved_by_their_own_metric() -> None:
    weight, gradient = noise((5, 3), 1.0), noise((5, 3), 1e-3, 1)
    first, second = torch.diag(torch.tensor([1.0, 2, 3])), torch.diag(torch.tensor([3.0, 2, 1]))
    moved = moved_by(compensation(), weight, Metric((first, second)), gradient, 1.0)
    for rows, h in ((slice(0, 3), first), (slice(3, 5), second)):
        alone = moved_by(compensation(), weight[rows], Metric((h,)), gradient[rows], 1.0)
        torch.testing.assert_close(moved[rows], alone)


@pytest.mark.parametrize("room", [0, 1, 2**20])
def test_log_probabilities_that_are_kept_are_those_of_the_head(
    loaded, monkeypatch: pytest.MonkeyPatch, tmp_path, room: int
) -> None:
    """Of no batch, of some of the answers and of all, in files as in memory."""
    examples, sites = draw(), list_sites(loaded.model, "language")
    parts = [list(packed_batches(loaded.processor, part, 2)) for part in (examples.examples, examples.heldout_examples)]
    monkeypatch.setattr(teacher, "_IN_FILES", room * vocabulary_of(loaded.model) * num_answers(parts[1][0]))
    in_files, in_memory = (Teacher(Subject(loaded.model, sites, Samples(*parts, place)), "kl") for place in (tmp_path, None))
    kept = [bool(taught.logs) for taught in (*in_files._taught_heldout, *in_files._taught)]
    assert kept == [room > number for number in range(len(kept))] if room < 2 else all(kept)
    assert all(taught.logs for taught in (*in_memory._taught_heldout, *in_memory._taught))
    assert not list(tmp_path.iterdir()), "the files have no names"
    weight, block = linear(loaded.model, sites[0]).weight, next(by_block(sites))
    own = weight.detach().clone()
    weight.data.mul_(1.1)  # else the model is its own teacher
    try:
        assert in_files.heldout_loss().mean == in_memory.heldout_loss().mean > 0
        one, other = in_files.gradient(block), in_memory.gradient(block)
        assert all(torch.equal(one[site], other[site]) for site in block)
    finally:
        weight.data.copy_(own)


def test_gradients_that_are_carried_on_have_the_bits_of_a_pass(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks at a time, across the towers, until the model changes."""
    sites = list_sites(loaded.model, "all")
    blocks, examples = list(by_block(sites)), draw()
    parts = (list(packed_batches(loaded.processor, part, 2)) for part in (examples.examples, examples.heldout_examples))
    subject = Subject(loaded.model, sites, Samples(*parts))
    made, plain = Teacher(subject, "kl"), Teacher(subject, "kl")
    passes, whole = [], made.gradient
    monkeypatch.setattr(made, "gradient", lambda sites, *rest: passes.append(sites[0].name) or whole(sites, *rest))
    changed = [linear(loaded.model, block[0]).weight for block in (blocks[0], blocks[6])]
    kept = [weight.detach().clone() for weight in changed]
    changed[0].data.mul_(1.1)  # else the model is its own teacher
    try:
        for first in range(0, len(blocks), 3):
            together = blocks[first : first + 3]
            if first == 6:
                changed[1].data.mul_(1.1)
                made.model_changes()
            expected = plain.gradient([site for block in together for site in block])
            for block, found in made.gradients(together):
                assert all(torch.equal(found[site], expected[site]) for site in block)
                assert any(gradient.any() for gradient in found.values())
            for block in together:
                made.settle(block)
    finally:
        for weight, own in zip(changed, kept, strict=True):
            weight.data.copy_(own)
    assert passes == [blocks[0][0].name, blocks[6][0].name]


def test_no_gradient_is_carried_on_where_a_block_is_called_twice_or_memory_is_full(loaded, monkeypatch) -> None:
    sites = list_sites(loaded.model, "language")
    blocks, made = list(by_block(sites)), drift_of(loaded, "kl")
    module = loaded.model.get_submodule(block_name(blocks[1]))

    def once_more(block, args, kwargs, _output) -> None:
        if not again:
            again.append(block)
            block(*args, **kwargs)
            again.clear()

    again = []
    handle = module.register_forward_hook(once_more, with_kwargs=True)
    list(made.gradients(blocks[:1]))
    handle.remove()
    ends = {name for name, _ in made._at_ends}
    assert ends == {block_name(block) for block in blocks[2:]}
    monkeypatch.setattr(teacher, "_IN_MEMORY", 1)
    list(made.gradients(blocks[:1]))
    assert not made._at_ends


@pytest.mark.parametrize("scope", [pytest.param("language", marks=pytest.mark.trust), "all"])
def test_passes_that_start_behind_settled_blocks_change_nothing(loaded, scope: str) -> None:
    examples, sites = draw(), list_sites(loaded.model, scope)
    parts = (list(packed_batches(loaded.processor, part, 2)) for part in (examples.examples, examples.heldout_examples))
    subject = Subject(loaded.model, sites, Samples(*parts))
    made, plain = Teacher(subject, "kl"), Teacher(subject, "kl")
    kept = {site: linear(loaded.model, site).weight.detach().clone() for site in sites}
    try:
        for _ in range(2):
            made.unsettle()
            for block in by_block(sites):
                for site in block:
                    weight = linear(loaded.model, site).weight
                    weight.data.add_(noise(weight.shape, 0.1 * weight.std(), seed=site.in_features))
                assert made.heldout_loss().mean == plain.heldout_loss().mean > 0
                one, other = made.gradient(block), plain.gradient(block)
                assert all(torch.equal(one[site], other[site]) for site in block)
                made.settle(block)
    finally:
        for site, weight in kept.items():
            linear(loaded.model, site).weight.data.copy_(weight)


def test_one_pass_takes_the_gradients_of_several_blocks(loaded, drift) -> None:
    second, third = list(by_block(list_sites(loaded.model, "language")))[1:3]
    together = drift.gradient([*second, *third])
    for block in (second, third):
        for site, alone in drift.gradient(block).items():
            torch.testing.assert_close(together[site], alone, rtol=1e-4, atol=1e-6 * float(alone.abs().max()))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"source": "foem"}, "compensation.source"),
        ({"start": "nearest"}, "compensation.start"),
        ({"start": "rounded", "source": "sft", "refresh": False}, "start=full_precision"),
        ({"refresh": False}, "refresh=true"),
        ({"source": "block", "refresh": False}, "refresh=true"),
        ({"source": "sft", "refresh": False, "sweeps": 2}, "refresh=true"),
        ({"refresh": 1}, "compensation.refresh"),
        ({"minibatches": 0}, "compensation.minibatches must be"),
        ({"minibatches": True}, "compensation.minibatches must be"),
        ({"minibatches": 2, "source": "sft", "refresh": False}, "minibatches=2 has no effect"),
        ({"refresh": 0, "source": "sft"}, "compensation.refresh"),
        ({"refresh": 5, "source": "block"}, "refresh=true, or compensation.source=kl"),
        ({"sweeps": 0}, "compensation.sweeps"),
        ({"output_damping": 0.0}, "output_damping"),
        ({"steps": [0.1, 0.2]}, "compensation.steps"),
        ({"steps": [0.0, 2.0]}, "compensation.steps"),
        ({"shift_damping": 0.0}, "shift_damping"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, named: str) -> None:
    with pytest.raises(UserError, match=named):
        compensation(**settings)


def test_blocks_follow_each_other_and_what_is_outside_stands_alone(loaded) -> None:
    sites = list_sites(loaded.model, "all")
    blocks = list(by_block(sites))
    assert [s for block in blocks for s in block] == sites
    alone = [s for s in sites if s.tower == "projector"]
    assert [block for block in blocks if block[0].block is None] == [[s] for s in alone]
    assert len(blocks) == 4 + len(alone) + 4
