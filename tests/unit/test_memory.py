"""What was freed and what the C library keeps of it."""

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


def resident() -> int:
    """Bytes of memory that the process has allocated."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])
