"""The streamed statistics equal per-sample autograd and finite differences; their fusions equal the Fisher they stand for."""

import copy
import itertools
import math
import multiprocessing
import time
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from transformers import PretrainedConfig

from mgvq.calibration.tiny_vqa import TinyVQA
from mgvq.curvature.fusion import mbq_weights
from mgvq.curvature.kronecker import KroneckerFisher
from mgvq.curvature.statistics import clipped_weights, collect, sketch
from mgvq.errors import UserError
from mgvq.evaluation.documents import documents
from mgvq.linalg import nearest_kronecker
from mgvq.model.encode import batches, encode
from mgvq.model.passes import sampled_labels
from mgvq.model.sites import linear, list_sites
from mgvq.rng import generator
from mgvq.runs.cache import statistics
from mgvq.types import MODALITIES, Batch, Needs, Site, SiteStats

SEED = 5
EVERYTHING = Needs(gram=True, fisher=True, saliency=True, gradient=True, channel_groups=3, sequences=True)
CHOSEN = {("language", 1, "k_proj"), ("language", 3, "down_proj"), ("vision", 2, "v_proj"), ("vision", 2, "qkv")}


def draw(num_images):
    return TinyVQA(num_images=num_images, questions_per_image=4, heldout_images=1, shown="both", seed=0, label_seed=0).draw()


def close(found, expected, tolerance):
    """The relative error in the Frobenius norm is within the tolerance."""
    error, size = (found.double() - expected.double()).norm(), expected.double().norm()
    assert error <= tolerance * size, f"off by {float(error / size):.1e} of {float(size):.1e}"


def same(one, other, tolerance):
    """All fields of two statistics, down to the tensors."""
    if isinstance(one, torch.Tensor):
        close(one, other, tolerance)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key], tolerance)
    elif one is None:
        assert other is None
    elif isinstance(one, int | float):
        assert one == pytest.approx(other, rel=max(tolerance, 1e-15))
    else:
        for field in fields(one):
            same(getattr(one, field.name), getattr(other, field.name), tolerance)


def chosen_sites(model):
    everything = list_sites(model, "all")
    sites = [s for s in everything if (s.tower, s.block, s.kind) in CHOSEN]
    sites.insert(1, [s for s in everything if s.tower == "projector"][-1])
    assert [s.tower for s in sites] == ["vision", "projector", "language", "language"]
    return sites


def draw_label(row, uniform):
    """The first token at which the cumulative probability exceeds the uniform number."""
    return int((row.double().softmax(0).cumsum(0) <= uniform).sum())


class Alone:
    """One sample at a time, without padding: inputs x, output gradients g and weight gradients of the sites, by autograd."""

    def __init__(self, model, sites, batch, seed):
        weights = [linear(model, s).weight for s in sites]
        seen = {}
        hooks = [linear(model, s).register_forward_hook(lambda _, x, y, s=s: seen.update({s: (x[0].detach(), y)})) for s in sites]
        for weight in weights:
            weight.requires_grad_()
        logits = model(**batch.inputs).logits[0, :-1][batch.loss_mask[0, 1:]]
        uniform = torch.rand(len(logits), 1, generator=generator(seed, "labels", *batch.sample_ids), dtype=torch.float64)
        drawn = torch.tensor([draw_label(row, u) for row, u in zip(logits.detach(), uniform, strict=True)])
        self.num_answers = len(drawn)
        self.x = {s: seen[s][0].flatten(0, -2).double() for s in sites}
        self.g, self.weight = {}, {}
        for name, labels in (("sampled", drawn), ("right", batch.inputs["input_ids"][0, 1:][batch.loss_mask[0, 1:]])):
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            found = torch.autograd.grad(loss, [*(seen[s][1] for s in sites), *weights], retain_graph=True)
            for s, g, weight in zip(sites, found[: len(sites)], found[len(sites) :], strict=True):
                self.g[name, s], self.weight[name, s] = g.flatten(0, -2).double(), weight.double()
        image = batch.image_mask[0]
        everything = {s: torch.ones(len(x), dtype=torch.bool) for s, x in self.x.items()}
        self.image = {s: image if s.tower == "language" else everything[s] for s in sites}
        for hook, weight in zip(hooks, weights, strict=True):
            hook.remove()
            weight.requires_grad_(False)


