"""Runs are named by what moves their numbers, and by nothing else."""

import hashlib
import shutil
from pathlib import Path

import pytest
import yaml
from composed import CONF, ROOT, VARIANTS, composed, identity
from omegaconf import OmegaConf

from mgvq.model.source import folder_digest
from mgvq.runs.device import device_type
from mgvq.runs.identity import run_id, run_ids, scientific_settings


@pytest.mark.parametrize("method", ["rtn", "kmeans", "mgvq", "mgvq2"])
def test_the_names_at_several_seeds_are_those_at_each(method: str) -> None:
    """Those behind the second are not worked out; where a setting knows more of the seed than its number, they are."""
    seeds = [3, 0, 7, 10**9]
    cfg = composed(f"method={method}")
    assert run_ids(cfg, seeds) == [run_id(composed(f"method={method}", f"seed={seed}")) for seed in seeds]
    OmegaConf.update(cfg, "evaluation.num_questions", "1${seed}")
    worked_out = []
    for seed in seeds:
        cfg.seed = seed
        worked_out.append(run_id(cfg))
    assert run_ids(cfg, seeds) == worked_out


def test_code_may_move_without_another_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant counts by its name: the path of its class only where it is set in another way."""
    before = identity("method=kmeans")
    moved = "mgvq.codebook.moved.KMeans"
    inline = identity("method=kmeans", f"codebook._target_={moved}")
    assert inline != before
    yamls = {name: target.replace("kmeans.KMeans", "moved.KMeans") for name, target in own_targets().items()}
    monkeypatch.setattr("mgvq.runs.compose._own_target", lambda group, choice: yamls.get((group, choice)))
    assert identity("method=kmeans", f"codebook._target_={moved}") == before


def own_targets() -> dict[tuple[str, str], str]:
    """What every variant builds, by group and name."""
    found = {(g, v): yaml.safe_load((CONF / g / f"{v}.yaml").read_text()).get("_target_") for g, v in VARIANTS}
    return {key: target for key, target in found.items() if target}


def test_identity_is_rebuilt_from_the_config_of_a_run(tmp_path: Path) -> None:
    """From `config.yaml` alone, whatever today's yamls say."""
    cfg = composed("method=mgvq", "model=tiny_llava_onevision", "allocation=uniform")
    kept = tmp_path / "config.yaml"
    OmegaConf.save(cfg, kept, resolve=True)
    assert scientific_settings(OmegaConf.load(kept)) == scientific_settings(cfg)  # type: ignore[arg-type]


def test_what_does_nothing_or_came_later_does_not_count() -> None:
    settings = scientific_settings(composed("method=kmeans"))
    assert set(settings) == {
        "model", "allocation", "codebook", "evaluation", "budget", "scope", "threads", "device", "tf32", "numerics"
    }  # fmt: skip
    assert "_declares_" not in str(settings)
    later = "++codebook._declares_.identity.table.neutral=fp16"
    assert identity("method=kmeans", later) != identity("method=kmeans")
    assert identity("method=kmeans", later, "codebook.table=int8") == identity("method=kmeans", "codebook.table=int8")


def test_a_variant_whose_code_has_moved_numbers_names_its_own_runs_anew() -> None:
    moved = "++codebook._declares_.numerics=1"
    assert identity("method=kmeans", moved) != identity("method=kmeans")
    assert identity("method=kmeans", moved) != identity("method=kmeans", "++codebook._declares_.numerics=2")
    assert scientific_settings(composed("method=mgvq"))["refit"]["numerics"] == 2.0


def test_settings_outside_of_the_groups_that_came_later_count_off_their_neutral_values() -> None:
    for name, neutral, other in (("outliers", 0, 4), ("embedding_bits", "null", 8)):
        for method in ("kmeans", "mgvq"):
            assert identity(f"method={method}", f"{name}={neutral}") == identity(f"method={method}")
            assert identity(f"method={method}", f"{name}={other}") != identity(f"method={method}")
    assert identity("method=full_precision", "embedding_bits=4") != identity("method=full_precision")


@pytest.mark.parametrize("words", ["curvature.clip=4.0", "calibration.gram_samples=200"])
@pytest.mark.parametrize("method", ["kmeans_ldlq", "mgvq"])
def test_clipping_and_further_samples_count_off_null(method: str, words: str) -> None:
    settings = scientific_settings(composed(f"method={method}"))
    group, _, name = words.partition("=")[0].partition(".")
    assert name not in settings[group]
    assert scientific_settings(composed(f"method={method}", words))[group][name]


def test_the_kind_of_device_and_its_arithmetic_count(monkeypatch: pytest.MonkeyPatch) -> None:
    here = identity("method=kmeans")
    for there, other in ((True, "device=cpu"), (False, "device=cuda")):
        monkeypatch.setattr("mgvq.runs.device._has_cuda", lambda there=there: there)
        chosen = identity("method=kmeans")
        assert chosen == identity("method=kmeans", f"device={'cuda' if there else 'cpu'}")
        assert chosen != identity("method=kmeans", other)
    assert here in (chosen, identity("method=kmeans", "device=cuda"))
    assert identity("method=kmeans", "device=cuda") == identity("method=kmeans", "device=cuda:1")
    assert identity("method=kmeans", "device=cuda") != identity("method=kmeans", "device=cuda", "tf32=true")


