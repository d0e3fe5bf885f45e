"""Runs that several processes share: the bytes of one process, whatever of the work is dealt; and one end for all of them."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import FAMILIES, ROOT, run_command, sampled
from forks import shared_forks

# More images than a packed batch has, and more samples than one that is not: both processes have some of every kind.
FEW = ["scope=language", "evaluation.num_questions=4", "evaluation.answers=forced"]
FEW += ["calibration.num_images=66", "calibration.questions_per_image=1", "calibration.heldout_images=33"]
METHODS = {
    "mgvq2": ["method=mgvq2", "codebook.state_bits=8"],
    "mgvq": ["method=mgvq", "codebook.sample=64", "compensation.refresh=2"],
    "minibatches": ["method=mgvq", "codebook.sample=64", "compensation.refresh=2", "compensation.minibatches=2"],
    "streamed": ["method=mgvq2", "codebook.state_bits=8", "memory=streamed"],
    "all": ["method=mgvq2", "codebook.state_bits=8", "scope=all"],
    "yaqa": ["method=yaqa"],
    "power": ["method=yaqa", "curvature.granularity=token"],
    "shared": ["method=kmeans_ldlq", "codebook.sample=64", "codebook.share=kind"],
    "tuned": ["method=kmeans_ldlq", "codebook.sample=64", "tuning=block"],
    "streamed_gradients": ["method=mgvq", "codebook.sample=64", "memory=streamed", "compensation.sweeps=2"],
    "raced": ["method=mgvq", "codebook.sample=64", "calibration.heldout_images=130", "compensation.racing=0.3"],
}  # fmt: skip
CASES = [(family, method) for method in ("mgvq2", "mgvq") for family in FAMILIES]
CASES += [("tiny_internvl", method) for method in list(METHODS)[2:]]


def in_two(results: Path, *words: str, second: tuple[str, ...] = ()) -> list[tuple[int, str, str]]:
    """`mgvq-run` as torchrun starts two processes of it: their exit statuses and what they have said on both streams.

    `second`: words for the second process alone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "MGVQ_RESULTS": str(results)}
    started = [
        subprocess.Popen(
            [str(shared_forks().python), "-m", "mgvq.cli.run", *words, *(second if rank else ())],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **place, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    said = [process.communicate() for process in started]
    return [(process.returncode, out, _own(errors)) for process, (out, errors) in zip(started, said, strict=True)]


def _own(errors: str) -> str:
    """Without the bar of transformers, which reads that it is not wanted when it is imported: before a fork is told so."""
    return "\n".join(line for line in errors.splitlines() if line and not line.startswith("Loading weights"))


def checkpoint(results: Path) -> dict[str, str]:
    (done,) = results.glob("runs/*/DONE")
    tables = ("layers", "blocks", "allocation")
    digests = json.loads(done.read_text())
    return {name: d for name, d in digests.items() if name.startswith("checkpoint/") or name.split(".")[0] in tables}


@pytest.mark.parametrize(("family", "method"), sampled(CASES, 1))
def test_two_processes_write_the_checkpoint_of_one(family: str, method: str, tmp_path: Path) -> None:
    words = [f"model={family}", *FEW, *METHODS[method]]
    run_command("mgvq.cli.run", *words, results=tmp_path / "one")
    first, second = in_two(tmp_path / "two", *words)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert checkpoint(tmp_path / "two") == checkpoint(tmp_path / "one")
    assert (second[1], second[2]) == ("", ""), "the first alone reports"
    (told,) = (tmp_path / "two").glob("runs/*/provenance.json")
    assert json.loads(told.read_text())["processes"] == 2


def test_an_error_of_the_second_ends_both_and_is_told_by_the_first(tmp_path: Path) -> None:
    """The layers of the second do not fit into its budget, which it finds while the first waits for its share of them."""
    words = ("model=tiny_internvl", "scope=language", "method=rtn", "evaluation.num_questions=4")
    first, second = in_two(tmp_path, *words, second=("budget.bits_per_weight=0.5",))
    assert (first[0], second[0]) == (2, 2), first[2] + second[2]
    assert "mgvq-run: " in first[2]
    assert "process 1 of 2" in first[2]
    assert second[2] == ""
    (failed,) = tmp_path.glob("runs/*/FAILED")
    assert "process 1 of 2" in failed.read_text()
    assert not list(tmp_path.glob("runs/*/DONE"))
    first, second = in_two(tmp_path, *words)  # the same command goes on, and a finished run is not run again
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "done before" in in_two(tmp_path, *words)[0][1]


def test_a_launcher_of_hydra_is_refused_in_one_of_several_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run_command("mgvq.cli.run", "-m", "hydra/launcher=mgvq_joblib", "seed=0,1", results=tmp_path, check=False)
    assert done.returncode == 2
    assert "leave one of the two out" in done.stderr.lower()
