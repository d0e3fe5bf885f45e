"""Every method meets a budget of 2.0 bits on the shipped models, in stored bits of the layers in scope, without further settings.

Predicted from the layers' shapes alone; that the prediction equals the bytes on disk, every run asserts.
"""

import pytest
import torch
from conftest import ROOT, layer_problems
from hydra import compose, initialize_config_dir

from mgvq.formats.grouped import pack_groups
from mgvq.model.sites import list_sites
from mgvq.quantization.codebooks import CodebookCache, rate_table
from mgvq.quantization.table_groups import cut_table_groups
from mgvq.runs.method import build_method
from mgvq.runs.places import conf_folder

METHODS = sorted({f.stem for f in (ROOT / "conf" / "method").glob("*.yaml")} - {"full_precision"})
BUDGET, OVER = 2.0, 0.01  # at most one percent above


def stored_bits(method, sites, budget_bits):
    """Of the allocation's choice, for scores out of the hat."""
    draws = torch.Generator().manual_seed(0)
    scores = {s: torch.randn(s.in_features, generator=draws).exp() for s in sites}
    groups = method.grouping(scores, {})
    ids = {s.reads: 8 * pack_groups(g).nbytes for s, g in groups.items() if g.max() > 0}
    problems = layer_problems(sites, scores=scores, groups=groups)
    table_groups = cut_table_groups(problems, method.codebook)
    table = rate_table(CodebookCache(table_groups, method.codebook, problems), method.allocation.distortion)
    chosen = method.allocation(table, budget_bits - sum(ids.values()))
    return sum(ids.values()) + int(table.bits[torch.arange(len(table_groups)), chosen].sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["all", "language"])
def test_two_bits_are_at_most_one_percent_more(loaded, method, scope):
    sites = list_sites(loaded.model, scope)
    num_weights = sum(s.num_weights for s in sites)
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        built = build_method(compose("config", [f"method={method}", f"scope={scope}"]))
    bits = stored_bits(built, sites, int(BUDGET * num_weights)) / num_weights
    assert 0.98 * BUDGET <= bits <= (1 + OVER) * BUDGET
