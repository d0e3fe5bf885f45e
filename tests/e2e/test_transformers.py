"""The way in through transformers: packed from `from_pretrained`, exact whatever the model is cast to, and saved as it was."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mgvq
from mgvq.checkpoint.digests import DIGESTS
from mgvq.checkpoint.packed import packed_layers
from mgvq.checkpoint.save import save
from mgvq.cli import ask as asking
from mgvq.export.folder import export
from mgvq.formats.grouped import GroupedWeight, pack_groups
from mgvq.formats.vector import VectorWeight
from mgvq.model.load import Loaded
from mgvq.model.sites import list_sites
from mgvq.quantization.embeddings import round_embeddings

IDS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A small language model in bfloat16: layers in groups that share tables, an embedding of 8 bits, three shards."""
    from mgvq.model.processor import load_processor
    from mgvq.model.source import SHIPPED

    folder = tmp_path_factory.mktemp("given") / "checkpoint"
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 640}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, dtype="bfloat16")).bfloat16().eval()
    sites, weights = list_sites(model, "all"), {}
    group = torch.randint(0, 3, (32,), generator=generator)
    ids, columns = pack_groups(group), group.bincount(minlength=3).tolist()
    table = (torch.randn(1, 11, 4, generator=generator) * 0.1).half()  # 11: not all indices of 4 bits have a centroid

    def vector(rows: int, width: int) -> VectorWeight:
        return VectorWeight(torch.randint(0, 11, (rows, -(-width // 4), 1), generator=generator), table, width)

    for site in sites:
        rows, width = site.out_features, site.in_features
        parts = tuple(vector(rows, size) for size in columns) if width == 32 else ()
        weights[site] = GroupedWeight(parts, ids, width) if parts else vector(rows, width)
    tokenizer = load_processor(str(SHIPPED / "tiny_internvl")).tokenizer
    loaded = Loaded(model.requires_grad_(False), tokenizer, torch.bfloat16)
    save(folder, loaded, sites, weights, round_embeddings(model, 8), shard_bytes=2_500)
    return folder, model


def stored(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of the packed layers."""
    return {f"{name}.{role}": layer.get_buffer(role) for name, layer in packed_layers(model) for role in layer.roles}


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether they hold the same packed tensors, in the same dtypes."""
    left, right = stored(a), stored(b)
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name].cpu(), right[name].cpu()) for name in left
    )


def test_the_checkpoint_has_shards(given: tuple[Path, LlamaForCausalLM]) -> None:
    names = {file.name for file in given[0].glob("*.safetensors")}
    assert {"mgvq.safetensors", "mgvq-2.safetensors", "mgvq-3.safetensors"} <= names
    assert "model.safetensors" not in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_and_decoded_say_the_same(given: tuple[Path, LlamaForCausalLM], dtype: torch.dtype) -> None:
    packed = AutoModelForCausalLM.from_pretrained(given[0], dtype=dtype)
    dense = mgvq.load(given[0], dtype=dtype)
    assert packed.dtype == dense.dtype == dtype
    assert len(list(packed_layers(packed))) == 14
    assert not list(packed_layers(dense))
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    with torch.inference_mode():
        assert torch.allclose(packed(IDS).logits, dense(IDS).logits, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_without_a_dtype_it_has_the_stored_one(given: tuple[Path, LlamaForCausalLM]) -> None:
    assert AutoModelForCausalLM.from_pretrained(given[0]).dtype == torch.bfloat16


def test_transformers_decodes_it_too(given: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(given[0], dtype=torch.float32)
    dense = mgvq.load(given[0])
    model.dequantize()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in dense.state_dict().items())
    dense.save_pretrained(tmp_path)  # a plain model, which needs no mgvq
    assert (tmp_path / "model.safetensors").is_file()
    assert "mgvq" not in (tmp_path / "config.json").read_text()


CHANGES = {
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "to bfloat16 and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tables_stay_exact(change: str, given: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    """Whatever is done to the model, and saved: the same bytes of codes and tables, with biases and norms as they were cast."""
    model = mgvq.load(given[0], packed=True)
    changed = CHANGES[change](mgvq.load(given[0], packed=True))
    assert same(model, changed)
    with torch.inference_mode():
        assert torch.isfinite(changed(IDS).logits).all()
    changed.save_pretrained(tmp_path, max_shard_size=2_500)
    assert not (tmp_path / "model.safetensors").exists()
    again = mgvq.load(tmp_path, packed=True)
    assert same(model, again)
    if change in ("deepcopy", "pickle", "float"):
        for file in tmp_path.iterdir():
            assert file.name == DIGESTS or file.read_bytes() == (given[0] / file.name).read_bytes(), file.name
        assert {f.name for f in given[0].glob("mgvq*")} == {f.name for f in tmp_path.glob("mgvq*")}


def test_a_processor_may_be_saved_beside_it(given: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    mgvq.load(given[0], packed=True).save_pretrained(tmp_path)
    mgvq.load_processor(given[0]).save_pretrained(tmp_path)
    mgvq.load(tmp_path)
    mgvq.load_processor(tmp_path)


def test_dispatch_keeps_them_exact(given: tuple[Path, LlamaForCausalLM]) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = mgvq.load(given[0], packed=True)
    with torch.inference_mode():
        expected = model(IDS).logits
        offloaded = accelerate.cpu_offload(mgvq.load(given[0], packed=True), execution_device=torch.device("cpu"))
        assert same(model, offloaded)
        assert torch.equal(offloaded(IDS).logits, expected)
        mapped = AutoModelForCausalLM.from_pretrained(given[0], device_map={"": "cpu"}, dtype=torch.float32)
        assert same(model, mapped)
        assert torch.equal(mapped(IDS).logits, expected)


PLAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
{}
model = {}.from_pretrained(sys.argv[1])
print(type(model).__name__)
"""


def in_a_process(folder: Path, auto: str, words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PLAIN.format(words, auto), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_mgvq_it_says_so(given: tuple[Path, LlamaForCausalLM]) -> None:
    """And never fills in random weights."""
    done = in_a_process(given[0], AutoModelForCausalLM.__name__, "")
    assert done.returncode != 0
    assert "write 'import mgvq' before from_pretrained" in done.stderr
    done = in_a_process(given[0], AutoModelForCausalLM.__name__, "import mgvq")
    assert done.stdout == "LlamaForCausalLM\n", done.stderr


def test_exported_it_needs_no_mgvq(given: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    plain = export(given[0], tmp_path / "plain", "bf16").folder
    logits = tmp_path / "logits.pt"
    words = (
        f"import torch; model = AutoModelForCausalLM.from_pretrained({str(plain)!r}, dtype='auto')\n"
        f"torch.save(model(torch.arange(24)[None]).logits, {str(logits)!r}); assert 'mgvq' not in sys.modules"
    )
    done = in_a_process(plain, AutoModelForCausalLM.__name__, words)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        expected = mgvq.load(given[0], dtype=torch.bfloat16)(IDS).logits
    assert torch.equal(torch.load(logits), expected)


def test_the_command_asks_a_model_of_text(given: tuple[Path, LlamaForCausalLM], capsys, monkeypatch) -> None:
    model, processor = mgvq.load(given[0]), mgvq.load_processor(given[0])
    template = processor.chat_template
    turn = [{"role": "user", "content": "how many"}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) if template else "how many"
    inputs = processor(text, return_tensors="pt", add_special_tokens=not template)["input_ids"]
    tokens = model.generate(inputs, max_new_tokens=5, do_sample=False)[0, inputs.shape[1] :]
    monkeypatch.setattr("sys.argv", ["mgvq-ask", str(given[0]), "how many", "--max-new-tokens", "5"])
    asking.main()
    assert capsys.readouterr().out == processor.decode(tokens, skip_special_tokens=True).strip() + "\n"
    monkeypatch.setattr("sys.argv", ["mgvq-ask", str(given[0]), "a.png", "how many"])
    with pytest.raises(SystemExit, match="2"):
        asking.main()
    assert "this model takes no image" in capsys.readouterr().err


def test_importing_mgvq_imports_nothing_large() -> None:
    words = "import sys, mgvq; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'large'"
    subprocess.run([sys.executable, "-c", words], check=True)
