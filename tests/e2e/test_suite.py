"""evaluation=suite on small copies of the benchmarks: known answers give known figures, and what is missing is named at once."""

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import declare_done, run_command
from hub_copies import ROWS, rows, write
from hydra import compose, initialize_config_dir
from lmms_eval.tasks.mmmu.utils import parse_multi_choice_response
from lmms_eval.tasks.ocrbench import utils as ocrbench
from lmms_eval.utils import load_yaml_config
from omegaconf import OmegaConf
from PIL.Image import Image
from transformers import LlamaConfig, LlamaForCausalLM

from mgvq.analysis.records.collect import collect
from mgvq.data.benchmarks import BENCHMARKS
from mgvq.errors import UserError
from mgvq.evaluation.suite import Suite
from mgvq.evaluation.tasks import benchmark
from mgvq.evaluation.tasks.judges import JUDGES
from mgvq.model.encode import chat_prompt
from mgvq.model.generate import Reply, generate
from mgvq.runs.execute import execute
from mgvq.runs.places import conf_folder
from mgvq.runs.store import RunFolder
from mgvq.studies.plan import build_components, expand
from mgvq.studies.spec import read_study
from mgvq.types import EvalResult

TASKS = list(BENCHMARKS)
CHOICES = ["mmmu_val", "seedbench", "scienceqa_img", "mmbench_en_dev_static", "mmstar"]
GARBAGE = "@@ 12 @@"
LLAVA = pytest.mark.parametrize("family", ["tiny_llava_onevision"], indirect=True)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hub"))


def suite(data: Path | None, *tasks: str, **settings: Any) -> Suite:
    common = {"max_new_tokens": dict.fromkeys(TASKS, 8), "limit": None, "seed": 0, "batch_size": 4}
    return Suite(tasks=list(tasks), data=None if data is None else str(data), **{**common, **settings})


@pytest.fixture
def answered(copies: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EvalResult]:
    """The result of one task where the model's answers are given, in the order of the rows."""
    nobody = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )

    def replies(answers: Sequence[str | Reply], number: int) -> list[Reply]:
        return [answer if isinstance(answer, Reply) else Reply(answer) for answer in answers[:number]]

    def run(task: str, answers: Sequence[str | Reply], **settings: Any) -> EvalResult:
        monkeypatch.setattr("mgvq.evaluation.harness.generate", lambda _, __, asked, *___: replies(answers, len(asked)))
        return suite(copies, task, **settings)(nobody, None, None, "always the same label")

    return run


def asked_rows(task: str) -> list[dict[str, Any]]:
    return [row for row in rows(task) if row.get("data_type") != "video"]


def options(task: str, row: dict[str, Any]) -> list[str]:
    """The letters, told from the rows themselves."""
    if task == "mmmu_val":
        return list("ABCD") if row["question_type"] == "multiple-choice" else []
    if task == "scienceqa_img":
        return list("ABCD"[: len(row["choices"])])
    if task == "mmbench_en_dev_static":
        return [letter for letter in "ABCD" if row[letter] != "nan"]
    return list("ABCD") if task in CHOICES else []


def right(task: str, row: dict[str, Any]) -> str:
    if task == "ocrbench":
        return f"It says {row['answer'][1]}."
    if task in ("vizwiz_vqa_val", "textvqa_val"):
        return max(row["answers"], key=row["answers"].count)
    return "ABCD"[row["answer"]] if task == "scienceqa_img" else row["answer"]


def wrong(task: str, row: dict[str, Any]) -> str:
    letters = options(task, row)
    return letters[letters.index(right(task, row)) - 1] if letters else "nobody knows"


@pytest.mark.parametrize("task", TASKS)
def test_a_question_that_cannot_be_asked_costs_itself_alone(answered, task: str) -> None:
    sound = [right(task, row) for row in asked_rows(task)]
    result = answered(task, [sound[0], Reply("", refused="its image is 900 x 3"), *sound[2:]])
    assert result.metrics[f"{task}/accuracy"] == pytest.approx(1 - 1 / len(sound))
    assert result.flags == (f"unanswered:{task}:1",)


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_of_numbers_that_are_none_leaves_no_metric(answered, task: str) -> None:
    sound = [right(task, row) for row in asked_rows(task)]
    result = answered(task, [sound[0], Reply("", finite=False), *sound[2:]])
    left = {name for name, value in result.metrics.items() if math.isfinite(value)}
    assert left <= {f"{task}/chance", *(f"{task}/accuracy/{kind}" for kind in result.samples.type)}
    assert {f"non_finite:{task}/accuracy:1", f"non_finite:{task}/raw:1", "non_finite:suite/accuracy:1"} <= set(result.flags)
    assert result.samples.score.isna().sum() == 1


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_get_everything(answered, task: str) -> None:
    result = answered(task, [right(task, row) for row in asked_rows(task)])
    figures = {name.removeprefix(f"{task}/"): value for name, value in result.metrics.items()}
    assert figures["raw"] == figures["accuracy"] == figures["suite/accuracy"] == pytest.approx(1)
    assert figures["unparsed"] == 0
    assert ("corrected" in figures) == ("chance" in figures) == (task in CHOICES)
    assert figures.get("corrected", 1) == pytest.approx(1)
    assert len(result.samples) == len(asked_rows(task))


