"""Checkpoints that are not what was written, by kind. A new one is a line: what is done to a file, and what is said."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made import CPU, copy, edit_json, source
from safetensors.torch import load_file, save_file

import mgvq
from mgvq.checkpoint.digests import DIGESTS
from mgvq.checkpoint.index import FIRST_SHARD, Packed, read_index, to_bytes
from mgvq.checkpoint.save import save
from mgvq.errors import UserError
from mgvq.formats.vector import VectorWeight
from mgvq.model.files import INDEX, OLD_INDEX
from mgvq.model.load import Loaded, load
from mgvq.model.sites import list_sites

Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Loaded]:
    """A checkpoint with three quantised layers of one shape, and the model that it was made of."""
    folder = tmp_path_factory.mktemp("whole")
    loaded = load(source(copy(folder / "m")), CPU)
    sites = [s for s in list_sites(loaded.model, "language") if s.kind == "up_proj"][:3]
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for site in sites:
        table = torch.randn(1, 16, 4, generator=generator).half() * 0.05
        codes = torch.randint(0, 16, (site.out_features, site.in_features // 4, 1), generator=generator)
        weights[site] = VectorWeight(codes, table, site.in_features)
    save(folder / "checkpoint", loaded, sites, weights)
    return folder / "checkpoint", loaded


@pytest.fixture
def checkpoint(whole: tuple[Path, Loaded], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole[0], tmp_path / "checkpoint"))


NAMES = [FIRST_SHARD, INDEX, DIGESTS, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
         "processor_config.json", "chat_template.jinja"]  # fmt: skip


def flip(file: Path) -> None:
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


HURTS: dict[str, Damage] = {
    "a bit flipped": flip,
    "cut off": halve,
    "emptied": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "another text": lambda file: file.write_bytes(b"\xff\xfe{}"),
    "a list": lambda file: file.write_bytes(b"[]"),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("hurt", HURTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_hurt_file_is_refused_by_its_name(name: str, hurt: str, checkpoint: Path) -> None:
    HURTS[hurt](checkpoint / name)
    named = "no mgvq checkpoint" if hurt == "gone" and name == INDEX else name.replace(".", r"\.")
    with pytest.raises(UserError, match=named):
        mgvq.load(checkpoint)
    if name not in (FIRST_SHARD, DIGESTS):
        with pytest.raises(UserError, match=named):
            mgvq.load_processor(checkpoint)


@pytest.mark.parametrize("hurt", ["cut off", "emptied", "another text", "a list"])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in (DIGESTS, "chat_template.jinja")])
def test_without_digests_what_cannot_be_read_is_still_named(name: str, hurt: str, checkpoint: Path) -> None:
    HURTS[hurt](checkpoint / name)
    told = []
    for step in (mgvq.load, mgvq.load_processor):
        try:
            step(checkpoint, verify=False)
        except UserError as error:
            told.append(str(error))
    assert told
    assert all(name in text for text in told)


SWAPS: dict[str, tuple[Damage, str]] = {
    "a file of a plain model": (lambda c: (c / "model.safetensors").write_bytes(b"x"), r"model\.safetensors added"),
    "an adapter": (lambda c: (c / "adapter_config.json").write_text("{}"), r"adapter_config\.json added"),
    "code": (lambda c: (c / "modeling_mine.py").write_text(""), r"modeling_mine\.py added"),
    "another template in a folder": (
        lambda c: ((c / "additional_chat_templates").mkdir(), (c / "additional_chat_templates" / "a.jinja").write_text("x")),
        r"additional_chat_templates/a\.jinja added",
    ),
    "two files": (lambda c: (flip(c / "config.json"), flip(c / "tokenizer.json")), r"config\.json, tokenizer\.json altered"),
}


@pytest.mark.parametrize("case", SWAPS)
def test_what_a_loader_would_read_is_not_added(case: str, checkpoint: Path) -> None:
    change, named = SWAPS[case]
    change(checkpoint)
    with pytest.raises(UserError, match=named):
        mgvq.load(checkpoint)


def test_what_nobody_reads_may_lie_beside_it(checkpoint: Path) -> None:
    for name in ("README.md", ".DS_Store", "LICENSE", ".gitattributes"):
        (checkpoint / name).write_text("hello")
    mgvq.load(checkpoint)
    mgvq.load_processor(checkpoint)


def edit_index(checkpoint: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change what the index says of its layers, as objects of json."""
    index = read_index(checkpoint / INDEX)
    layers = {n: {"format": p.format, "tensors": dict(p.tensors), **p.settings} for n, p in index.layers.items()}
    edit(layers)
    packed = {n: Packed(e.pop("format", None), e, t) for n, e in layers.items() for t in [e.pop("tensors")]}
    (checkpoint / INDEX).write_bytes(to_bytes(replace(index, layers=packed)))


