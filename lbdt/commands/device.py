"""The `--device` of every command."""

from __future__ import annotations

import torch


def usable_device(name: str) -> torch.device:
    """The device of this name; "auto": CUDA where there is one. ValueError where it is not usable here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise NotImplementedError("its tensors have no values")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"--device {name}: not usable here ({first}); `lbdt env` lists the devices"
        ) from error
    return device
