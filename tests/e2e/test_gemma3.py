"""The second real language model, where the package that ships it is installed: begun as it was trained, it predicts text."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mgvq.evaluation.perplexity import Perplexity
from mgvq.model.load import load
from mgvq.model.sites import list_sites
from mgvq.runs.build import build
from mgvq.runs.compose import composer

with composer() as compose:
    FILE = Path(build(compose("model=gemma3_270m"), "model").path)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FILE.is_file() or find_spec("gguf") is None, reason="Gemma 3 270M is not installed; `make gemma3` does it"
    ),
]


def test_it_is_the_model_that_was_published(tmp_path: Path) -> None:
    """Its size, its begin-of-text token, and a perplexity that it has with that token alone (170 without)."""
    with composer() as compose:
        loaded = load(build(compose("model=gemma3_270m", f"paths.results={tmp_path}"), "model"), torch.device("cpu"))
    model, tokenizer = loaded.model, loaded.processor
    assert loaded.stored_dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == 268_098_176
    assert len(list_sites(model, "all")) == 126
    assert tokenizer("A text").input_ids[0] == tokenizer.bos_token_id == 2
    found = Perplexity(num_passages=3, seed=0)(model, None, tokenizer, "").metrics["text/perplexity"]
    assert 10 < found < 40