# Of k options a wrong one costs 1/(k - 1): four of them in every row, but for an open question of MMMU's and the rows of two.
COSTS = {"mmmu_val": 5 / 18, "seedbench": 1 / 3, "scienceqa_img": 2 / 3, "mmbench_en_dev_static": 5 / 9, "mmstar": 1 / 3}
CHANCE = {"mmmu_val": 5 / 24, "seedbench": 1 / 4, "scienceqa_img": 3 / 8, "mmbench_en_dev_static": 1 / 3, "mmstar": 1 / 4}


@pytest.mark.parametrize("task", TASKS)
def test_wrong_answers_get_nothing_and_wrong_choices_less(answered, task: str) -> None:
    figures = answered(task, [wrong(task, row) for row in asked_rows(task)]).metrics
    assert figures[f"{task}/raw"] == figures[f"{task}/accuracy"] == figures[f"{task}/unparsed"] == 0
    if task in CHOICES:
        assert figures[f"{task}/corrected"] == pytest.approx(-COSTS[task])
        assert figures[f"{task}/chance"] == pytest.approx(CHANCE[task])


@pytest.mark.parametrize("task", TASKS)
def test_garbage_is_told_and_gets_nothing(answered, task: str) -> None:
    figures = answered(task, [GARBAGE if options(task, row) else "" for row in asked_rows(task)]).metrics
    assert figures[f"{task}/accuracy"] == figures.get(f"{task}/corrected", 0) == 0
    assert figures[f"{task}/unparsed"] == 1


@pytest.mark.parametrize("task", ["seedbench", "mmstar"])
def test_blind_choices_come_to_chance_and_corrected_to_nothing(answered, task: str) -> None:
    runs = [answered(task, [letter] * ROWS).metrics for letter in "ABCD"]
    assert sum(m[f"{task}/accuracy"] for m in runs) / 4 == pytest.approx(runs[0][f"{task}/chance"])
    assert sum(m[f"{task}/corrected"] for m in runs) == pytest.approx(0)


def test_mmmu_draws_where_it_reads_nothing_and_we_do_not() -> None:
    doc = rows("mmmu_val")[0]
    texts = {"A": "red", "B": "blue", "C": "green", "D": "some other colour"}
    assert {parse_multi_choice_response(GARBAGE, list(texts), texts) for _ in range(200)} == set(texts)
    judge = JUDGES["mmmu_val"]
    assert [judge.chosen(doc, GARBAGE) for _ in range(20)] == [None] * 20
    for answer in ("B", "(B)", "B.", "The answer is B", "As far as I can see it is blue", "it is A or rather B"):
        assert judge.chosen(doc, answer) == "B"


def test_the_first_letter_of_any_word_is_no_answer(answered) -> None:
    figures = answered("seedbench", ["cat"] * ROWS).metrics
    assert figures["seedbench/raw"] == pytest.approx(1 / 5)  # lmms-eval reads a C, which one of the five has
    assert figures["seedbench/accuracy"] == 0
    assert figures["seedbench/unparsed"] == 1
    figures = answered("mmstar", ["Dogs"] * ROWS).metrics
    assert figures["mmstar/raw"] == pytest.approx(1 / 6)  # half of one of three kinds of questions
    assert figures["mmstar/unparsed"] == 1


@pytest.mark.parametrize(
    ("task", "answer", "letter"),
    [("scienceqa_img", "B. a ring", "B"), ("scienceqa_img", "b", "B"), ("scienceqa_img", "a ring", None),
     ("mmbench_en_dev_static", "there is a ring in it", "B"), ("mmbench_en_dev_static", "E", None),
     ("seedbench", "c", "C"), ("seedbench", "(C)", None), ("mmstar", "The answer is (C).", "C"), ("mmstar", "", None)],
)  # fmt: skip
def test_answers_are_read_as_the_task_reads_them(task: str, answer: str, letter: str | None) -> None:
    assert JUDGES[task].chosen(rows(task)[0], answer) == letter


