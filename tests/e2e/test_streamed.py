"""`memory=streamed`: one block in memory at a time, and the bytes of a run with the whole model in memory."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_runs import files, numbers
from conftest import FAMILIES, ROOT, run_command, sampled
from forks import shared_forks
from torch import Tensor, nn

from mgvq.model.load import load
from mgvq.model.sites import linear, list_sites, site_weights
from mgvq.model.source import SHIPPED, Source

FEW = ["scope=language", "evaluation.num_questions=4", "evaluation.answers=forced"]
FEW += ["calibration.num_images=2", "calibration.heldout_images=2"]
METHODS = {
    "mgvq2": ["method=mgvq2", "codebook.state_bits=8"],
    # All statistics there are: Grams, Fishers, gradients of right answers; and the second sweep's gradients.
    "mgvq": ["method=mgvq", "compensation.refresh=3", "codebook.sample=64", "curvature.fusion=mbq_ratio"],
    "gradients": ["method=mgvq", "compensation.sweeps=1", "compensation.source=block", "compensation.refresh=true",
                  "codebook.sample=64", "outliers=2"],
    "yaqa": ["method=yaqa"],
    "vlmq": ["method=vlmq"],
    "qtip": ["method=qtip", "codebook.state_bits=8"],
    "rtn": ["method=rtn"],
}  # fmt: skip
CASES = [(family, method) for method in ("mgvq2", "mgvq") for family in FAMILIES]
CASES += [("tiny_internvl", method) for method in list(METHODS)[2:]]


@pytest.mark.parametrize(("family", "method"), sampled(CASES, 2))
def test_a_streamed_run_has_the_files_of_a_resident_one(family: str, method: str, tmp_path: Path) -> None:
    few = [word for word in FEW if method != "rtn" or "calibration" not in word]
    folders = {}
    for memory in ("resident", "streamed"):
        arguments = [f"model={family}", f"memory={memory}", *few, *METHODS[method]]
        run_command("mgvq.cli.run", *arguments, results=tmp_path / memory)
        (done,) = (tmp_path / memory).glob("runs/*/DONE")
        folders[memory] = done.parent
    assert folders["resident"].name == folders["streamed"].name, "the mode does not count for a run's name"
    assert files(folders["streamed"]) == files(folders["resident"])
    assert numbers(folders["streamed"]) == numbers(folders["resident"])


def test_a_stopped_collection_goes_on_and_a_damaged_block_is_collected_again(tmp_path: Path) -> None:
    arguments = ["model=tiny_internvl", "memory=streamed", *FEW, "method=gptq"]
    run_command("mgvq.cli.run", *arguments, results=tmp_path)
    (done,) = tmp_path.glob("runs/*/DONE")
    first = files(done.parent)
    blocks = sorted(tmp_path.glob("cache/statistics/*/block-*.safetensors"))
    wanted = {file: file.read_bytes() for file in blocks}
    blocks[0].write_bytes(b"damaged")
    blocks[-1].unlink()
    kept = blocks[1].stat().st_mtime_ns
    shutil.rmtree(done.parent)
    run_command("mgvq.cli.run", *arguments, results=tmp_path)
    assert {file: file.read_bytes() for file in blocks} == wanted
    assert blocks[1].stat().st_mtime_ns == kept, "what is finished is not written again"
    assert files(done.parent) == first


def test_a_run_that_is_killed_in_the_statistics_and_in_the_rounding_ends_with_the_same_bytes(tmp_path: Path) -> None:
    arguments = ["model=tiny_internvl", "memory=streamed", *FEW, *METHODS["mgvq2"]]
    run_command("mgvq.cli.run", *arguments, results=tmp_path / "undisturbed")
    (undisturbed,) = (tmp_path / "undisturbed").glob("runs/*/DONE")
    disturbed = tmp_path / "disturbed"
    for finished in ("cache/statistics/*/block-0001.safetensors", "partial/*/block-0001.entry"):
        process = subprocess.Popen(
            [str(shared_forks().python), "-m", "mgvq.cli.run", *arguments],
            cwd=ROOT,
            env={**os.environ, "MGVQ_RESULTS": str(disturbed)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not list(disturbed.glob(finished)):
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the kill came before the end"
        assert not list(disturbed.glob("runs/*/DONE"))
    done = run_command("mgvq.cli.run", *arguments, results=disturbed)
    assert "going on behind" in done.stderr
    assert files(disturbed / "runs" / undisturbed.parent.name) == files(undisturbed.parent)


def test_tuning_is_refused_before_any_work(tmp_path: Path) -> None:
    arguments = ["model=tiny_internvl", "memory=streamed", "method=kmeans", "calibration=tiny_vqa", "tuning=tables"]
    done = run_command("mgvq.cli.run", *arguments, results=tmp_path, check=False)
    assert done.returncode == 2
    assert "memory=streamed has one block in memory" in done.stderr
    assert "tuning=none" in done.stderr


@pytest.fixture(scope="module")
def streamed():
    source = Source(name="tiny", path=str(SHIPPED / "tiny_internvl"), revision=None, dtype="float32")
    return load(source, torch.device("cpu"), streamed=True)


def test_a_weight_outside_of_its_block_raises_instead_of_computing(streamed) -> None:
    site = list_sites(streamed.model, "language")[0]
    with streamed.streamed.unchanged([site]):  # nothing is read for that
        weight, layer = site_weights(streamed.model, [site])[site], linear(streamed.model, site)
        inputs = torch.ones(2, site.in_features)
        for use in (lambda: layer(inputs), lambda: inputs @ weight.T, weight.clone, weight.float, lambda: weight[0]):
            with pytest.raises(RuntimeError, match="not in memory"):
                use()
        assert weight.shape == (site.out_features, site.in_features)


def test_a_layer_outside_of_the_blocks_has_its_full_precision_behind_its_rounding(streamed) -> None:
    """It stays in memory, where rounding overwrites it; whoever asks for its weights later, a resumed run say, gets the same."""
    site = next(site for site in list_sites(streamed.model, "all") if site.block is None)
    originals, layer = streamed.streamed.originals([site]), linear(streamed.model, site)
    before = layer.weight.detach().clone()
    with streamed.streamed.unchanged([site]):
        layer.weight.data.zero_()
        assert torch.equal(originals[site], before)
    assert torch.equal(layer.weight, before)


def test_no_more_than_two_blocks_are_in_memory(streamed) -> None:
    model, most = streamed.model, 0
    blocks: dict[str, nn.Module] = {name: model.get_submodule(name) for name in streamed.streamed.blocks}

    def count(*_: Any) -> None:
        nonlocal most
        here = {name for name, block in blocks.items() if not any(p.is_meta for p in block.parameters())}
        most = max(most, len(here))

    handles = [linear(model, site).register_forward_pre_hook(count) for site in list_sites(model, "all")]
    try:
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    finally:
        for handle in handles:
            handle.remove()
    assert most == 2
    assert len(blocks) > 4


def test_what_is_written_into_a_block_is_not_what_the_file_says_later(streamed) -> None:
    site = list_sites(streamed.model, "language")[0]
    before: Tensor = streamed.streamed.originals([site])[site]
    streamed.model(input_ids=torch.ones(1, 3, dtype=torch.long))
    with streamed.streamed.resident(streamed.streamed.block_of(site.name)):
        linear(streamed.model, site).weight.data.zero_()
        assert torch.equal(streamed.streamed.originals([site])[site], before)
        assert before.any()
