"""Every codebook: exact bits, codes that decode to what was promised, same seed same bytes, a higher rate is better."""

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from variants import each, everyone

from mgvq.formats.trellis import TILE
from mgvq.protocols import Codebook, FittedCodebook, QuantizedWeight
from mgvq.types import ChannelSlice, Site

CODEBOOKS = everyone("codebook")
each_codebook = pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS.keys())


def site(name, out_features, in_features, tower="language", reads=""):
    return Site(name, tower, name.rsplit(".", 1)[-1], None, out_features, in_features, reads)


# Widths that no vector length divides, one column, fewer columns than a vector has.
SITES = [
    site("language.0.q_proj", 24, 13, reads="language.0.qkv"),
    site("language.0.v_proj", 8, 13, reads="language.0.qkv"),
    site("language.1.q_proj", 16, 13),
    site("language.0.down_proj", 6, 65),
    site("projector.linear", 9, 1, tower="projector"),
    site("vision.0.q_proj", 7, 5, tower="vision"),
]


def slices(num_groups=1):
    """Every layer cut into groups of channels by turns."""
    columns = {s: [torch.arange(g, s.in_features, num_groups) for g in range(min(num_groups, s.in_features))] for s in SITES}
    return [ChannelSlice(s, g, c) for s, parts in columns.items() for g, c in enumerate(parts)]


def weights_of(members):
    """Of another size in every layer."""
    sizes = {s.name: 0.02 * (i + 1) for i, s in enumerate(SITES)}
    draws = torch.Generator().manual_seed(0)
    return [sizes[p.site.name] * torch.randn(*p.shape, generator=draws) for p in members]


def importances_of(members, codebook):
    importances = [torch.linspace(0.1, 4, p.shape[1]) for p in members]
    return [i.diag() + 0.05 for i in importances] if codebook.needs_gram else importances


def rate_of(codebook, step):
    """The rate of that number, or the highest where there are fewer."""
    return codebook.rates()[min(step, len(codebook.rates()) - 1)]


def table_groups(codebook, num_groups=1):
    gathered = {}
    for channel_slice in slices(num_groups):
        gathered.setdefault(codebook.table_group(channel_slice), []).append(channel_slice)
    return gathered


def fit(codebook, name, members, rate, flags=None):
    importances = importances_of(members, codebook) if codebook.needs_importance else [None] * len(members)
    return codebook.fit(name, weights_of(members), rate, importances, [] if flags is None else flags)


def vectors_of(weight, length):
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % length)).unflatten(1, (-1, length))


def quantize(codebook, step, num_groups=1):
    """Plain rounding of all table groups: (weight, stored) of every channel slice."""
    done = []
    rate = rate_of(codebook, step)
    for name, members in table_groups(codebook, num_groups).items():
        for weight, fitted in zip(weights_of(members), fit(codebook, name, members, rate), strict=True):
            codes, _ = fitted.encode(vectors_of(weight, fitted.vector_length), 0, None)
            done.append((weight, fitted.weight(codes)))
    return done


def as_bytes(quantized):
    return [(role, t.numpy().tobytes()) for _, stored in quantized for role, t in stored.tensors().items()]