def test_mmbench_counts_a_question_that_is_right_in_every_order(answered) -> None:
    asked = asked_rows("mmbench_en_dev_static")
    answers = [right("mmbench_en_dev_static", row) if n in (0, 1, 2) else GARBAGE for n, row in enumerate(asked)]
    figures = answered("mmbench_en_dev_static", answers).metrics
    assert figures["mmbench_en_dev_static/raw"] == pytest.approx(1 / 3)
    assert figures["mmbench_en_dev_static/accuracy"] == pytest.approx(1 / 2)


def test_ocrbench_does_not_go_on_counting(answered) -> None:
    answers = [right("ocrbench", row) for row in rows("ocrbench")]
    for share in (1.0, 0.5, 1.0):
        given = [a if n < share * ROWS else "" for n, a in enumerate(answers)]
        assert answered("ocrbench", given).metrics["ocrbench/raw"] == share


def test_ocrbench_of_a_thousand_questions_is_lmms_evals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocrbench, "OCRBench_score", dict.fromkeys(ocrbench.OCRBench_score, 0))
    kinds = list(ocrbench.OCRBench_score)
    items = [{"question_type": kinds[n % 10], "score": int(n % 7 < 3)} for n in range(1000)]
    args = argparse.Namespace(output_path=str(tmp_path))
    assert benchmark._mean_score(items) == pytest.approx(ocrbench.ocrbench_aggregate_accuracy(items, args))


def test_rows_are_those_of_the_dataset(answered) -> None:
    samples = answered("mmbench_en_dev_static", ["A"] * ROWS).samples
    assert samples.columns.tolist() == [
        "task", "sample_id", "sample_hash", "type", "question", "answer", "chance", "prediction", "parsed", "score", "corrected"
    ]  # fmt: skip
    assert samples.answer.tolist() == [row["answer"] for row in rows("mmbench_en_dev_static")]
    pictures = samples.sample_id.str.rpartition("-")[0]
    assert pictures.tolist() == [pictures[n - n % 2] for n in range(ROWS)]  # a question's two rows show one picture
    assert pictures.nunique() == 3
    assert samples.sample_hash.nunique() == ROWS


def test_a_limit_draws_whole_questions_by_seed(answered) -> None:
    task = "mmbench_en_dev_static"
    everything = answered(task, ["A"] * ROWS).samples
    drawn = {seed: answered(task, ["A"] * ROWS, limit=2, seed=seed).samples for seed in range(5)}
    for samples in drawn.values():
        assert len(samples) == 4
        assert samples.sample_id.str.rpartition("-")[0].nunique() == 2
        pd.testing.assert_frame_equal(samples, everything[everything.sample_id.isin(samples.sample_id)].reset_index(drop=True))
    assert len({tuple(s.sample_id) for s in drawn.values()}) > 1
    assert answered(task, ["A"] * ROWS, limit=2, seed=3).samples.equals(drawn[3])


def test_questions_are_those_of_images(answered) -> None:
    assert len(answered("seedbench", ["A"] * ROWS, limit=100).samples) == ROWS - 1


@pytest.mark.parametrize("task", TASKS)
def test_the_list_says_what_lmms_eval_says(task: str) -> None:
    listed = BENCHMARKS[task]
    config = load_yaml_config(str(Path(benchmark.lmms_eval.tasks.__file__).parent / listed.recipe), mode="simple")
    assert config["task"] == task
    assert (config["dataset_path"], config.get("dataset_name"), config["test_split"]) == (
        listed.dataset,
        listed.part,
        listed.split,
    )
    assert listed.metric in [m["metric"] for m in config["metric_list"]]


