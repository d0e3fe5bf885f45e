"""What was freed and what the C library keeps of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mgvq.memory import give_back


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_freed_in_pieces_goes_back() -> None:
    pieces = [torch.ones(2**18) for _ in range(64)]  # 64 MB, and a piece in use behind them
    behind = torch.ones(2**18)
    before = resident()
    pieces.clear()
    give_back()
    assert before - resident() > 2**25
    assert behind.all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_pieces_go_back_at_once_in_a_process_that_asked_for_that() -> None:
    """In one of its own: what the C library has been told stays so."""
    program = (
        "import torch; from mgvq.memory import map_large; from test_memory import resident; map_large()\n"
        "pieces = [torch.ones(2**18 + 2**14) for _ in range(64)]; behind = torch.ones(2**19)\n"
        "before = resident(); del pieces; print(before - resident())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 2**25


def resident() -> int:
    """Bytes of memory that the process has allocated."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])