def test_statistics_equal_autograd_sample_by_sample(loaded) -> None:
    examples, sites = draw(2).examples, chosen_sites(loaded.model)
    bank = collect(loaded.model, sites, batches(loaded.processor, examples, 5), EVERYTHING, SEED)
    alone = [Alone(loaded.model, sites, encode(loaded.processor, [e]), SEED) for e in examples]
    num_answers = sum(a.num_answers for a in alone)
    for s in sites:
        stats = bank[s]
        assert stats.num_answers == num_answers
        for modality in MODALITIES:
            masks = [a.image[s] if modality == "image" else ~a.image[s] for a in alone]
            x = torch.cat([a.x[s][m] for a, m in zip(alone, masks, strict=True)])
            sampled, right = (torch.cat([a.g[n, s][m] for a, m in zip(alone, masks, strict=True)]) for n in ("sampled", "right"))
            assert stats.num_tokens[modality] == len(x)
            close(stats.gram[modality], x.T @ x, 1e-5)
            close(stats.fisher[modality], sampled.T @ sampled, 1e-5)
            assert (modality in stats.saliency) == (len(x) > 0)
            if len(x):
                assert stats.saliency[modality] == pytest.approx(right.abs().mean().item(), rel=1e-5)
        close(stats.gradient, sum(a.weight["right", s] for a in alone) / num_answers, 1e-5)
        x, g = torch.cat([a.x[s] for a in alone]), torch.cat([a.g["right", s] for a in alone])
        size = math.ceil(s.out_features / 3)
        for k, gram in enumerate(stats.channel_gram):
            weights = g[:, k * size : (k + 1) * size].square().mean(1)
            close(gram, torch.einsum("t,ti,tj->ij", weights, x, x), 1e-5)
        of_in = sum(a.weight["sampled", s].T @ a.weight["sampled", s] for a in alone)
        of_out = sum(a.weight["sampled", s] @ a.weight["sampled", s].T for a in alone)
        close(stats.sequence.h_in, of_in / (s.out_features * num_answers), 1e-5)
        close(stats.sequence.h_out, of_out / of_out.diagonal().mean(), 1e-5)


def test_gradient_equals_finite_differences_of_the_answer_loss(loaded) -> None:
    examples, sites = draw(1).examples, chosen_sites(loaded.model)[::2]
    bank = collect(
        loaded.model, sites, batches(loaded.processor, examples, 3), Needs(fisher=True, saliency=True, gradient=True), SEED
    )
    exact, batch = copy.deepcopy(loaded.model).double(), encode(loaded.processor, examples)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch.inputs.items()}

    def loss(weight, change):
        weight.add_(change)
        logits = exact(**inputs).logits[:, :-1][batch.loss_mask[:, 1:]]
        weight.sub_(change)
        return torch.nn.functional.cross_entropy(logits, batch.inputs["input_ids"][batch.loss_mask]).item()

    for s in sites:
        weight, gradient = linear(exact, s).weight, bank[s].gradient.double()
        direction = torch.randn(weight.shape, generator=generator(0, s.name), dtype=torch.float64)
        step = 0.004 * (direction / direction.norm() + gradient / gradient.norm())  # the model's norms are float32: not too small
        with torch.no_grad():
            near, far = (loss(weight, k * step) - loss(weight, -k * step) for k in (1, 2))
        assert (8 * near - far) / 12 == pytest.approx((gradient * step).sum().item(), rel=2e-4, abs=2e-7)


def test_batches_and_order_do_not_matter(loaded) -> None:
    examples, sites = list(draw(2).examples), chosen_sites(loaded.model)
    needs = replace(EVERYTHING, power_rounds=1)
    one = collect(loaded.model, sites, batches(loaded.processor, examples, 3), needs, SEED)
    shuffled = (encode(loaded.processor, examples[at::2]) for at in (1, 0))
    other = collect(loaded.model, sites, shuffled, needs, SEED)
    for s in sites:
        same(one[s].gram, other[s].gram, 1e-6)
        same(one[s], other[s], 1e-5)  # gradients: the model's own float32 passes move with the padding


