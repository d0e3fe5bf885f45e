"""Where a run's numbers came from: code, versions, machine."""

import hashlib
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import mgvq
from mgvq.digest import file_digest
from mgvq.runs.places import checkout

_PACKAGES = ("torch", "torchvision", "transformers", "lmms-eval", "hydra-core", "numpy", "scikit-learn", "safetensors")


def provenance() -> dict[str, Any]:
    """The version of mgvq, the commit and a digest of what differs from it, new files of mgvq/ and conf/ too (None where nothing
    does, and outside of a git checkout), versions of packages and hardware; no part of the identity."""
    return {
        "version": mgvq.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _digest(_changes()),
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in _PACKAGES},
        "machine": {"platform": platform.platform(), "cpu": _cpu(), "gpu": _gpu()},
    }


def _git(*arguments: str) -> str | None:
    root = checkout()
    if root is None or not (root / ".git").exists():  # an unpacked archive may lie in a repository that is another one
        return None
    try:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _changes() -> str | None:
    """What differs from the commit: the diff of the files that git knows, then name and digest of every other file of the code.

    A new module is part of what a run did, and git's diff leaves it out. Empty where nothing differs, None outside of a checkout.
    """
    root, diff = checkout(), _git("diff", "HEAD")
    if root is None or diff is None:
        return None
    new = _git("ls-files", "-z", "--others", "--exclude-standard", "--", "mgvq", "conf") or ""
    return "\n".join(filter(None, [diff, *(f"{name} {file_digest(root / name)}" for name in new.split("\0") if name)]))


def _digest(text: str | None) -> str | None:
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
