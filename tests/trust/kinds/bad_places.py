"""Places that cannot be used: a disk that is full at several sizes, folders that cannot be written, a file system without
locks, a clock that was set back. A run goes on where it can, and else ends with the words that help; what was finished is as it
was, and once the place is mended the same command gives the same bytes and leaves nothing lying about."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from compared import CALIBRATED, PLAIN, differing, faults_of, litter, number_equal, run_files, statistics_files
from forks import Ended, Forks
from trials import Outcome

SHIMS = Path(__file__).parents[1] / "shims"
ROOT = Path(__file__).parents[3]
SHARES = (0.3, 0.5, 0.7, 0.9)  # of the bytes that the run needs, which a disk has left
NO_CACHE = "kept for other runs"
NO_MOUNT = "nothing can be mounted here, which takes the rights of root."
NO_COMPILER = "there is no C compiler here."
WHOLE, SAMPLE = len(SHARES) + 5, 0


def missing() -> str:
    return ""


def trials(scratch: Path, number: int) -> Iterator[Outcome]:
    mounting = can_mount()
    with Forks(private=mounting) as forks:
        undisturbed = scratch / "undisturbed"
        finished: dict[str, str] = {}
        for words in (PLAIN, CALIBRATED):
            finished = finished or run_files(undisturbed)
            if (ended := forks.run(words, undisturbed)).status:
                raise RuntimeError(ended.output)
        place = _Place(forks, scratch / "results", undisturbed, finished)
        mounted: list[tuple[str, Callable[[], Outcome]]] = [
            *((f"a disk with {share:.0%} of the room", lambda share=share: place.full(share)) for share in SHARES),
            ("results that are mounted read-only", place.read_only),
            ("a cache that is mounted read-only", place.read_only_cache),
            ("a home and a code that are mounted read-only", place.read_only_home),
        ]
        shimmed: list[tuple[str, Callable[[], Outcome]]] = [
            ("a file system without locks", place.no_locks),
            ("a clock set back by ten years", place.clock_back),
        ]
        compiler = shutil.which("cc") is not None
        for case, trial in [*mounted, *shimmed][:number]:
            can, why = (mounting, NO_MOUNT) if (case, trial) in mounted else (compiler, NO_COMPILER)
            yield trial() if can else Outcome(case, not_run=why)
            place.clear()


def can_mount() -> bool:
    """Whether a process here may have mounts of its own."""
    command = ["unshare", "--mount", "--propagation", "private", "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


class _Place:
    """A results folder that holds the finished run PLAIN, in which CALIBRATED meets a fault, and then none."""

    def __init__(self, forks: Forks, results: Path, undisturbed: Path, finished: Mapping[str, str]) -> None:
        self.forks, self.results, self.undisturbed, self.finished = forks, results, undisturbed, finished
        (self.run,) = {name.partition("/")[0] for name in finished}
        self.wanted = {**run_files(undisturbed), **statistics_files(undisturbed)}
        self.shell(f"mkdir -p {results}")

    def shell(self, command: str) -> None:
        if (ended := self.forks.shell(command)).status:
            raise RuntimeError(f"{command}: {ended.output}")

    def clear(self) -> None:
        self.forks.shell(f"umount -l {self.results}/cache; umount -l {self.results}; umount -l {self.results}")
        self.shell(f"rm -rf {self.results}; mkdir -p {self.results}")

    def full(self, share: float) -> Outcome:
        """The disk holds the finished run, and has room for a share of what the other one needs."""
        need = sum(f.stat().st_size for f in self.undisturbed.rglob("*") if f.is_file())
        has = sum(f.stat().st_size for f in (self.undisturbed / "runs" / self.run).rglob("*") if f.is_file())
        size = int(has + share * (need - has)) + 2**16
        self.shell(f"mount -t tmpfs -o size={size} none {self.results}")
        self._begin()
        ended = self.forks.run(CALIBRATED, self.results)
        mend = f"mount -o remount,size=1g {self.results}"
        return self._judge(f"a disk with {share:.0%} of the room", ended, mend, {2: ("Make room",), 0: (NO_CACHE,)})

    def read_only(self) -> Outcome:
        self._begin()
        self.shell(f"mount --bind {self.results} {self.results}; mount -o remount,bind,ro {self.results}")
        again = self.forks.run(PLAIN, self.results)
        ended = self.forks.run(CALIBRATED, self.results)
        told = "" if not again.status and "done before" in again.output else f"a finished run is not shown: {again.output[-200:]}"
        mend = f"umount {self.results}"
        return self._judge("results that are mounted read-only", ended, mend, {2: ("MGVQ_RESULTS",)}, told)

    def read_only_cache(self) -> Outcome:
        self._begin()
        cache = self.results / "cache"
        self.shell(f"mkdir -p {cache}; mount --bind {cache} {cache}; mount -o remount,bind,ro {cache}")
        ended = self.forks.run(CALIBRATED, self.results)
        return self._judge("a cache that is mounted read-only", ended, f"umount {cache}", {0: (NO_CACHE,)})

    def read_only_home(self) -> Outcome:
        """A process of its own: numba, matplotlib and transformers look for places in the home while they are imported."""
        self._begin()
        folders = (Path.home(), ROOT)
        for folder in folders:
            self.shell(f"mount --bind {folder} {folder}; mount -o remount,bind,ro {folder}")
        ended = self.forks.shell(f"{sys.executable} -m mgvq.cli.run {' '.join(CALIBRATED)}", MGVQ_RESULTS=str(self.results))
        mend = "; ".join(f"umount {folder}" for folder in folders)
        return self._judge("a home and a code that are mounted read-only", ended, mend, {0: ()})

    def no_locks(self) -> Outcome:
        self._begin()
        ended = self._shimmed("no_flock", CALIBRATED)
        return self._judge("a file system without locks", ended, "true", {2: ("without locks", "MGVQ_RESULTS")})

    def clock_back(self) -> Outcome:
        """What lies there was written in the future."""
        self._begin()
        ended = self._shimmed("clock_back", CALIBRATED)
        return self._judge("a clock set back by ten years", ended, "true", {0: ()})

    def _shimmed(self, shim: str, words: tuple[str, ...]) -> Ended:
        """A process of its own under a library that stands before the system's."""
        library = self.undisturbed.parent / f"{shim}.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SHIMS / f"{shim}.c"], check=True)
        environment = {"LD_PRELOAD": str(library), "MGVQ_RESULTS": str(self.results)}
        return self.forks.shell(f"{sys.executable} -m mgvq.cli.run {' '.join(words)}", **environment)

    def _begin(self) -> None:
        self.shell(f"mkdir -p {self.results}/runs")
        self.shell(f"cp -r {self.undisturbed}/runs/{self.run} {self.results}/runs/")

    def _judge(self, case: str, ended: Ended, mend: str, said: Mapping[int, tuple[str, ...]], told: str = "") -> Outcome:
        """What is there after the fault, and after the place was mended and the command given again."""
        results = self.forks.path(self.results)
        found = run_files(results)
        lost = len(faults_of(results)) + sum(found.get(name) != digest for name, digest in self.finished.items())
        lost += int((len(found) > len(self.finished)) != (ended.status == 0))
        silent = int(not all(word in ended.output for word in said.get(ended.status, ())))
        wrong = [told] if told else []
        if ended.status not in said or silent:
            wrong.append(f"ended with {ended.status}: {ended.output[-600:]}")
        self.shell(mend)
        again = self.forks.run(CALIBRATED, self.results)
        if again.status:
            wrong.append(f"the same command then ends with {again.status}: {again.output[-300:]}")
        found, wanted = run_files(results) | statistics_files(results), self.wanted
        if NO_CACHE in said.get(ended.status, ()):  # the run went on without
            wanted = run_files(self.undisturbed)
        wrong += [differing(found, wanted)] + [f"left lying: {', '.join(left)}" for left in [litter(results)] if left]
        text = "; ".join(filter(None, wrong))
        survived = int(not text and not lost and not silent)
        return Outcome(case, 1, survived, lost, silent, len(wanted), number_equal(found, wanted), text and f"{case}: {text}")