def test_sampled_labels_follow_the_model_whatever_the_batches() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    names = tuple(f"sample-{i}" for i in range(2000))
    none = torch.zeros(2000, 3, dtype=torch.bool)
    answers = none.clone()
    answers[:, 1:] = True
    batch = Batch({}, none, answers, answers, names)
    logs = probabilities.log().expand(4000, 4)
    labels = sampled_labels(logs, batch, SEED)
    assert (labels.bincount(minlength=4) / 4000 - probabilities).abs().max() < 0.03
    half = Batch({}, none[1000:], answers[1000:], answers[1000:], names[1000:])
    assert torch.equal(sampled_labels(logs[:2000], half, SEED), labels[2000:])
    assert not torch.equal(sampled_labels(logs, batch, SEED + 1), labels)


def test_the_model_stays_as_it_is(loaded) -> None:
    model, batch = loaded.model, encode(loaded.processor, draw(1).examples[:2])
    before = model(**batch.inputs).logits
    linear(model, list_sites(model, "language")[0]).weight.requires_grad_()
    wanted = [p.requires_grad for p in model.parameters()]
    hooks = [list(m._forward_hooks) for m in model.modules()]
    collect(model, list_sites(model, "all"), [batch], EVERYTHING, SEED)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert [list(m._forward_hooks) for m in model.modules()] == hooks
    model.requires_grad_(False)
    assert torch.equal(model(**batch.inputs).logits, before)


def test_layers_that_read_the_same_hold_one_gram(loaded) -> None:
    sites = list_sites(loaded.model, "language")
    bank = collect(loaded.model, sites, batches(loaded.processor, draw(1).examples, 4), Needs(gram=True), SEED)
    for one, other in itertools.combinations(sites, 2):
        assert (one.reads == other.reads) == (bank[one].gram["text"] is bank[other].gram["text"])
    liar = replace(sites[-1], reads=sites[0].reads)
    with pytest.raises(RuntimeError, match=f"{sites[0].name} and {liar.name}"):
        collect(loaded.model, [sites[0], liar], batches(loaded.processor, draw(1).examples, 4), Needs(gram=True), SEED)


def inputs_by_modality(model, site, batch):
    """The tokens that a layer of the language tower reads of one batch, without padding."""
    seen = []
    hook = linear(model, site).register_forward_hook(lambda _, x, y: seen.append(x[0].detach().double()))
    with torch.inference_mode():
        model(**batch.inputs)
    hook.remove()
    return {"image": seen[0][batch.image_mask], "text": seen[0][batch.valid_mask & ~batch.image_mask]}


def test_a_clipped_gram_is_that_of_a_literal_loop(loaded) -> None:
    """Every token by the median of its modality in its batch; nothing but the Gram knows of it."""
    site = next(s for s in list_sites(loaded.model, "language") if (s.block, s.kind) == (3, "down_proj"))
    data, clip = list(batches(loaded.processor, draw(2).examples, 3)), 1.2
    needs = Needs(gram=True, fisher=True, saliency=True, gradient=True)
    plain, clipped = (collect(loaded.model, [site], data, n, SEED)[site] for n in (needs, replace(needs, clip=clip)))
    expected = {m: torch.zeros(site.in_features, site.in_features, dtype=torch.float64) for m in MODALITIES}
    for batch in data:
        for modality, tokens in inputs_by_modality(loaded.model, site, batch).items():
            energies = sorted(float(x @ x) for x in tokens)
            median = energies[(len(energies) - 1) // 2]
            for x in tokens:
                expected[modality] += min(1, clip * median / float(x @ x)) * torch.outer(x, x)
    for modality in MODALITIES:
        close(clipped.gram[modality], expected[modality], 1e-5)
        assert clipped.gram[modality].trace() < 0.99 * plain.gram[modality].trace()
    same(replace(clipped, gram=plain.gram), plain, 0)


def test_weights_of_clipped_tokens() -> None:
    tokens = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])  # energies 25, 1, 4 and 0, lower median 1
    torch.testing.assert_close(clipped_weights(tokens, 2.0), torch.tensor([2 / 25, 1.0, 2 / 4, 1.0]))
    assert clipped_weights(tokens[:1], 1.0).tolist() == [1.0]
    assert clipped_weights(torch.tensor([[5.0], [0.0], [0.0]]), 2.0).tolist() == [1.0, 1.0, 1.0], "no median to go by"