def layer(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the first layer's entry in the index."""
    return lambda c: edit_index(c, lambda layers: edit(next(iter(layers.values()))))


def content(edit: Callable[[bytes], bytes]) -> Damage:
    """Change the bytes of the index."""
    return lambda c: (c / INDEX).write_bytes(edit((c / INDEX).read_bytes()))


def stored(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def change(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / FIRST_SHARD)
        edit(tensors)
        save_file(tensors, checkpoint / FIRST_SHARD)

    return change


TABLE = "model.language_model.layers.0.mlp.up_proj.table"
NORM = "model.language_model.norm.weight"
UNFIT: dict[str, tuple[Damage, str]] = {
    "version of tomorrow": (content(lambda b: b[:4] + b"\x63" + b[5:]), r"mgvq\.index has version 99"),
    "no index": (content(lambda b: b"PICK" + b[4:]), r"mgvq\.index cannot be read .*PICK"),
    "a byte too many": (content(lambda b: b + b"\0"), r"mgvq\.index does not describe layers .*too many"),
    "a byte too few": (content(lambda b: b[:-1]), r"mgvq\.index does not describe layers"),
    "names without end": (content(lambda b: b[:8] + b"\xff\xff\xff\xff\x07"), r"mgvq\.index does not describe layers"),
    "a number without end": (content(lambda b: b[:8] + b"\xff" * 99), r"mgvq\.index does not describe layers"),
    "a shard elsewhere": (
        lambda c: (c / INDEX).write_bytes(to_bytes(replace(read_index(c / INDEX), shards=["../mgvq.safetensors"]))),
        r"mgvq\.index names '\.\./mgvq\.safetensors'",
    ),
    "a format of tomorrow": (layer(lambda e: e.update(format="hologram")), r"mgvq\.index: layer .* has the format 'hologram'"),
    "a tensor that is not there": (
        layer(lambda e: e["tensors"].update(codes="gone")),
        r"mgvq\.index: gone of layer .* no packed layer",
    ),
    "another shape": (
        layer(lambda e: e.update(shape=[3, 5])),
        r"layer model\.language_model\.layers\.0\.mlp\.up_proj \(ValueError: codes is uint8",
    ),
    "a setting too many": (layer(lambda e: e.update(colour="red")), r"layers\.0\.mlp\.up_proj \(TypeError.*colour"),
    "a table of another shape": (stored(lambda t: t.update({TABLE: t[TABLE][:, :1, :1].contiguous()})), r"up_proj|does not fit"),
    "a table of numbers that are none": (stored(lambda t: t[TABLE].fill_(float("nan"))), r"mgvq\.safetensors: 1 tensors are NaN"),
    "a norm of numbers that are none": (stored(lambda t: t[NORM].fill_(float("inf"))), rf"mgvq\.safetensors: 1 .*{NORM}"),
    "a norm is missing": (stored(lambda t: t.pop(NORM)), rf"does not fit its config\.json: missing \['{NORM}'\]"),
    "a tensor too many": (stored(lambda t: t.update(x=torch.zeros(2))), r"does not fit .* unexpected \['x'\]"),
    "a norm of another shape": (stored(lambda t: t.update({NORM: t[NORM][:3].contiguous()})), r"does not fit its config\.json"),
    "a config of more layers": (
        lambda c: edit_json(
            c / "config.json", lambda i: i["text_config"].update(num_hidden_layers=5, layer_types=["full_attention"] * 5)
        ),
        r"does not fit its config\.json: missing",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_parts_that_do_not_fit_each_other_are_named(case: str, checkpoint: Path) -> None:
    change, named = UNFIT[case]
    change(checkpoint)
    with pytest.raises(UserError, match=named):
        mgvq.load(checkpoint, verify=False)


def test_a_folder_that_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing", copy(tmp_path / "m")):
        for step in (mgvq.load, mgvq.load_processor):
            with pytest.raises(UserError, match="is no mgvq checkpoint"):
                step(folder)


@pytest.mark.parametrize("version", [2, 3])
def test_the_index_of_version_2_is_read(version: int, whole: tuple[Path, Loaded], checkpoint: Path) -> None:
    """The first checkpoints of version 3 had it too, and digests."""
    index = read_index(checkpoint / INDEX)
    layers = {n: {"format": p.format, "tensors": p.tensors, **p.settings} for n, p in index.layers.items()}
    old = {"version": version, "layers": layers, "source_dtype": index.source_dtype}
    (checkpoint / OLD_INDEX).write_text(json.dumps(old))
    (checkpoint / INDEX).unlink()
    edit_json(checkpoint / "config.json", lambda c: (c.pop("quantization_config"), c.pop("transformers_weights")))
    (checkpoint / DIGESTS).unlink()
    if version == 3:
        with pytest.raises(UserError, match=r"mgvq\.digests\.json cannot be read"):
            mgvq.load(checkpoint)
        digests = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in checkpoint.iterdir()}
        (checkpoint / DIGESTS).write_text(json.dumps(digests))
    for packed in (False, True):
        found, expected = (mgvq.load(folder, packed=packed).state_dict() for folder in (checkpoint, whole[0]))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    mgvq.load_processor(checkpoint)
    edit_json(checkpoint / OLD_INDEX, lambda i: i.update(version=99))
    with pytest.raises(UserError, match=r"mgvq\.json has version 99"):
        mgvq.load(checkpoint)


def test_a_checkpoint_of_version_2_gives_the_weights_that_it_had() -> None:
    """It was written when there was no version 3; beside it lie the digests of its decoded weights, as they were then."""
    folder = Path(__file__).parents[1] / "data" / "checkpoints" / "version2"
    model = mgvq.load(folder)
    for name, digest in json.loads(folder.with_suffix(".json").read_text()).items():
        assert hashlib.sha256(model.get_submodule(name).weight.numpy().tobytes()).hexdigest() == digest, name
    mgvq.load_processor(folder)


def test_every_file_has_its_digest(whole: tuple[Path, Loaded]) -> None:
    digests = json.loads((whole[0] / DIGESTS).read_text())
    assert set(digests["files"]) == {f.name for f in whole[0].iterdir()} - {DIGESTS}


def test_auto_is_a_device(checkpoint: Path) -> None:
    assert mgvq.load(checkpoint, device="auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="device=fpga is none that this torch has"):
        mgvq.load(checkpoint, device="fpga")