@each_codebook
def test_it_meets_the_protocols(codebook):
    assert isinstance(codebook, Codebook)
    name, members = next(iter(table_groups(codebook).items()))
    fitted = fit(codebook, name, members, codebook.rates()[0])
    assert len(fitted) == len(members)
    assert all(isinstance(f, FittedCodebook) for f in fitted)
    weight = weights_of(members)[0]
    codes, _ = fitted[0].encode(vectors_of(weight, fitted[0].vector_length), 0, None)
    assert codes.dtype == torch.int32
    assert codes.ndim == 3
    assert codes.shape[1] == -(-weight.shape[1] // fitted[0].vector_length)
    assert isinstance(fitted[0].weight(codes), QuantizedWeight)


@each_codebook
@pytest.mark.parametrize("step", [0, 3, -1])
@pytest.mark.parametrize("num_groups", [1, 3])
def test_the_predicted_bits_are_those_of_the_stored_tensors(codebook, step, num_groups):
    for name, members in table_groups(codebook, num_groups).items():
        rate = rate_of(codebook, step)
        stored = []
        for weight, fitted in zip(weights_of(members), fit(codebook, name, members, rate), strict=True):
            codes, _ = fitted.encode(vectors_of(weight, fitted.vector_length), 0, None)
            stored += fitted.weight(codes).tensors().values()
        sizes = {id(t): t.nbytes for t in stored}  # a table that slices share is one tensor
        assert codebook.storage_bits(members, rate) == 8 * sum(sizes.values())


@each_codebook
@pytest.mark.parametrize("num_groups", [1, 3])
def test_what_encode_promises_is_what_is_decoded(codebook, num_groups):
    for name, members in table_groups(codebook, num_groups).items():
        weights = weights_of(members)
        for weight, fitted in zip(weights, fit(codebook, name, members, rate_of(codebook, 2)), strict=True):
            codes, values = fitted.encode(vectors_of(weight, fitted.vector_length), 0, None)
            stored = fitted.weight(codes)
            assert stored.shape == weight.shape
            assert stored.decode().dtype == torch.float32
            assert torch.equal(stored.decode(), values.flatten(1)[:, : weight.shape[1]])


@each_codebook
@pytest.mark.parametrize("rooted", [False, True])
def test_vectors_may_come_one_at_a_time_and_rows_in_runs(codebook, rooted):
    for name, members in table_groups(codebook, 3).items():
        for weight, fitted in zip(weights_of(members), fit(codebook, name, members, rate_of(codebook, 2)), strict=True):
            length = fitted.vector_length
            root = torch.eye(length) + torch.ones(length, length).tril(-1) if rooted else None
            vectors = vectors_of(weight, length)
            codes, values = fitted.encode(vectors, 0, root)
            alone = [fitted.encode(vectors[:, v : v + 1], v, root) for v in range(vectors.shape[1])]
            assert torch.equal(torch.cat([c for c, _ in alone], 1), codes)
            assert torch.equal(torch.cat([x for _, x in alone], 1), values)
            cut = TILE if codebook.spans_rows else 2
            parts = [part for part in (slice(0, cut), slice(cut, None)) if len(vectors[part])]
            assert torch.equal(torch.cat([fitted.rows(p).encode(vectors[p], 0, root)[0] for p in parts]), codes)


@each_codebook
def test_a_root_lowers_the_error_in_its_metric_where_the_codebook_says_so(codebook):
    for name, members in table_groups(codebook).items():
        for weight, fitted in zip(weights_of(members), fit(codebook, name, members, rate_of(codebook, 1)), strict=True):
            length = fitted.vector_length
            root = torch.randn(length, length, generator=torch.Generator().manual_seed(length)).triu()
            vectors = vectors_of(weight, length)
            last = -(-weight.shape[1] // length) - 1
            root[:, weight.shape[1] - last * length :] = 0  # as the caller does for padding; here for all vectors
            if not codebook.follows_metric:
                assert torch.equal(*(fitted.encode(vectors, 0, r)[0] for r in (root, None)))
                continue
            rooted, plain = ((fitted.encode(vectors, 0, r)[1] - vectors) @ root.T for r in (root, None))
            assert rooted.square().sum() <= plain.square().sum() * (1 + 1e-5)


@each_codebook
@pytest.mark.parametrize("num_groups", [1, 2])
def test_the_same_seed_gives_the_same_bytes(codebook, num_groups):
    assert as_bytes(quantize(codebook, 2, num_groups)) == as_bytes(quantize(codebook, 2, num_groups))


@each_codebook
def test_weights_and_importances_are_left_alone(codebook):
    for name, members in table_groups(codebook).items():
        weights, importances = weights_of(members), importances_of(members, codebook)
        codebook.fit(name, weights, rate_of(codebook, 1), importances if codebook.needs_importance else [None] * len(members), [])
        assert all(torch.equal(a, b) for a, b in zip(weights, weights_of(members), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(importances, importances_of(members, codebook), strict=True))


@each_codebook
def test_a_higher_rate_is_closer(codebook):
    errors = [sum((s.decode() - w).square().sum().item() for w, s in quantize(codebook, step)) for step in (0, 1, 3)]
    assert errors[0] > errors[1] > errors[2]


@each_codebook
def test_rates_have_their_own_names_and_rise(codebook):
    rates = codebook.rates()
    assert len({r.name for r in rates}) == len(rates)
    for lower, higher in itertools.pairwise(rates):
        assert lower.index_bits <= higher.index_bits
    for members in table_groups(codebook).values():
        for lower, higher in itertools.pairwise(rates):
            same = lower.name.split("x")[0] == higher.name.split("x")[0] and lower.name.count("+") == higher.name.count("+")
            if same:  # vectors as long, as many tables
                assert codebook.storage_bits(members, lower) < codebook.storage_bits(members, higher)


@each_codebook
def test_slices_of_a_table_group_are_of_one_channel_group_and_one_tower(codebook):
    for members in table_groups(codebook, 3).values():
        assert len({(p.group, p.site.tower) for p in members}) == 1


ONCE = each("codebook")


def digest():
    return {name: hash_of(as_bytes(quantize(ONCE[name], 2))) for name in ONCE}


def hash_of(parts):
    return hashlib.sha256(b"".join(data for _, data in parts)).hexdigest()


def test_threads_and_processes_do_not_change_a_bit():
    program = "import torch, test_codebook as t; torch.set_num_threads(2); print(t.digest())"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    ran = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == str(digest())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ONCE)
def test_a_gpu_gives_the_bytes_of_the_cpu(name):
    codebook = ONCE[name]
    for table_group, members in table_groups(codebook).items():
        stored = []
        for device in ("cpu", "cuda"):
            weights = [w.to(device) for w in weights_of(members)]
            importances = [e.to(device) if codebook.needs_importance else None for e in importances_of(members, codebook)]
            fitted = codebook.fit(table_group, weights, rate_of(codebook, 2), importances, [])
            codes = [f.encode(vectors_of(w, f.vector_length), 0, None)[0] for f, w in zip(fitted, weights, strict=True)]
            quantized = [f.weight(c) for f, c in zip(fitted, codes, strict=True)]
            stored.append([t.cpu().numpy().tobytes() for q in quantized for t in q.tensors().values()])
        assert stored[0] == stored[1]
