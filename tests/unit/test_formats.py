"""Stored weights decode as before saving and cost exactly the predicted bits."""

import pytest
import torch

from mgvq.formats.columns import ColumnWeight
from mgvq.formats.exponent import ExponentWeight
from mgvq.formats.grid import CHANNEL_BITS, GridWeight, channel_bits, pack_channels, scale_levels
from mgvq.formats.grouped import SLICE_FORMATS, GroupedWeight, pack_groups
from mgvq.formats.packing import unpack
from mgvq.formats.scalar import ScalarWeight
from mgvq.formats.vector import VectorWeight, centroids, codes_bits, index_width, store_table, table_bits, to_vectors

SHAPES = [(3, 1), (1, 5), (5, 7), (4, 64), (2, 130)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(top, *shape, seed=1):
    return torch.randint(top, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def bits_of(tensors):
    return 8 * sum(t.nbytes for t in tensors.values())


def reloaded(weight):
    """What a reader makes of the stored tensors and settings, and nothing else."""
    return {**SLICE_FORMATS, "grouped": GroupedWeight}[weight.format].load(weight.tensors(), **weight.settings())


def scalar_weight(shape, bits, group_size):
    groups = -(-shape[1] // group_size)
    scales = (normal(shape[0], groups).abs() + 0.1).half()
    return ScalarWeight(integers(2**bits, *shape), integers(2**bits, shape[0], groups, seed=2), scales, bits, group_size)


def vector_weight(shape, length, num_centroids, kind="fp16", subspaces=1, stages=1, scale=None):
    codes = integers(num_centroids, shape[0], -(-shape[1] // length), stages)
    stored = [store_table(normal(num_centroids, length, seed=t), kind) for t in range(subspaces * stages)]
    step = torch.stack([s for _, s in stored]) if kind == "int8" else None
    return VectorWeight(codes, torch.stack([t for t, _ in stored]), shape[1], step, scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("group_size", [1, 3, 64])
def test_scalar_round_trip_and_bits(shape, bits, group_size):
    weight = scalar_weight(shape, bits, group_size)
    loaded = reloaded(weight)
    assert loaded.shape == weight.shape == shape
    assert torch.equal(loaded.decode(), weight.decode())
    assert bits_of(weight.tensors()) == ScalarWeight.storage_bits(shape, bits, group_size)


def test_scalar_bits_by_hand():
    # 15 codes of 3 bits: 6 bytes; 9 groups: 4 bytes of zero points and 18 of scales.
    assert ScalarWeight.storage_bits((3, 5), 3, 2) == 8 * (6 + 4 + 18)


def test_scalar_decode_by_hand():
    codes, zeros = torch.tensor([[0, 1, 3]], dtype=torch.int32), torch.tensor([[1, 0]], dtype=torch.int32)
    weight = ScalarWeight(codes, zeros, torch.tensor([[0.5, 2.0]]).half(), 2, 2)
    assert weight.decode().tolist() == [[-0.5, 0.0, 6.0]]


def grid_weight(shape, bits, scale_bits, group_size, channels=None):
    scale_codes = integers(2**scale_bits, shape[0], -(-shape[1] // group_size), seed=2)
    return GridWeight(
        integers(2**bits, *shape), scale_codes, torch.tensor([0.1, 0.7]).half(), bits, scale_bits, group_size, channels
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "scale_bits"), [(1, 1), (2, 4), (8, 8)])
@pytest.mark.parametrize("group_size", [3, 64])
@pytest.mark.parametrize("stretched", [False, True])
def test_grid_round_trip_and_bits(shape, bits, scale_bits, group_size, stretched):
    channels = pack_channels(integers(2**CHANNEL_BITS, shape[1], seed=3)) if stretched else None
    weight = grid_weight(shape, bits, scale_bits, group_size, channels)
    loaded = reloaded(weight)
    assert loaded.shape == weight.shape == shape
    assert torch.equal(loaded.decode(), weight.decode())
    predicted = GridWeight.storage_bits(shape, bits, scale_bits, group_size) + stretched * channel_bits(shape[1])
    assert bits_of(weight.tensors()) == predicted


def test_grid_decode_by_hand():
    """Scales 1, 2, 4, 8; the second channel was stretched by 2, the third by sqrt(8)."""
    codes, scale_codes = (
        torch.tensor([[0, 1, 3], [2, 2, 0]], dtype=torch.int32),
        torch.tensor([[0, 3], [1, 2]], dtype=torch.int32),
    )
    channels = pack_channels(torch.tensor([0, 2, 3], dtype=torch.int32))
    weight = GridWeight(codes, scale_codes, torch.tensor([1.0, 8.0]).half(), 2, 2, 2, channels)
    expected = torch.tensor([[-1.5, -0.5 / 2, 8 * 1.5 / 8**0.5], [2 * 0.5, 2 * 0.5 / 2, 4 * -1.5 / 8**0.5]])
    torch.testing.assert_close(weight.decode(), expected)


def test_grid_bits_by_hand():
    # 15 codes of 3 bits: 6 bytes; 9 scales of 4 bits: 5; smallest and largest scale: 4; 5 channels of 3 bits: 2.
    assert GridWeight.storage_bits((3, 5), 3, 4, 2) == 8 * (6 + 5 + 4)
    assert channel_bits(5) == 8 * 2


def test_scales_rise_geometrically_and_equal_ends_are_one_scale():
    assert scale_levels(torch.tensor([1.0, 8.0]).half(), 2).tolist() == [1, 2, 4, 8]
    assert scale_levels(torch.tensor([0.5, 0.5]).half(), 1).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("shape", SHAPES)
def test_column_vectors_round_trip(shape):
    weight = ColumnWeight(vector_weight(shape[::-1], 2, 16, "int8"))
    loaded = reloaded(weight)
    assert loaded.shape == weight.shape == shape
    assert torch.equal(loaded.decode(), weight.decode())


def test_column_vectors_decode_by_hand():
    """Two columns of three rows, in vectors of two rows."""
    table, codes = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]).half(), torch.tensor([[[0], [1]], [[1], [0]]], dtype=torch.int32)
    assert ColumnWeight(VectorWeight(codes, table, 3)).decode().tolist() == [[1, 3], [2, 4], [3, 1]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("length", "num_centroids"), [(1, 1), (3, 3), (4, 256)])
@pytest.mark.parametrize("kind", ["fp16", "int8"])
@pytest.mark.parametrize(("subspaces", "stages"), [(1, 1), (3, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("scaled", [False, True])
def test_vector_round_trip_and_bits(shape, length, num_centroids, kind, subspaces, stages, scaled):
    weight = vector_weight(shape, length, num_centroids, kind, subspaces, stages, torch.tensor(0.37).half() if scaled else None)
    loaded = reloaded(weight)
    assert loaded.shape == weight.shape == shape
    assert torch.equal(loaded.decode(), weight.decode())
    predicted = codes_bits(shape, length, num_centroids, stages) + subspaces * stages * table_bits(length, num_centroids, kind)
    assert bits_of(weight.tensors()) == predicted + 16 * scaled


def test_vector_bits_by_hand():
    # 3 x 3 vectors of 4 bits: 5 bytes; 16 centroids of 2 fp16: 64 bytes, of 2 int8 and a step: 34.
    assert (codes_bits((3, 5), 2, 16), table_bits(2, 16, "fp16"), table_bits(2, 16, "int8")) == (8 * 5, 8 * 64, 8 * 34)
    assert codes_bits((3, 5), 2, 16, stages=2) == 8 * 9
    assert [index_width(k) for k in (1, 2, 3, 4, 5, 256, 257)] == [1, 1, 2, 2, 3, 8, 9]


TABLE = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]]).half()


def test_vector_decode_by_hand():
    codes = torch.tensor([[[0], [1]], [[1], [0]]], dtype=torch.int32)
    assert VectorWeight(codes, TABLE[:1], 3).decode().tolist() == [[1, 2, 3], [3, 4, 1]]
    scaled = VectorWeight(codes, TABLE[:1], 3, scale=torch.tensor(0.5).half())
    assert scaled.decode().tolist() == [[0.5, 1, 1.5], [1.5, 2, 0.5]]
    stepped = VectorWeight(codes, TABLE[:1].to(torch.int8), 3, step=torch.tensor([0.25]).half())
    assert stepped.decode().tolist() == [[0.25, 0.5, 0.75], [0.75, 1, 0.25]]


def test_tables_take_the_vectors_of_a_row_by_turns():
    codes = torch.tensor([[[0], [1], [1]]], dtype=torch.int32)
    assert VectorWeight(codes, TABLE, 6).decode().tolist() == [[1, 2, 30, 40, 3, 4]]


def test_stages_add_up():
    codes = torch.tensor([[[0, 1], [1, 1]]], dtype=torch.int32)
    assert VectorWeight(codes, TABLE, 4).decode().tolist() == [[31, 42, 33, 44]]


def test_vector_decode_ignores_what_lies_in_the_padding():
    table = torch.tensor([[[1.0, 2.0, 3.0], [4.0, torch.nan, torch.inf]]]).half()
    codes = torch.tensor([[[0], [1]]], dtype=torch.int32)
    assert VectorWeight(codes, table, 4).decode().tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("vector_length", [1, 2, 3, 4])
def test_to_vectors_pads_each_row_with_zeros(vector_length):
    weight = normal(3, 5)
    rows = to_vectors(weight, vector_length).flatten(1)
    assert torch.equal(rows[:, :5], weight)
    assert (rows[:, 5:] == 0).all()
    assert 0 <= rows.shape[1] - 5 < vector_length


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
def test_an_int8_table_is_off_by_half_a_step_at_most(size):
    table = size * normal(50, 3)
    stored, step = store_table(table, "int8")
    largest = table.abs().max()
    assert step.item() == pytest.approx(largest.item() / 127, rel=2.0**-11)
    # The largest entries may be cut by what rounding the step to fp16 takes from 127 steps.
    assert ((centroids(stored, step) - table).abs() <= step.float() / 2 + 2.0**-11 * largest).all()


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_a_table_of_zeros_stays_one_and_one_beyond_fp16_is_refused(kind):
    assert not centroids(*store_table(torch.zeros(4, 2), kind)).any()
    with pytest.raises(ValueError, match="below 65504"):
        store_table(torch.tensor([[0.0, -7e4]]), kind)


def grouped(num_groups, num_in=23, num_out=5):
    """Groups of different sizes, every third of them on a scalar grid."""
    group = torch.cat([torch.arange(num_groups), integers(num_groups, num_in - num_groups) // 2]).to(torch.int32)
    slices = []
    for g in range(num_groups):
        shape = num_out, int((group == g).sum())
        slices.append(
            scalar_weight(shape, 3, 4) if g % 3 == 2 else vector_weight(shape, 2, 8, scale=torch.tensor(g + 0.5).half())
        )
    return GroupedWeight(tuple(slices), pack_groups(group), num_in), group


@pytest.mark.parametrize("num_groups", [2, 3, 4, 5, 16])
def test_every_slice_fills_the_channels_of_its_group(num_groups):
    weight, group = grouped(num_groups)
    decoded = weight.decode()
    for g, channel_slice in enumerate(weight.slices):
        assert torch.equal(decoded[:, group == g], channel_slice.decode())


@pytest.mark.parametrize("exponent", [-120, -22, 22, 120])
def test_an_exponent_costs_no_tensor_and_comes_back(exponent):
    for plain in (scalar_weight((5, 7), 3, 3), grid_weight((5, 7), 3, 4, 3), vector_weight((5, 7), 2, 8)):
        weight = ExponentWeight(plain, exponent)
        loaded = reloaded(weight)
        assert loaded.shape == weight.shape == (5, 7)
        assert torch.equal(loaded.decode(), plain.decode() * 2.0**exponent)
        assert bits_of(weight.tensors()) == bits_of(plain.tensors())


GROUP_BYTES = {2: 3, 3: 6, 4: 6, 5: 9, 16: 12}  # of 23 channels, by hand


@pytest.mark.parametrize("num_groups", GROUP_BYTES)
def test_grouped_round_trip_and_bits(num_groups):
    weight, group = grouped(num_groups)
    loaded = reloaded(weight)
    assert loaded.shape == weight.shape == (5, 23)
    assert torch.equal(loaded.decode(), weight.decode())
    assert unpack(weight.groups, index_width(num_groups), 23).tolist() == group.tolist()
    assert bits_of(weight.tensors()) == sum(bits_of(p.tensors()) for p in weight.slices) + 8 * GROUP_BYTES[num_groups]


def test_a_checkpoint_stores_what_layers_share_once_and_loads_as_it_was(loaded, tmp_path):
    """Two layers with the same group ids and the same tables, whose ledger is checked against the files by `save` itself."""
    from mgvq.checkpoint.load import load
    from mgvq.checkpoint.save import save
    from mgvq.model.sites import list_sites

    sites = list_sites(loaded.model, "language")
    q, k, down = (next(s for s in sites if s.kind == kind) for kind in ("q_proj", "k_proj", "down_proj"))
    group = integers(3, q.in_features)
    ids, sizes, tables = pack_groups(group), torch.bincount(group).tolist(), vector_weight((1, 1), 4, 16).table
    weights = {down: scalar_weight((down.out_features, down.in_features), 2, 64)}
    for site in (q, k):
        codes = [integers(16, site.out_features, -(-size // 4), 1) for size in sizes]
        slices = (VectorWeight(c, tables, size) for c, size in zip(codes, sizes, strict=True))
        weights[site] = GroupedWeight(tuple(slices), ids, site.in_features)
    ledger = save(tmp_path / "checkpoint", loaded, sites, weights)

    stored = [e for e in ledger.entries if e.tensor.startswith((f"{q.name}.", f"{k.name}.")) and not e.tensor.endswith("bias")]
    codes = sum(codes_bits((s.out_features, size), 4, 16) for s in (q, k) for size in sizes)
    assert 8 * sum(e.num_bytes for e in stored) == codes + table_bits(4, 16, "fp16") + 8 * -(-q.in_features * 2 // 8)
    assert sum(e.num_weights for e in stored) == q.num_weights + k.num_weights
    for packed in (False, True):
        model = load(tmp_path / "checkpoint", packed=packed)
        for site, weight in weights.items():
            assert torch.equal(model.get_submodule(site.name).weight, weight.decode())
