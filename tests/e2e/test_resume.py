"""A study that is killed with all its runs and started again ends as one that was left alone."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_random_moments_and_resumed(tmp_path: Path) -> None:
    """Three moments of the fifty of `python experiments/resume/kill_and_resume.py`."""
    command = [sys.executable, "experiments/resume/kill_and_resume.py", "--points", "3", "--out", str(tmp_path / "resume.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "resume.md").read_text().count("\n| all") == 1