def test_what_auto_means_is_what_torch_would_say() -> None:
    import torch

    assert device_type("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_model_folder_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    read: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr("mgvq.digest.hashlib.file_digest", lambda stream, name: read.append(stream.name) or digest(stream, name))
    first = folder_digest(tmp_path)
    assert folder_digest(tmp_path) == first
    assert len(read) == 2
    (tmp_path / "model.safetensors").write_bytes(b"others!")  # as long as before
    assert folder_digest(tmp_path) != first
    assert len(read) == 3


def test_identity_follows_what_moves_numbers() -> None:
    base = identity("method=kmeans")
    assert base == identity("method=kmeans", "budget.bits_per_weight=2")
    assert base == identity("method=kmeans", "tracker=csv", "paths.results=/elsewhere")
    changed = ["seed=1", "evaluation.seed=1", "budget.bits_per_weight=3", "scope=language", "model=tiny_llava_onevision",
               "codebook.vector_length=4", "evaluation.answers=forced", "model.dtype=bfloat16", "numerics=9",
               "threads=2", "model.stress.sigma=0.7", "model.stress.sigma=0.8", "model.attention=eager",
               "+model.processor.do_resize=false"]  # fmt: skip
    assert len({base, *(identity("method=kmeans", c) for c in changed)}) == len(changed) + 1


def test_edited_calibration_data_is_another_run(tmp_path: Path) -> None:
    rows, image = tmp_path / "rows.jsonl", tmp_path / "a.png"
    rows.write_text('{"image": "a.png", "question": "q", "answer": "a"}\n')
    ids = []
    for content in (b"one", b"two"):
        image.write_bytes(content)
        data = ("calibration=image_text", f"calibration.path={rows}", "curvature=input", "codebook.weight_power=0.5")
        ids.append(identity(*data))
    assert ids[0] != ids[1]


def test_the_images_of_a_conversation_and_the_files_of_a_folder_count_and_where_published_images_lie_does_not(
    tmp_path: Path,
) -> None:
    needs = ("curvature=input", "codebook.weight_power=0.5")
    data = shutil.copytree(ROOT / "tests/data/calibration", tmp_path / "data")
    chat = (*needs, "calibration=chat", f"calibration.path={data}/chat.jsonl")
    hub = (*needs, "calibration=hub", f"calibration.path={data}/hub", "calibration.columns.answer=label")
    captions = (*needs, "calibration=sharegpt4v", f"calibration.path={data}/sharegpt4v.json", "calibration.images=/anywhere")
    before = [identity(*settings) for settings in (chat, hub, captions)]
    assert identity(*captions[:-1], "calibration.images=/elsewhere") == before[2]
    for number in (1, 4):  # named by a part of a message, and by the row
        (data / f"coco/train2017/{number:012d}.jpg").write_bytes(b"another")
        assert identity(*chat) not in before
        before.append(identity(*chat))
    (data / "hub/0.jpg").write_bytes(b"another")
    assert identity(*hub) not in before
    assert identity(*hub[:-2], "calibration.path=org/name", hub[-1]) != identity(*hub[:-2], "calibration.path=org/other", hub[-1])
    assert identity(*captions) == before[2]


def test_a_suite_is_named_by_the_tasks_that_it_asks(tmp_path: Path) -> None:
    two = ("evaluation=suite", "evaluation.tasks=[mmstar,ocrbench]")
    assert identity(*two) == identity(*two, "evaluation.max_new_tokens.mmmu_val=7")
    changed = ["evaluation.tasks=[mmstar]", "evaluation.max_new_tokens.mmstar=7", "evaluation.limit=9", "evaluation.batch_size=1"]
    assert len({identity(*two), *(identity(*two, c) for c in changed)}) == len(changed) + 1
    ids = []
    for place, content in (("a", b"rows"), ("b", b"rows"), ("c", b"more rows")):
        file = tmp_path / place / "Lin-Chen/MMStar/val.parquet"
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        ids.append(identity(*two, f"evaluation.data={tmp_path / place}"))
    assert ids[0] == ids[1] != ids[2]


def test_without_a_codebook_every_scope_is_one_run() -> None:
    assert identity("method=full_precision", "scope=all") == identity("method=full_precision", "scope=language")


@pytest.mark.parametrize("method", ["rtn", "full_precision"])
def test_where_nothing_is_random_all_seeds_are_one_run(method: str) -> None:
    assert identity(f"method={method}", "seed=0") == identity(f"method={method}", "seed=5")


def test_other_weights_in_the_same_folder_are_another_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"first")
    first = identity("model=local", f"model.path={tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"second")
    assert identity("model=local", f"model.path={tmp_path}") != first
