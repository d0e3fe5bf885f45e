"""The device of a run, told without importing torch: runs are named by it, and planned where nothing of torch is loaded."""

import ctypes
import functools
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from mgvq.errors import UserError

_NAMES = re.compile(r"auto|cpu|cuda(:\d+)?")


def device_name(setting: object) -> str:
    """The setting as torch takes it (`cpu`, `cuda`, `cuda:N`); `auto` is `cuda` where this machine has one that torch can use.

    Raises UserError for any other setting.
    """
    if not (isinstance(setting, str) and _NAMES.fullmatch(setting)):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {setting!r}")
    if setting != "auto":
        return setting
    return "cuda" if _has_cuda() else "cpu"


def device_type(setting: object) -> Literal["cpu", "cuda"]:
    """The kind of device: it moves the last digits of a run, while the number of the device among several does not."""
    return "cuda" if device_name(setting).startswith("cuda") else "cpu"


@functools.cache
def _has_cuda() -> bool:
    """Asks NVIDIA's management library, as torch itself can do: unlike CUDA, it may be asked before a process forks."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1") or not _torch_has_cuda():
        return False
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    number = ctypes.c_uint(0)
    if library.nvmlInit_v2() != 0:
        return False
    known = library.nvmlDeviceGetCount_v2(ctypes.byref(number)) == 0
    library.nvmlShutdown()
    return known and number.value > 0


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built with CUDA, as its file of versions says."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    text = file.read_text() if file and file.is_file() else ""
    return re.search(r"^cuda\b.*=\s*['\"]", text, re.MULTILINE) is not None
