"""What was freed and what the C library keeps of it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mgvq.memory import give_back, in_file


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_put_into_a_file_is_the_same_and_can_be_written(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = in_file(tensor.T, tmp_path)
    assert torch.equal(kept, tensor.T)
    assert kept.dtype == dtype
    kept.mul_(2)
    assert torch.equal(kept, 2 * tensor.T)
    assert not list(tmp_path.iterdir()), "the file has no name"
    empty = torch.empty(0, 3)
    assert in_file(empty, tmp_path) is empty


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_put_into_files_takes_no_memory_of_the_process(tmp_path: Path) -> None:
    tensor, before = torch.ones(2**21), resident()
    kept = [in_file(tensor, tmp_path) for _ in range(8)]  # 64 MB
    assert resident() - before < 2**22
    assert all(one.all() for one in kept)


def test_a_full_disk_is_told_before_a_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        in_file(torch.ones(3), tmp_path)


def resident() -> int:
    """Bytes of memory that the process has allocated."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])
