"""Every transform gives an equivalent problem: the same errors cost the same, and what is stored stands for the layer itself."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from variants import built, everyone

from mgvq.checkpoint.load import FORMATS
from mgvq.protocols import LayerTransform, QuantizedWeight, Transform
from mgvq.types import Kronecker, Metric, Site, SiteStats

TRANSFORMS = everyone("transform")
each_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
# A power of two, an odd number times one, an odd number, one channel; q and v read the same.
SITES = [
    Site("language.0.q_proj", "language", "q_proj", 0, 24, 16, "language.0.qkv"),
    Site("language.0.v_proj", "language", "v_proj", 0, 7, 16, "language.0.qkv"),
    Site("language.0.down_proj", "language", "down_proj", 0, 16, 36),
    Site("projector.linear", "projector", "linear", None, 5, 1),
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factor(size, seed):
    tokens = normal(3 * size, size, seed=seed)
    return tokens.T @ tokens / len(tokens)


def weight_of(site, seed=0):
    return normal(site.out_features, site.in_features, seed=seed)


def groups():
    return {
        s: torch.arange(s.in_features) % 3 if s.in_features > 3 else torch.zeros(s.in_features, dtype=torch.long) for s in SITES
    }


def layers(transform):
    return transform(SITES, groups() if transform.within == "group" else None)


@each_transform
def test_it_meets_the_protocols(transform):
    assert isinstance(transform, Transform)
    made = layers(transform)
    assert list(made) == SITES
    assert all(isinstance(layer, LayerTransform) for layer in made.values())


@each_transform
@pytest.mark.parametrize("two_sided", [False, True])
def test_an_error_costs_the_same_before_and_after(transform, two_sided):
    for site, layer in layers(transform).items():
        h_in, h_out = factor(site.in_features, 1), factor(site.out_features, 2)
        stats = layer.statistics(SiteStats(num_tokens={}, gram={}, sequence=Kronecker(h_in, h_out)))
        error = weight_of(site, 3)
        before = Metric((h_in,), h_out if two_sided else None).loss(error)
        after = Metric((stats.sequence.h_in,), stats.sequence.h_out if two_sided else None).loss(layer.weight(error))
        assert after == pytest.approx(before, rel=1e-4)


@each_transform
def test_statistics_are_those_that_the_turned_layer_would_have_had(transform):
    """Of explicit tokens: x' = V x goes in, y' = U y comes out, and the gradient of y' is U g."""
    for site, layer in layers(transform).items():
        x, g = normal(50, site.in_features, seed=4), normal(50, site.out_features, seed=5)
        eye_in, eye_out = torch.eye(site.in_features), torch.eye(site.out_features)
        turn = layer.weight(eye_out[:, :1] @ eye_in[:1])  # one entry of W turns into u v^T, which names a column of U and V
        assert turn.norm() == pytest.approx(1.0, rel=1e-5)
        stats = SiteStats(
            num_tokens={"text": 50},
            gram={"text": x.T @ x},
            num_answers=10,
            fisher={"text": g.T @ g},
            gradient=g.T @ x / 10,
            channel_gram=(x.T @ x)[None],
        )
        turned = layer.statistics(stats)
        weight, error = layer.weight(weight_of(site)), weight_of(site, 6)
        assert float((turned.gradient * weight).sum()) == pytest.approx(
            float((stats.gradient * weight_of(site)).sum()), rel=1e-3, abs=1e-4
        )
        for gram in (turned.gram["text"], turned.channel_gram[0]):  # |E' V x|^2 over the tokens is |E x|^2
            spent = float((layer.weight(error) @ gram * layer.weight(error)).sum())
            assert spent == pytest.approx(float((x @ error.T).square().sum()), rel=1e-4)
        rows = float((turned.fisher["text"] @ layer.weight(error) * layer.weight(error)).sum())
        assert rows == pytest.approx(float((g @ error).square().sum()), rel=1e-4)


@each_transform
def test_turning_back_undoes_turning(transform):
    for site, layer in layers(transform).items():
        weight = weight_of(site)
        torch.testing.assert_close(layer.weight_back(layer.weight(weight)), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS.values() if t.within == "group"])
def test_within_a_group_no_channel_leaves_it(transform):
    for site, layer in layers(transform).items():
        own = groups()[site]
        weight = weight_of(site)
        for g in own.unique():
            alone = weight * (own == g)
            assert float(layer.weight(alone)[:, own != g].abs().sum()) == 0


@each_transform
def test_what_is_stored_decodes_to_the_layer_in_its_own_basis(transform):
    """Through the tensors and settings alone, as a checkpoint holds them."""
    codebook = built("codebook", "kmeans", "vector_length=1")
    for site, layer in layers(transform).items():
        inner = stored_of(codebook, layer.weight(weight_of(site)), site, groups()[site] if transform.within == "group" else None)
        wrapped = layer.wrap(inner)
        assert isinstance(wrapped, QuantizedWeight)
        loaded = FORMATS[wrapped.format].load(wrapped.tensors(), **wrapped.settings())
        expected = layer.weight_back(inner.decode())
        assert torch.equal(wrapped.decode(), loaded.decode())
        torch.testing.assert_close(wrapped.decode(), expected, rtol=0, atol=1e-6)
        extra = sum(t.nbytes for t in wrapped.tensors().values()) - sum(t.nbytes for t in inner.tensors().values())
        assert extra == sum(t.nbytes for t in layer.stored())


def stored_of(codebook, weight, site, groups):
    from mgvq.formats.grouped import GroupedWeight, pack_groups
    from mgvq.types import ChannelSlice

    numbers = torch.zeros(site.in_features, dtype=torch.long) if groups is None else groups
    parts = []
    for g in range(int(numbers.max()) + 1):
        columns = torch.nonzero(numbers == g).flatten()
        own = ChannelSlice(site, g, columns)
        (fitted,) = codebook.fit(codebook.table_group(own), [weight[:, columns]], codebook.rates()[1], [None], [])
        parts.append(fitted.weight(fitted.encode(weight[:, columns][:, :, None], 0, None)[0]))
    return parts[0] if len(parts) == 1 else GroupedWeight(tuple(parts), pack_groups(numbers), site.in_features)


def test_layers_that_read_the_same_share_their_inputs_signs():
    for transform in TRANSFORMS.values():
        made = layers(transform)
        assert made[SITES[0]].signs_in is made[SITES[1]].signs_in


def digest():
    """Of all turned weights and signs."""
    found = hashlib.sha256()
    for transform in TRANSFORMS.values():
        for site, layer in layers(transform).items():
            for tensor in (layer.weight(weight_of(site)), *layer.stored()):
                found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def test_threads_and_processes_do_not_change_a_bit():
    program = "import torch, test_transforms as t; torch.set_num_threads(2); print(t.digest())"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    ran = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == digest()