def test_further_batches_reach_the_gram_and_nothing_else(loaded) -> None:
    """The Gram is that of all samples, what is made of gradients that of the first ones, and the ratios of MBQ do not move."""
    examples, sites = draw(3).examples, chosen_sites(loaded.model)
    needs = replace(EVERYTHING, power_rounds=1)

    def collected(number, *further):
        own = batches(loaded.processor, examples[:number], 4)
        return collect(loaded.model, sites, own, needs, SEED, *(batches(loaded.processor, part, 4) for part in further))

    few, all_of_them, both = collected(4), collected(12), collected(4, examples[4:])
    assert mbq_weights(both) == mbq_weights(few)
    for s in sites:
        assert both[s].num_tokens == all_of_them[s].num_tokens != few[s].num_tokens
        same(both[s].gram, all_of_them[s].gram, 1e-6)
        same(replace(both[s], num_tokens=few[s].num_tokens, gram=few[s].gram), few[s], 0)
    without = replace(needs, gram=False)
    unread = collect(loaded.model, sites, batches(loaded.processor, examples[:4], 4), without, SEED, iter([None]))
    assert all(unread[s].num_tokens == few[s].num_tokens for s in sites)


def test_without_gradients_further_batches_are_batches_like_others(loaded) -> None:
    """A layer that they alone reach has been reached."""
    site = next(s for s in list_sites(loaded.model, "all") if s.tower == "vision")
    text, shown = (
        list(TinyVQA(num_images=1, questions_per_image=2, heldout_images=0, shown=s, seed=0, label_seed=0).draw().batches(
            loaded.processor)) for s in ("text", "both"))  # fmt: skip
    found = collect(loaded.model, [site], text, Needs(gram=True), SEED, shown)[site]
    same(found.gram, collect(loaded.model, [site], shown, Needs(gram=True), SEED)[site].gram, 0)
    with pytest.raises(UserError, match="no calibration sample reaches the vision layers"):
        collect(loaded.model, [site], text, Needs(gram=True, fisher=True, saliency=True, gradient=True), SEED, shown)


class Toy(torch.nn.Module):
    """Two linear layers with a running mean between them, so that tokens of a sample act on each other."""

    config = PretrainedConfig(vocab_size=7)  # which says nothing of positions

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 4)
        self.one, self.two, self.head = torch.nn.Linear(4, 3), torch.nn.Linear(3, 5), torch.nn.Linear(5, 7)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, generator=generator(0, str(parameter.shape)))

    def base_model(self, input_ids, use_cache=False):
        hidden = self.one(self.embedding(input_ids)).tanh().cumsum(1)
        hidden = self.two(hidden / torch.arange(1.0, 1 + hidden.shape[1])[:, None])
        return SimpleNamespace(last_hidden_state=hidden.tanh())

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.base_model(input_ids).last_hidden_state))


TOY_SITES = [Site("one", "language", "one", None, 3, 4), Site("two", "language", "two", None, 5, 3)]


def toy_batches(num_batches):
    for at in range(num_batches):
        ids = torch.randint(7, (6, 8), generator=generator(at, "ids"))
        image, answers = torch.zeros(2, 6, 8, dtype=torch.bool)
        image[:, :4], answers[:, 6:] = True, True
        yield Batch({"input_ids": ids}, image, answers, torch.ones_like(image), tuple(f"{at}-{row}" for row in range(6)))


def nearest_product(rearranged):
    """The best rank-one fit of sum vec(h_out) vec(h_in)^T, by SVD, as one matrix."""
    left, values, right = torch.linalg.svd(rearranged)
    return values[0] * torch.outer(left[:, 0], right[0])


