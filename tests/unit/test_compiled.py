"""Compiled loops beside torch."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
torch.set_num_threads(1)
torch.get_num_threads()  # as any operation, it makes the number hold: before that torch asks again
import numba
from mgvq.compiled import set_num_threads
from mgvq.trellis.code import trellis_code
from mgvq.trellis.coding import encode
set_num_threads({number})
encode(torch.randn(70, 64), trellis_code(2.0, 8))
print(torch.get_num_threads(), numba.get_num_threads())
"""


@pytest.mark.parametrize("number", [1, 2])
def test_torch_keeps_its_number_of_threads(number: int):
    """OpenMP is torch's: numba's OpenMP layer would set torch's number to that of the cores, whatever a run asks for."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}  # whatever cores there are
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(number=number)], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == ["1", str(number)], done.stderr
