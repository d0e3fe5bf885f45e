"""Commands of mgvq in forks of a process that has imported everything: each is a process that can be killed, without the
seconds that imports take.

    python forks.py ADDRESS     forks a command for everyone who connects to that socket, until its own input ends

A connection asks for one command: its words, environment and folder as JSON, with its three streams. It is told the process id,
and how the command ended. Whoever hangs up before has it killed.
"""

import atexit
import gc
import importlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

RUN = "mgvq.cli.run"
LONGEST = 1 << 18  # bytes of a request, most of which are the environment
# Python, for whoever starts `python -m mgvq.cli.NAME`: a fork runs it. Everything else is the real Python's.
PYTHON = """#!{python} -IS
import sys, os
words = sys.argv[1:]
if words[:1] != ["-m"] or not words[1].startswith("mgvq.cli."):
    os.execv({python!r}, [{python!r}, *words])
import json, signal, socket
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect({address!r})
job = {{"module": words[1], "words": words[2:], "environment": dict(os.environ), "folder": os.getcwd(), "python": __file__}}
socket.send_fds(connection, [json.dumps(job).encode()], [0, 1, 2])
pid = json.loads(connection.recv(99))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, _: os.kill(pid, number))
status = json.loads(connection.recv(99))
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit status, negative for a signal, and what it said on both streams."""

    status: int
    output: str


class Forks:
    """The process that forks, as seen from the one that asks. A context: leaving it ends the process.

    `python` is a file that can be started in place of Python. With `private` the process has a mount namespace of its own, in
    which `shell` can mount what it likes; `path` is how a file in there is seen from here.
    """

    def __init__(self, *, private: bool = False) -> None:
        self._private = private

    def __enter__(self) -> "Forks":
        self._scratch = tempfile.TemporaryDirectory(prefix="forks")
        self._address = str(Path(self._scratch.name) / "socket")
        self.python = Path(self._scratch.name) / "python"
        self.python.write_text(PYTHON.format(python=sys.executable, address=self._address))
        self.python.chmod(0o755)
        namespace = ["unshare", "--mount", "--propagation", "private"] if self._private else []
        command = [*namespace, sys.executable, __file__, self._address]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment(), start_new_session=True
        )
        self._connections: dict[int, tuple[socket.socket, Path]] = {}  # of commands that nobody has waited for, by process id
        self._numbers = itertools.count()
        if self._process.stdout.readline() != "ready\n":  # type: ignore[union-attr]
            raise RuntimeError("the process that forks could not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._scratch.cleanup()

    def run(self, words: Sequence[str], results: Path, fault: Mapping[str, Any] | None = None, module: str = RUN) -> Ended:
        """The command to its end."""
        return self.wait(self.start(words, results, fault, module))

    def start(self, words: Sequence[str], results: Path, fault: Mapping[str, Any] | None = None, module: str = RUN) -> int:
        """Start the command; its process id."""
        environment = {**_environment(), "MGVQ_RESULTS": str(results)}
        job = {"module": module, "words": list(words), "environment": environment, "folder": str(Path.cwd()), "fault": fault}
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(self._address)
        output = Path(self._scratch.name) / str(next(self._numbers))
        with Path(os.devnull).open() as nothing, output.open("w") as said:
            socket.send_fds(connection, [json.dumps(job).encode()], [nothing.fileno(), said.fileno(), said.fileno()])
        pid = json.loads(connection.recv(LONGEST))
        self._connections[pid] = connection, output
        return pid

    def wait(self, pid: int) -> Ended:
        """How the command with that process id ended."""
        connection, output = self._connections.pop(pid)
        with connection:
            status = json.loads(connection.recv(LONGEST))
        return Ended(status, output.read_text(errors="replace"))

    def shell(self, command: str, **environment: str) -> Ended:
        """A command of the shell where the forks are."""
        inside = ["nsenter", "--target", str(self._process.pid), "--mount"] if self._private else []
        words = [*inside, "bash", "-c", command]
        done = subprocess.run(words, capture_output=True, text=True, env={**_environment(), **environment})
        return Ended(done.returncode, done.stdout + done.stderr)

    def path(self, file: Path) -> Path:
        """A file where the forks are, as it is seen from here."""
        return Path(f"/proc/{self._process.pid}/root") / file.relative_to("/") if self._private else file


@cache
def shared_forks() -> Forks:
    """One that serves this process to its end."""
    started = Forks().__enter__()
    atexit.register(started.__exit__)
    return started


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def serve(address: str) -> None:
    """The process that forks. It computes nothing itself, so that no pool of threads is missed by a fork."""
    _import_all()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        gc.freeze()  # what is here stays: no collection of a fork looks at it, which would copy its pages
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> NoReturn:
    """In a fork that stands by one command."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, streams, *_ = socket.recv_fds(connection, LONGEST, 3)
    if not (pid := os.fork()):
        connection.close()
        _ended(_command(json.loads(request), streams))
    for stream in streams:
        os.close(stream)
    connection.send(json.dumps(pid).encode())
    ready, *_ = select.select([os.pidfd_open(pid), connection], [], [])
    if connection in ready:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet
            os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        connection.send(json.dumps(status).encode())
    finally:
        os._exit(0)


def _ended(status: int) -> NoReturn:
    """End as Python does, without the seconds in which it takes every object apart."""
    threading._shutdown()  # pools of workers are told that this is the end, then all threads are waited for
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _command(job: Mapping[str, Any], streams: Sequence[int]) -> int:
    """In the fork of that: be the command. Its exit status."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.executable = job.get("python", sys.executable)
    sys.argv = [job["module"], *job["words"]]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    sys.path[0:1] = [job["folder"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    module = importlib.import_module(job["module"])
    if job.get("fault"):
        sys.path.append(str(Path(__file__).parent / "trust"))
        import faults

        faults.arm(job["fault"])
    try:
        module.main()
    except SystemExit as ended:
        if isinstance(ended.code, int | None):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _import_all() -> None:
    """What a run of a small model imports, with the model's own classes; torch keeps to one thread, since no thread is forked."""
    import torch

    torch.set_num_threads(1)
    from mgvq.model.load import load
    from mgvq.model.source import SHIPPED
    from mgvq.runs.build import build
    from mgvq.runs.compose import composer

    for name in ("run", "study", "report", "runs"):
        importlib.import_module(f"mgvq.cli.{name}")
    importlib.import_module("mgvq.runs.execute")
    with composer() as compose:
        for weights in SHIPPED.glob("*/model.safetensors"):
            load(build(compose(f"model={weights.parent.name}"), "model"), torch.device("cpu"))
        cfg = compose("method=mgvq")
        for group in ("calibration", "evaluation", "curvature", "codebook", "compensation", "refit", "allocation", "grouping"):
            importlib.import_module(cfg[group]["_target_"].rpartition(".")[0])


if __name__ == "__main__":
    serve(sys.argv[1])