def test_token_wise_power_iteration_finds_the_nearest_product_of_the_fisher() -> None:
    model = Toy()
    bank = collect(model, TOY_SITES, toy_batches(2), Needs(power_rounds=10), SEED)
    for site in TOY_SITES:
        rearranged, num_answers = torch.zeros(site.out_features**2, site.in_features**2, dtype=torch.float64), 0
        for batch in toy_batches(2):
            layer, seen = model.get_submodule(site.name), {}
            hook = layer.register_forward_hook(lambda _, x, y, seen=seen: seen.update(x=x[0].detach(), y=y))
            logits = model(**batch.inputs).logits[:, -3:-1].flatten(0, 1)
            hook.remove()
            labels = sampled_labels(logits.log_softmax(-1), batch, SEED)
            num_answers += len(labels)
            (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), seen["y"])
            for x, g in zip(seen["x"].flatten(0, 1).double(), gradient.flatten(0, 1).double(), strict=True):
                rearranged += torch.outer(torch.outer(g, g).flatten(), torch.outer(x, x).flatten())
        found = bank[site].token
        close(torch.outer(found.h_out.flatten(), found.h_in.flatten()), nearest_product(rearranged / num_answers), 1e-5)
        assert found.h_out.diagonal().mean() == pytest.approx(1)


def spd(size, *names):
    root = torch.randn(size, 2 * size, generator=generator(0, *names), dtype=torch.float64)
    return root @ root.T / size


def stats_of(tokens, num_answers):
    """Statistics of streams {modality: (x, g)}."""
    return SiteStats(
        {m: len(x) for m, (x, _) in tokens.items()},
        {m: (x.T @ x).float() for m, (x, _) in tokens.items()},
        num_answers,
        {m: (g.T @ g).float() for m, (_, g) in tokens.items()},
        {m: g.abs().mean(1).sum().item() for m, (_, g) in tokens.items()},
    )


@pytest.mark.parametrize("fusion", ["none", "mbq_ratio", "kron"])
def test_independent_gradients_and_inputs_give_the_fisher_itself(fusion) -> None:
    site = Site("layer", "language", "layer", None, 3, 4)
    xs, gs = (torch.randn(9, n, generator=generator(0, str(n)), dtype=torch.float64) for n in (4, 3))
    pairs = [(x, g) for x in xs for g in gs]  # every input with every gradient: independent, exactly
    x, g = (torch.stack(part) for part in zip(*pairs, strict=True))
    fisher = sum(torch.kron(torch.outer(b, b), torch.outer(a, a)) for a, b in pairs) * 2 / 50
    bank = {site: stats_of({"image": (x, g), "text": (x, g)}, 50)}
    metric = KroneckerFisher(granularity="token", fusion=fusion, rounds=None).fuse(bank)[site]
    close(torch.kron(metric.h_out, metric.h_in[0]), fisher, 1e-5)


def test_kron_fusion_equals_the_nearest_product_by_svd() -> None:
    a, b = ([spd(n, str(n), k) for k in range(2)] for n in (4, 3))
    rearranged = sum(torch.outer(out.flatten(), of_in.flatten()) for of_in, out in zip(a, b, strict=True))
    h_in, h_out = nearest_kronecker(list(zip(a, b, strict=True)), rounds=30)
    close(torch.outer(h_out.flatten(), h_in.flatten()), nearest_product(rearranged), 1e-6)


def test_sequence_sketch_gives_a_kronecker_fisher_back() -> None:
    h_out, h_in, num_answers = spd(5, "out"), spd(3, "in"), 40
    roots = torch.linalg.cholesky(h_out), torch.linalg.cholesky(h_in)
    basis = torch.eye(15, dtype=torch.float64).reshape(15, 5, 3) * math.sqrt(num_answers)
    gradients = [roots[0] @ z @ roots[1].T for z in basis]  # sum vec(G) vec(G)^T / num_answers = h_out (x) h_in
    found = sketch(sum(g.T @ g for g in gradients), sum(g @ g.T for g in gradients), num_answers)
    close(torch.kron(found.h_out, found.h_in), torch.kron(h_out, h_in), 1e-6)


