"""The device of a run, told without importing torch: runs are named by it, and planned where nothing of torch is loaded."""

import ctypes
import functools
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from mgvq.errors import SharedFault, UserError

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


def check_device(setting: object) -> None:
    """Raises SharedFault for CUDA where this machine certainly has none; `find_device`, which has torch, asks again."""
    nodes = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/kfd", "/dev/dxg")  # of NVIDIA, Jetson, ROCm, WSL
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if device_type(setting) == "cuda" and (
        hidden or not _torch_has("cuda", "hip") or not any(Path(node).exists() for node in nodes)
    ):
        why = "CUDA_VISIBLE_DEVICES hides all" if hidden else "this machine has no accelerator that torch can use"
        raise SharedFault(f"device={setting}: {why}. Give device=cpu, or auto, which takes an accelerator where there is one.")


@functools.cache
def _has_cuda() -> bool:
    """Asks NVIDIA's management library, as torch can do: unlike CUDA itself it may be asked before a process forks."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1") or not _torch_has("cuda"):
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


def _torch_has(*builds: str) -> bool:
    """Whether the installed torch was built with one of them, as a file of it says."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    text = file.read_text(encoding="utf-8") if file and file.is_file() else ""
    return any(re.search(rf"^{build}\b.*=\s*['\"]", text, re.MULTILINE) for build in builds)
