"""The device that a setting names, if this machine has it."""

import torch

from mgvq.checks import told_as
from mgvq.errors import UserError


def find_device(name: str | torch.device) -> torch.device:
    """The device; `auto` is an accelerator where there is one, else the CPU. Raises UserError for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with told_as(f"device={name} is none that this torch has", "Give auto, cpu, cuda or cuda:1."):
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)  # raises for names of other builds of torch
    if device.type == "cuda":
        number = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= number:
            here = f"{number} accelerators, the first cuda:0" if number else "no accelerator that torch can use"
            raise UserError(
                f"device={name}: this machine has {here}. Give device=cpu, or auto, which takes one where there is one."
            )
    return device
