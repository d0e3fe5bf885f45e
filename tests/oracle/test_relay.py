"""Gradients that are relayed from block to block against one pass through the whole model: the same bits."""

import errno
import logging
from dataclasses import replace

import pytest
import torch

from mgvq import progress
from mgvq.calibration.tiny_vqa import TinyVQA
from mgvq.curvature.block_statistics import _rows, collect_by_block
from mgvq.curvature.statistics import collect
from mgvq.errors import SharedFault
from mgvq.model.blocks import by_block
from mgvq.model.load import load
from mgvq.model.relay import relays
from mgvq.model.sites import list_sites
from mgvq.model.source import SHIPPED, Source
from mgvq.model.walk import BlockWalk
from mgvq.model.weights import InModel
from mgvq.quantization.subject import Samples, Subject
from mgvq.quantization.teacher import Teacher
from mgvq.runs.cache import statistics_by_block
from mgvq.types import Kronecker, Needs

EVERYTHING = Needs(gram=True, fisher=True, saliency=True, gradient=True, channel_groups=2, sequences=True)
SAMPLED = Needs(gram=True, fisher=True)


def loaded(family: str, *, streamed: bool):
    source = Source(name=family, path=str(SHIPPED / family), revision=None, dtype="float32")
    return load(source, torch.device("cpu"), streamed=streamed)


def batches(model):
    """Two of the gradients, and one that the Gram alone sees."""
    drawn = TinyVQA(num_images=6, questions_per_image=2, heldout_images=0, shown="both", seed=0, label_seed=0).draw()
    every = list(replace(drawn, batch_size=4).batches(model.processor))
    return every[:2], every[2:]


def tensors(stats) -> dict[str, torch.Tensor]:
    """All tensors of a layer's statistics, by name."""
    parts = {**{f"gram {m}": t for m, t in stats.gram.items()}, **{f"fisher {m}": t for m, t in stats.fisher.items()}}
    parts |= {name: getattr(stats, name) for name in ("gradient", "channel_gram")}
    for name in ("sequence", "token"):
        if isinstance(product := getattr(stats, name), Kronecker):
            parts |= {f"{name} in": product.h_in, f"{name} out": product.h_out}
    return {name: tensor for name, tensor in parts.items() if tensor is not None}


@pytest.fixture(scope="module", params=["tiny_internvl", "tiny_smolvlm"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[EVERYTHING, SAMPLED], ids=["everything", "sampled"])
def expected(request: pytest.FixtureRequest, family: str):
    model, needs = loaded(family, streamed=False), request.param
    return needs, collect(model.model, list_sites(model.model, "all"), batches(model)[0], needs, 0, batches(model)[1])


@pytest.mark.parametrize("streamed", [True, False])
def test_relayed_statistics_have_the_bits_of_one_pass(family: str, expected, streamed: bool, tmp_path) -> None:
    needs, bank = expected
    model = loaded(family, streamed=streamed)
    sites, (first, further) = list_sites(model.model, "all"), batches(model)
    weights = model.weights if streamed else InModel(model.model)
    found = {}
    for _, part in collect_by_block(model.model, weights, sites, first, needs, 0, further, lambda _: False, tmp_path):
        found |= part
    assert set(found) == set(sites)
    for site in sites:
        one, other = tensors(bank[site]), tensors(found[site])
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), site.name
        assert (bank[site].num_tokens, bank[site].num_answers) == (found[site].num_tokens, found[site].num_answers)
        assert bank[site].saliency == found[site].saliency
    assert not list(tmp_path.iterdir()), "what was put aside is gone"


def test_it_says_how_far_it_is(family: str, monkeypatch: pytest.MonkeyPatch, caplog, tmp_path) -> None:
    """Of one row of blocks too, which takes half an hour where the model is large."""
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False)
    caplog.set_level(logging.INFO)
    model = loaded(family, streamed=True)
    sites, needs = list_sites(model.model, "language"), SAMPLED
    for _ in collect_by_block(model.model, model.weights, sites, batches(model)[0], needs, 0, [], lambda _: False, tmp_path):
        pass
    told = [found for message in caplog.messages if (found := progress.last_told(message))]
    assert list(dict.fromkeys(one.what for one in told)) == ["blocks of activations", "batches of losses", "blocks of gradients"]


