"""The loop that runs a study, and every launcher, on commands that take no time."""

import os
import signal
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mgvq.errors import UserError
from mgvq.runs.store import RunFolder
from mgvq.studies.launch import choose, launch
from mgvq.studies.launchers import job
from mgvq.studies.launchers.job import Command, Launcher
from mgvq.studies.plan import PlannedRun

SETTINGS = {"local": "", "slurm": "cluster: local", "ray": "cpus: 1"}
PACKAGE = {"local": "mgvq", "slurm": "submitit", "ray": "ray"}
# Takes the run's folder: leaves a line in `starts`, and DONE.
WORK = """
import sys, time, pathlib
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
with (folder.parent / "starts").open("a") as file: file.write(folder.name + "\\n")
time.sleep(0.2)
(folder / "DONE").touch()
"""


@pytest.fixture(autouse=True)
def _cheap_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's only override is the code of it."""

    def command(run: PlannedRun, log: Path, processes: int) -> Command:
        folder = run.folder.path
        return Command([sys.executable, "-c", run.overrides[0], str(folder)], {"MARK": "seen"}, str(folder.parent), log)

    monkeypatch.setattr("mgvq.studies.launch.command", command)


def planned(runs: Path, *codes: str) -> list[PlannedRun]:
    return [PlannedRun(f"arm {i}", {}, 0, (code,), RunFolder(runs / f"r{i}"), OmegaConf.create()) for i, code in enumerate(codes)]


@pytest.fixture(params=SETTINGS)
def launcher(request: pytest.FixtureRequest, tmp_path: Path) -> Launcher:
    """Each launcher in turn, with two slots."""
    if find_spec(PACKAGE[request.param]) is None:
        pytest.skip(f"{PACKAGE[request.param]} is not installed: pip install 'mgvq[{request.param}]'")
    (tmp_path / "settings.yaml").write_text(SETTINGS[request.param])
    return choose(request.param, 2, tmp_path / "settings.yaml")


def test_a_failure_and_a_kill_leave_the_others_running(launcher: Launcher, tmp_path: Path) -> None:
    killed = "import os; print('the last words', flush=True); os.kill(os.getpid(), 9)"
    failing = "import os, sys; sys.exit('mark ' + os.environ['MARK'] + ' in ' + os.path.basename(os.getcwd()))"
    runs = planned(tmp_path / "runs", WORK, killed, failing, WORK)
    failures = {f.run.arm: f for f in launch(runs, launcher)}
    assert {arm: f.returncode for arm, f in failures.items()} == {"arm 1": -signal.SIGKILL, "arm 2": 1}
    assert "the last words" in failures["arm 1"].output
    assert "mark seen in runs" in failures["arm 2"].output
    assert [run.folder.is_done() for run in runs] == [True, False, False, True]
    assert len(launch(runs, choose("local", 2, None))) == 2, "a rerun tries those again, and only those"
    assert sorted((tmp_path / "runs/starts").read_text().split()) == ["r0", "r3"]