TOKEN_WISE = [("token", "mbq_ratio"), ("token", "kron"), ("token", "token")]


@pytest.mark.parametrize("site", TOY_SITES, ids=lambda s: s.name)
def test_the_kronecker_metrics_are_in_nats_of_the_mean_answer_loss(site) -> None:
    """Small changes of every weight of a layer raise the mean KL, in all, by what the metric says.

    Up to the noise of the sampled labels, that is. Tokens are independent in the layer behind the mixing only.
    """
    model, data = Toy(), list(toy_batches(40))
    needs = Needs(gram=True, fisher=True, saliency=True, gradient=True, sequences=True, power_rounds=1)
    bank = collect(model, [site], data, needs, SEED)
    weight, step, risen = linear(model, site).weight, 0.02, 0.0

    def logs():
        return torch.cat([model(b.inputs["input_ids"]).logits[:, -3:-1] for b in data]).double().log_softmax(-1)

    with torch.no_grad():
        reference, flat = logs(), weight.view(-1)
        for at in range(len(flat)):
            flat[at] += step
            risen += (reference.exp() * (reference - logs())).sum(-1).mean().item()
            flat[at] -= step
    variants = {("sequence", "none"): 0.3, ("token", "none"): 0.6, **dict.fromkeys(TOKEN_WISE, 0.15)}
    for (granularity, fusion), tolerance in variants.items():
        if granularity == "sequence" or site.name == "two":
            metric = KroneckerFisher(granularity=granularity, fusion=fusion, rounds=None).fuse(bank)[site]
            predicted = step**2 / 2 * (metric.h_out.trace() * metric.h_in[0].trace()).item()
            assert predicted == pytest.approx(risen, rel=tolerance), (granularity, fusion)


def full_bank(loaded):
    sites = [s for s in list_sites(loaded.model, "language") if s.block == 0]
    needs = replace(EVERYTHING, power_rounds=1)
    return sites, collect(loaded.model, sites, batches(loaded.processor, draw(1).examples, 4), needs, SEED)


def test_cached_statistics_are_the_computed_ones(loaded, tmp_path) -> None:
    sites, computed = full_bank(loaded)
    calls = []

    def compute():
        calls.append(1)
        return computed

    def cached(key):
        return statistics(tmp_path, key, compute, sites)

    assert cached({"a": 1, "b": 2}) is computed
    read = cached({"b": 2, "a": 1})
    assert len(calls) == 1
    assert list(read) == sites
    for s in sites:
        same(read[s], computed[s], 0)
    assert len({id(read[s].gram["text"]) for s in sites}) == len({s.reads for s in sites}) < len(sites)
    (file,) = tmp_path.glob("*.safetensors")
    content = file.read_bytes()
    for damage in (content[: len(content) // 2], content[:3], b""):
        file.write_bytes(damage)
        assert cached({"a": 1, "b": 2}) is computed
        assert file.read_bytes() == content
    cached({"a": 1})
    assert len(calls) == 5


def test_two_processes_compute_once(tmp_path) -> None:
    site = TOY_SITES[0]

    def compute():
        with (tmp_path / "calls").open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return {site: SiteStats({"image": 1, "text": 2}, {m: torch.full((4, 4), 0.1) for m in MODALITIES})}

    def work(number):
        stats = statistics(tmp_path / "cache", {"key": 1}, compute, [site])[site]
        (tmp_path / f"found-{number}").write_text(str(stats.gram["image"].sum().item()))

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(n,)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "calls").read_text() == "x"
    assert (tmp_path / "found-0").read_text() == (tmp_path / "found-1").read_text()


def test_calibration_heldout_and_test_share_no_picture() -> None:
    drawn = TinyVQA(num_images=20, questions_per_image=2, heldout_images=10, shown="both", seed=0, label_seed=0).draw()
    parts = [{e.image.tobytes() for e in drawn.examples}, {e.image.tobytes() for e in drawn.heldout_examples},
             {d["image"].tobytes() for d in documents(0, 100)}]  # fmt: skip
    assert [len(p) for p in parts[:2]] == [20, 10]
    assert len(set.union(*parts)) == sum(map(len, parts))