def test_blocks_that_are_finished_are_left_out_and_move_nothing(family: str, expected, tmp_path) -> None:
    needs, bank = expected
    model = loaded(family, streamed=True)
    sites, (first, further) = list_sites(model.model, "all"), batches(model)
    blocks = list(by_block(sites))
    missing = {blocks[1][0], blocks[-2][0]}  # one inside of each tower; those behind them are done
    (tmp_path / "activations-0").mkdir()
    (tmp_path / "activations-0" / "of a run that was killed").touch()
    found = {}
    done = lambda block: block[0] not in missing  # noqa: E731
    for _, part in collect_by_block(model.model, model.weights, sites, first, needs, 0, further, done, tmp_path):
        found |= part
    assert set(found) == {site for block in blocks if block[0] in missing for site in block}
    assert all(torch.equal(t, tensors(bank[site])[name]) for site in found for name, t in tensors(found[site]).items())


def test_rows_that_are_no_chain_are_not_relayed(family: str) -> None:
    model = loaded(family, streamed=False)
    sites = list_sites(model.model, "all")
    walk = BlockWalk(model.model, sites, [batch.to(model.model.device) for batch in batches(model)[0]])
    row = [block for block in by_block(sites) if block[0].tower == "language"]
    vision = [block for block in by_block(sites) if block[0].tower == "vision"]
    assert relays(walk, row)
    assert not relays(walk, row[:1]), "one block has nothing to relay"
    assert not relays(walk, [row[0], *row[2:]]), "a block in between would be passed over"
    assert not relays(walk, [vision[0], row[1]]), "they are not of one tower"


def test_what_several_passes_give_is_not_relayed(family: str) -> None:
    model = loaded(family, streamed=False)
    sites = list_sites(model.model, "language")
    walk = BlockWalk(model.model, sites, [batch.to(model.model.device) for batch in batches(model)[0]])
    blocks = list(by_block(sites))
    assert _rows(walk, sites, EVERYTHING) == [blocks]
    assert _rows(walk, sites, replace(EVERYTHING, power_rounds=1)) == [[block] for block in blocks]


@pytest.mark.parametrize(("source", "minibatches"), [("kl", 1), ("sft", 1), ("kl", 2)])
def test_relayed_gradients_of_weights_have_the_bits_of_one_pass(
    family: str, source: str, minibatches: int, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    """At every block, with those before it changed and settled, three blocks at a time: across towers too."""
    model = loaded(family, streamed=False)
    sites, (gradient, heldout) = list_sites(model.model, "all"), batches(model)
    blocks = list(by_block(sites))
    aside = Samples(gradient, heldout, tmp_path / "aside")
    relayed = Teacher(Subject(model.model, sites, aside), source, minibatches=minibatches, relayed=True)
    plain = Teacher(Subject(model.model, sites, Samples(gradient, heldout)), source, minibatches=minibatches)
    left = tmp_path / "aside" / "activations-1"  # of a run of two processes that was killed
    left.mkdir(parents=True)
    in_one_pass = []

    def pass_of_all(sites, turn, _ends):
        in_one_pass.append(sites[0].tower)
        return plain.gradient(sites, turn)

    monkeypatch.setattr(relayed, "gradient", pass_of_all)
    model.model.get_parameter(f"{blocks[-1][0].name}.weight").data.mul_(1.1)  # else the model is its own teacher
    for number, block in enumerate(blocks):
        together = blocks[number : number + 3]
        expected = plain.gradient([site for block in together for site in block], number)
        found = list(relayed.gradients(together, number))
        assert [block for block, _ in found] == together[::-1]
        for _, own in found:
            assert all(torch.equal(gradient, expected[site]) for site, gradient in own.items())
        assert any(gradient.any() for gradient in expected.values())
        for site in block:
            model.model.get_parameter(f"{site.name}.weight").data.mul_(1.01)
        relayed.settle(block)
        assert relayed.heldout_loss().mean == plain.heldout_loss().mean
    # The last two vision blocks and the projector, with which others follow; and the last block, behind which there is none.
    assert in_one_pass == ["vision"] * 2 + ["projector"] * in_one_pass.count("projector") + ["language"]
    assert not list((tmp_path / "aside").iterdir()), "what was put aside is gone"


def test_a_disk_that_is_full_of_activations_is_told(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    model = loaded(family, streamed=True)
    sites, (first, _) = list_sites(model.model, "language"), batches(model)

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mgvq.model.relay.save_file", full)

    def collected(is_finished, scratch):
        return collect_by_block(model.model, model.weights, sites, first, SAMPLED, 0, [], is_finished, scratch)

    with pytest.raises(SharedFault, match="cannot be written"):
        statistics_by_block(tmp_path, {"key": 1}, collected, sites)