def test_an_interrupted_study_ends_what_it_started(launcher: Launcher, tmp_path: Path) -> None:
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    (pid := tmp_path / "runs/pid").parent.mkdir()

    def interrupt() -> None:
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    kept = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it puts in the background without one
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            launch(planned(tmp_path / "runs", code), launcher)
    finally:
        signal.signal(signal.SIGINT, kept)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid.read_text()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_studies_at_once_do_no_run_twice(tmp_path: Path) -> None:
    local = choose("local", 2, None)
    threads = [
        threading.Thread(target=launch, args=(planned(tmp_path / "runs", *[WORK] * 8)[::order], local)) for order in (1, -1, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((tmp_path / "runs/starts").read_text().split()) == [f"r{i}" for i in range(8)]


def test_a_run_that_another_study_gives_up_is_taken_over(tmp_path: Path) -> None:
    (run,) = planned(tmp_path / "runs", WORK)
    reserved = run.folder.reserve()
    assert reserved is not None
    assert run.folder.reserve() is None
    threading.Timer(0.5, reserved.close).start()
    assert launch([run], choose("local", 1, None)) == []
    assert run.folder.is_done()


def test_a_finished_run_keeps_no_blocks(tmp_path: Path) -> None:
    """One that was killed behind DONE has left them."""
    (run,) = planned(tmp_path / "runs", WORK)
    run.folder.path.mkdir(parents=True)
    (run.folder.path / "DONE").touch()
    run.folder.partial.mkdir(parents=True)
    assert run.folder.partial == tmp_path / "partial" / "r0"
    assert launch([run], choose("local", 1, None)) == []
    assert not run.folder.partial.exists()


def test_each_slot_has_its_device(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("gpus: [3, 5]")
    code = "import os, sys, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.4); sys.exit(1)"
    runs = planned(tmp_path / "runs", code, code)
    failures = launch(runs, choose("local", 2, tmp_path / "settings.yaml"))
    assert sorted(f.output.strip() for f in failures) == ["3", "5"]


def test_each_process_of_a_run_has_a_device_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("{gpus: [3, 5, 7], processes: 2}")
    code = "import os, sys, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.4); sys.exit(1)"
    failures = launch(planned(tmp_path / "runs", code, code), choose("local", 2, tmp_path / "settings.yaml"))
    assert sorted(f.output.strip() for f in failures) == ["3,5", "7,3"]


def test_several_processes_are_started_by_torchrun(tmp_path: Path) -> None:
    (run,) = planned(tmp_path / "runs", "seed=3")
    run.cell.device = "cpu"
    alone, both = job.command(run, tmp_path / "log"), job.command(run, tmp_path / "log", 2)
    assert alone.words == [sys.executable, "-m", "mgvq.cli.run", "seed=3"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert both.words == [sys.executable, *torchrun, "-m", "mgvq.cli.run", "seed=3"]


def test_what_torchrun_adds_is_not_told(tmp_path: Path) -> None:
    """It is longer than what is told of a run that has failed."""
    torchrun = "E1129 16:47:40 104 torch/distributed/elastic/multiprocessing/api.py:1002] failed\n" + "Traceback\n" * 500
    code = f"import sys; print('mgvq-run: the reason'); print({torchrun!r}); sys.exit(1)"
    (failure,) = launch(planned(tmp_path / "runs", code), choose("local", 1, None))
    assert failure.output.strip() == "mgvq-run: the reason"


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("local", "gpus: [-1]", "gpus must be a list"),
        ("local", "partition: gpu", "partition"),
        ("slurm", "hours: 0.0", "hours must be a number"),
        ("slurm", "cluster: pbs", "cluster must be slurm or local"),
        ("ray", "cpus: 0", "cpus must be a number >= 1"),
        ("ray", "[", "settings.yaml"),
        ("local", "jobs: -1", "launcher local: jobs must be a whole number >= 1, got -1"),
        ("local", "jobs: 0", "jobs must be a whole number >= 1, got 0"),
        ("local", "jobs: true", "jobs must be a whole number >= 1, got True"),
        ("local", "processes: 0", "launcher local: processes must be a whole number >= 1, got 0"),
        ("slurm", "processes: 0", "launcher slurm: processes must be a whole number >= 1, got 0"),
        ("ray", "processes: -2", "launcher ray: processes must be a whole number >= 1, got -2"),
        ("slurm", "jobs: 0", "launcher slurm: jobs must be a whole number >= 1, got 0"),
        ("ray", "jobs: -1", "launcher ray: jobs must be a whole number >= 1, got -1"),
        ("local", "jobs: 2  # f\xfcr zwei", "settings.yaml is no file of settings"),
    ],
)
def test_bad_settings_are_named(name: str, settings: str, named: str, tmp_path: Path) -> None:
    if find_spec(PACKAGE[name]) is None:
        pytest.skip(f"{PACKAGE[name]} is not installed: pip install 'mgvq[{name}]'")
    (tmp_path / "settings.yaml").write_bytes(settings.encode("latin-1"))
    with pytest.raises(UserError, match=named):
        choose(name, None, tmp_path / "settings.yaml")


@pytest.mark.parametrize("name", ["slurm", "ray"])
def test_a_missing_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"mgvq.studies.launchers.{name}.find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"pip install 'mgvq\[{name}\]'"):
        choose(name, None, None)


@pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed: pip install 'mgvq[slurm]'")
def test_without_slurm_its_launcher_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(UserError, match="login node"):
        launch(planned(tmp_path / "runs", WORK), choose("slurm", 1, None))


def test_a_study_says_how_far_its_runs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mgvq.studies.launch._TELL_S", 0.1)
    told = "print('12:00:00 so far 3 of 20 blocks, about 1.5 min left, peak memory 0.25 GB', flush=True)"
    launch(planned(tmp_path / "runs", f"{told}\nimport time; time.sleep(0.5)\n{WORK}"), choose("local", 1, None))
    assert "running: arm 0 seed 0: 3 of 20 blocks, about 1.5 min left, peak 0.25 GB" in capsys.readouterr().err
