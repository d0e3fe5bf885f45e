"""Words of the commands: what is not known is refused in one paragraph with the nearest name, before torch is loaded."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forks import shared_forks

import mgvq
from mgvq.cli import report
from mgvq.cli import run as command
from mgvq.cli.words import check_words
from mgvq.errors import SharedFault, UserError

# A word that is no setting, and what has to be said of it.
TYPOS = {
    "model=typo": "model=typo: there is no such variant. There are gemma3_270m,",
    "model=tiny_intern_vl": "is tiny_internvl meant?",
    "method=kmean": "is kmeans meant?",
    "codebook=k_means": "is kmeans meant?",
    "sead=3": "sead: there is no such setting; is seed meant?",
    "sed=0,1": "sed: there is no such setting; is seed meant?",
    "modle=tiny_internvl": "is model meant?",
    "codebook.sampel=3": "codebook.sampel: there is no such setting; is codebook.sample meant? The settings of codebook=kmeans: ",
    "budget.bits=3": "is budget.bits_per_weight meant?",
    "evaluation.num_question=3": "is evaluation.num_questions meant?",
    "seed.x=3": "seed.x: there is no such setting",
    "foo": "foo is no setting: give KEY=VALUE",
    "model.path=/a/b=c": "'model.path=\"/a/b=c\"'",
    "model.path=a(b": "'model.path=\"a(b\"'",
    "model.path=C:\\a b\\(c)\\": "'model.path=\"C:\\a b\\(c)\\\\\"'",
    "evaluation.num_questions=[": "'evaluation.num_questions=\"[\"'",
    "model=tiny_internvl,tiny_intern": "model=tiny_intern: there is no such variant",
    "evaluation=null": "evaluation=null: no run is without this group; evaluation=none",
    "model=glob(huge_*)": "model=glob(huge_*): glob chooses among the variants of a group, and none is chosen.",
    "seed=glob(*)": "seed=glob(*): glob chooses among the variants of a group, and none is chosen.",
    "method=null": "method=null: no run is without this group; leave the word out.",
    "~codebook": "~codebook: no run is without this group",
}  # fmt: skip


@pytest.mark.parametrize(("word", "said"), TYPOS.items(), ids=list(TYPOS))
def test_a_word_that_is_no_setting_is_told_with_the_nearest(word: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_words(["scope=language", word])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


GOOD = [
    [],
    ["--help"],
    ["method=kmeans", "--cfg", "job", "--resolve"],
    ["-m", "method=rtn,kmeans", "seed=0,1", "hydra/launcher=basic"],
    ["-m", "model=glob(tiny_*)", "method=glob([g*,r*],exclude=rsavq*)"],
    ["-m", "seed=range(0,3)", "+codebook.new=1"],
    ["model=local", 'model.path="/a/b=c, (d)"'],
    ["experiment=paper_table2", "dry=true"],
    ["--config-dir", "elsewhere", "model=of_elsewhere"],
]


@pytest.mark.parametrize("words", GOOD, ids=" ".join)
def test_words_that_are_settings_pass(words: list[str]) -> None:
    check_words(words)


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
def test_a_sweep_into_what_is_no_folder_is_refused_before_hydra_starts(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SharedFault, match=rf"{tmp_path}/{place} cannot be written \({tmp_path}/file: Not a directory\)"):
        check_words(["-m", "seed=0,1", f"paths.results={tmp_path / place}"])
    check_words(["-m", "seed=0,1", f"paths.results={tmp_path / 'new' / 'below'}"])
    assert not (tmp_path / "new").exists()


def ended(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """The exit status of `mgvq-run`, here in this process."""
    monkeypatch.setattr(sys, "argv", ["mgvq-run", *words])
    with pytest.raises(SystemExit) as caught:
        command.main()
    return caught.value.code


# Values that are wrong whatever the model is: words, and what is said.
VALUES: dict[str, tuple[list[str], str]] = {
    "typo": (["method=kmean"], "kmeans"),
    "budget": (["budget.bits_per_weight=9"], "budget.bits_per_weight=9"),
    "budget text": (["budget.bits_per_weight=many"], "budget.bits_per_weight=many"),
    "device": (["device=gpu"], "device must be"),
    "seed": (["seed=-1"], "seed must be"),
    "group": (["budget=2"], "budget=2: budget has settings, of which one is given as budget.NAME=VALUE."),
    "truth": (["tf32=0"], "tf32 must be true or false, got 0"),
    "scope": (["scope=everything"], "scope must be"),
}


@pytest.mark.parametrize(("words", "said"), VALUES.values(), ids=list(VALUES))
def test_bad_values_end_a_run_in_one_paragraph(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(monkeypatch, *words) == 2
    told = capsys.readouterr().err
    assert told.startswith("mgvq-run: ")
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["seed=1"]], ids=["alone", "with a word"])
def test_mgvq_run_alone_says_what_will_run_and_how_long_it_takes(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise UserError("not here")

    monkeypatch.setenv("MGVQ_RESULTS", str(tmp_path))
    monkeypatch.setattr("mgvq.runs.execute.execute", refused)
    assert ended(monkeypatch, *words) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "mgvq-run: not here"
    said = "quantised with codebook=kmeans to 2 bits and evaluated with tiny_vqa (1000 questions): about half a minute."
    assert [said in line for line in told[:-1]] == ([] if words else [True])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupt_ends_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    number, killed = signal.Signals[name], []
    before = {other: signal.getsignal(other) for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for ended_by in before:  # a process started in the background, or by nohup, inherits that some are ignored
        signal.signal(ended_by, signal.default_int_handler if ended_by == signal.SIGINT else signal.SIG_DFL)
    really = os.kill

    def hydra_main() -> None:
        really(os.getpid(), number)
        signal.pause()

    monkeypatch.setattr(command, "hydra_main", hydra_main)
    monkeypatch.setattr(os, "kill", lambda _, signalled: killed.append(signalled))
    monkeypatch.setattr(sys, "argv", ["mgvq-run"])
    try:
        if name == "SIGINT":
            assert ended(monkeypatch) == 130
        else:
            command.main()
            assert killed == [number], "whoever started it is told by which signal it ended"
    finally:
        for other, handler in before.items():
            signal.signal(other, handler)
    told = capsys.readouterr().err.strip()
    assert told.startswith("mgvq-run: interrupted. Finished runs and collected statistics are kept;")
    assert "\n" not in told


def shell(line: str) -> subprocess.CompletedProcess[str]:
    folder = Path(mgvq.__file__).parents[1]
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder)})


def test_help_into_a_pipe_that_closes_says_nothing() -> None:
    done = shell(f"{sys.executable} -m mgvq run --help | head -1")
    assert done.stdout.startswith("mgvq-run quantises")
    assert done.stderr == ""


@pytest.mark.parametrize("words", ["study experiments/e00_demo/study.yaml --dry", "runs list"])
def test_a_list_into_a_pipe_that_closes_says_nothing(words: str, tmp_path: Path) -> None:
    """`head -c 0` closes at once: what is printed finds nobody."""
    done = shell(f"MGVQ_RESULTS={tmp_path} {shared_forks().python} -m mgvq.cli.{words} | head -c 0")
    assert "BrokenPipe" not in done.stderr
    assert "Traceback" not in done.stderr


def test_the_version_and_the_commands_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mgvq.__main__ import COMMANDS, main

    monkeypatch.setattr(sys, "argv", ["mgvq-run", "--version"])
    command.main()
    assert capsys.readouterr().out == f"mgvq {mgvq.__version__}\n"
    for words in (["mgvq"], ["mgvq", "--help"]):
        monkeypatch.setattr(sys, "argv", words)
        main()
        assert all(f"  {name} " in told for told in [capsys.readouterr().out] for name in COMMANDS)
    monkeypatch.setattr(sys, "argv", ["mgvq", "rum"])
    with pytest.raises(SystemExit):
        main()
    assert "there is no command rum" in capsys.readouterr().err


def test_nothing_of_torch_is_imported_for_a_refusal() -> None:
    code = "import sys, mgvq.cli.run, mgvq.cli.runs, mgvq.cli.words; sys.exit('torch' in sys.modules)"
    assert shell(f'{sys.executable} -c "{code}"').returncode == 0


@pytest.mark.parametrize(("name", "begins"), [("report", "_report"), ("sensitivity", "_compare"), ("runs", "_list")])
def test_an_interrupted_command_says_so(
    name: str, begins: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"mgvq.cli.{name}")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, begins, interrupted)
    monkeypatch.setattr("sys.argv", [f"mgvq-{name}", "list" if name == "runs" else "some"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"\nmgvq-{name}: interrupted.\n"


def test_records_are_not_asked_for_where_nothing_else_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mgvq-report", "a.yaml", "b.yaml", "--html", "--from-records"])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "two studies are compared on a page, always from their records: give --html alone" in capsys.readouterr().err
