"""Commands of mgvq in forks of a process that has imported everything: each is a process that can be killed, without the
seconds that imports take.

    python forks.py     reads jobs as lines of JSON from stdin, answers each with a line
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUN = "mgvq.cli.run"
IMPORTED = (
    *("cli.run", "cli.study", "cli.report", "runs.execute", "evaluation.tiny_vqa", "calibration.tiny_vqa", "curvature.input"),
    *(
        "sensitivity.uniform",
        "grouping.one",
        "allocation.uniform",
        "codebook.kmeans",
        "compensation.hessian",
        "refit.closed_form",
    ),
)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit status, negative for a signal, and what it said on both streams."""

    status: int
    output: str


class Forks:
    """The process that forks, as seen from the one that asks. A context: leaving it ends the process.

    With `private` it has a mount namespace of its own, in which `shell` can mount what it likes; `path` is how a file in there is
    seen from here.
    """

    def __init__(self, *, private: bool = False) -> None:
        self._namespace = ["unshare", "--mount", "--propagation", "private"] if private else []

    def __enter__(self) -> "Forks":
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*self._namespace, sys.executable, str(HERE / "forks.py")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        if self._answer() != "ready":
            raise RuntimeError("the process that forks could not start")
        self._scratch = tempfile.TemporaryDirectory()
        self._outputs: dict[int, Path] = {}
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()
        self._process.stdout.close()  # type: ignore[union-attr]
        self._scratch.cleanup()

    def run(self, words: Sequence[str], results: Path, fault: Mapping[str, Any] | None = None, module: str = RUN) -> Ended:
        """The command to its end."""
        return self.wait(self.start(words, results, fault, module))

    def start(self, words: Sequence[str], results: Path, fault: Mapping[str, Any] | None = None, module: str = RUN) -> int:
        """Start the command; its process id."""
        output = Path(self._scratch.name) / str(len(self._outputs))
        output.touch()
        job = {"module": module, "words": list(words), "results": str(results), "output": str(output), "fault": fault}
        pid = self._ask(job)
        self._outputs[pid] = output
        return pid

    def wait(self, pid: int) -> Ended:
        """How the command with that process id ended."""
        status = self._ask({"wait": pid})
        return Ended(status, self._outputs[pid].read_text(errors="replace"))

    def shell(self, command: str, **environment: str) -> Ended:
        """A command of the shell where the forks are."""
        return Ended(*self._ask({"shell": command, "environment": environment}))

    def path(self, file: Path) -> Path:
        """A file where the forks are, as it is seen from here."""
        return Path(f"/proc/{self._process.pid}/root") / file.relative_to("/") if self._namespace else file

    def _ask(self, job: Mapping[str, Any]) -> Any:
        self._process.stdin.write(json.dumps(job) + "\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        return self._answer()

    def _answer(self) -> Any:
        if not (line := self._process.stdout.readline()):  # type: ignore[union-attr]
            raise RuntimeError("the process that forks has died")
        return json.loads(line)


def serve() -> None:
    """The process that forks. It computes nothing itself, so that no pool of threads is missed by a fork."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_all()

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer("ready")
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        if "wait" in job:
            answer(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]))
        elif "shell" in job:
            environment = {**os.environ, **job["environment"]}
            done = subprocess.run(job["shell"], shell=True, capture_output=True, text=True, env=environment)
            answer([done.returncode, done.stdout + done.stderr])
        elif pid := os.fork():
            answer(pid)
        else:
            answers.close()
            _command(job)
            return


def _command(job: Mapping[str, Any]) -> None:
    """In the fork: be the command."""
    import faults

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, file, mode in ((0, os.devnull, os.O_RDONLY), (1, job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        os.dup2(os.open(file, mode, 0o644), stream)
    os.dup2(1, 2)
    os.environ["MGVQ_RESULTS"] = job["results"]
    sys.argv = [job["module"], *job["words"]]
    module = importlib.import_module(job["module"])
    if job["fault"]:
        faults.arm(job["fault"])
    module.main()


def _import_all() -> None:
    """What a run of a small model imports, with the model's own classes; torch keeps to one thread, since no thread is forked."""
    import torch

    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(f"mgvq.{name}")
    from mgvq.model.load import load
    from mgvq.runs.build import build
    from mgvq.runs.compose import composer

    with composer() as compose:
        load(build(compose("model=tiny_internvl"), "model"), torch.device("cpu"))


if __name__ == "__main__":
    serve()
