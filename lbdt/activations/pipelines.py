"""Loading the pipeline whose activations are read or changed."""

from __future__ import annotations

import os
from typing import Any

import torch


def load_pipeline(path_or_repo: str | os.PathLike[str], device: torch.device) -> Any:
    """The diffusers pipeline of a folder or Hub repository, on `device`; half precision on a GPU."""
    from diffusers import DiffusionPipeline

    # On a CPU half precision is slow or absent.
    half = {"torch_dtype": torch.float16} if device.type == "cuda" else {}
    return DiffusionPipeline.from_pretrained(os.fspath(path_or_repo), **half).to(device)