def test_what_is_missing_is_named_with_the_way_to_get_it(copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    for data in (tmp_path / "nowhere", None):
        with pytest.raises(UserError, match="mmstar reads Lin-Chen/MMStar, split val") as caught:
            suite(data, "mmstar").check()
        assert "hf download Lin-Chen/MMStar --repo-type dataset --local-dir DIR/Lin-Chen/MMStar" in str(caught.value)
    part = shutil.copytree(copies, tmp_path / "part")
    shutil.rmtree(part / "echo840")
    with pytest.raises(UserError, match="1 of 2 tasks") as caught:
        suite(part, "mmstar", "ocrbench").check()
    assert "ocrbench reads echo840/OCRBench" in str(caught.value)
    suite(copies, *TASKS).check()


def test_other_columns_than_the_tasks_are_found_beforehand(copies: Path, tmp_path: Path) -> None:
    file = next((copies / "Lin-Chen").rglob("*.parquet"))
    odd = tmp_path / file.relative_to(copies)
    odd.parent.mkdir(parents=True)
    pd.read_parquet(file).drop(columns="category").to_parquet(odd)
    with pytest.raises(UserError, match=r"mmstar reads .*category"):
        suite(tmp_path, "mmstar").check()


def test_runs_and_studies_fail_before_any_work(tmp_path: Path) -> None:
    nowhere = f"evaluation.data={tmp_path / 'nowhere'}"
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("config", ["method=rtn", "evaluation=suite", nowhere])
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="8 of 8 tasks"):
        execute(cfg, folder)
    assert not folder.path.exists()
    study = tmp_path / "study.yaml"
    study.write_text(
        f"name: s\nquestion: q\ncommon: [evaluation=suite, {nowhere}]\nseeds: [0]\ngrid: {{}}\narms: {{rtn: [method=rtn]}}\n"
    )
    with pytest.raises(UserError, match=r"arm rtn .*8 of 8 tasks"):
        build_components(expand(read_study(study)))


def test_a_study_whose_evaluation_no_table_knows_has_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MGVQ_RESULTS", str(tmp_path))
    study = tmp_path / "study.yaml"
    study.write_text("name: s\nquestion: q\ncommon: [evaluation=suite]\nseeds: [0]\ngrid: {}\narms: {rtn: [method=rtn]}\n")
    (run,) = expand(read_study(study))
    run.folder.path.mkdir(parents=True)
    (run.folder.path / "metrics.json").write_text('{"mine/score": 1.0}')
    (run.folder.path / "config.yaml").write_text(OmegaConf.to_yaml(run.cfg, resolve=True))
    (run.folder.path / "identity.json").write_text("{}")
    pd.DataFrame({"task": ["mmstar"], "score": [1.0], "sample_hash": ["a"]}).to_parquet(run.folder.path / "samples.parquet")
    declare_done(run.folder.path)
    with pytest.raises(UserError, match=r"arm rtn: .*this one has mine/score"):
        collect(read_study(study), [run])


@LLAVA
def test_a_question_may_show_several_pictures(loaded) -> None:
    pictures: list[Image] = [row["image"] for row in rows("mmstar")]
    settings = {"max_new_tokens": 6, "do_sample": False}
    asked = [((pictures[0], pictures[1]), "list all things :"), ((pictures[1], pictures[0]), "list all things :")]
    answers = generate(loaded.model, loaded.processor, [asked[0], (pictures[2], "list all things :"), asked[1]], 4, settings)
    assert answers[1:2] == generate(loaded.model, loaded.processor, [(pictures[2], "list all things :")], 4, settings)
    for (images, question), answer in zip(asked, answers[::2], strict=True):
        prompt = chat_prompt(loaded.processor, question, 2)
        inputs = loaded.processor(images=[list(images)], text=[prompt], return_tensors="pt")
        with torch.no_grad():
            tokens = loaded.model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        assert answer == Reply(loaded.processor.tokenizer.decode(tokens, skip_special_tokens=True))


def test_a_study_of_all_eight_on_a_quantised_model(copies: Path, tmp_path: Path) -> None:
    settings = ["model=tiny_llava_onevision", "method=rtn", "evaluation=suite", f"evaluation.data={copies}", "evaluation.limit=3"]
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps({"name": "s", "question": "q", "common": settings, "arms": {"rtn": []}, "seeds": [0]}))
    done = run_command("mgvq.cli.study", str(study), results=tmp_path)
    (folder,) = (file.parent for file in tmp_path.glob("runs/*/metrics.json"))
    metrics, samples = json.loads((folder / "metrics.json").read_text()), pd.read_parquet(folder / "samples.parquet")
    printed = (tmp_path / "runs" / ".logs" / f"{folder.name}.log").read_text()
    assert metrics["flags"] == []
    assert samples.task.value_counts().to_dict() == {task: 6 if "mmbench" in task else 3 for task in TASKS}
    for task in TASKS:
        asked = samples[samples.task == task]
        assert metrics[f"{task}/accuracy"] == pytest.approx(asked.score.mean())
        assert metrics[f"{task}/unparsed"] == pytest.approx(1 - asked.parsed.mean())
        assert f"{task}/accuracy" in printed
        assert f"| {task} %" in done.stdout
    assert samples.prediction.nunique() > 3
