"""Training checkpoints: one safetensors file, replaced atomically, that names the run it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lbdt.runs.digests import marked, raw, sha256
from lbdt.runs.files import open_tensors, read_tensors, write_files
from lbdt.runs.reading import parse_json
from lbdt.runs.settings import require_same_settings
from lbdt.sae import SparseAutoencoder

_MOMENTS = ("exp_avg", "exp_avg_sq")


def write_checkpoint(
    path: Path,
    settings: dict[str, Any],
    sae: SparseAutoencoder,
    optimizer: torch.optim.Adam,
    state: dict[str, Tensor],
) -> None:
    """Parameters, Adam's moments and `state` (`step` among it)."""
    tensors = dict(state)
    for name, parameter in sae.named_parameters():
        tensors[name] = parameter.detach()
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    about = {"lbdt_training": json.dumps(settings, sort_keys=True), "sha256": _sha256(tensors)}
    write_files(path.parent, {path.name: safetensors.torch.save(tensors, metadata=about)})


def read_checkpoint(
    path: Path,
    settings: dict[str, Any],
    sae: SparseAutoencoder,
    shapes: dict[str, tuple[int, ...]],  # of the state
) -> dict[str, Tensor]:
    """What `write_checkpoint` wrote for a run of these settings.

    Raises:
        ValueError: unreadable, of a run of other settings, with other tensors, or not with the bytes that were written
            (checkpoints of older versions do not say which).
    """
    expected: dict[str, tuple[int | None, ...]] = dict(shapes)
    for name, parameter in sae.named_parameters():
        for prefix in ("", *(f"{moment}." for moment in _MOMENTS)):
            expected[prefix + name] = tuple(parameter.shape)
    advice = "delete it to start again"
    with open_tensors(path, "a training checkpoint", advice, "not a readable training checkpoint") as file:
        about = file.metadata() or {}
    written = parse_json(about.get("lbdt_training", "{}"), f"{path}: lbdt_training", f"; {advice}")
    require_same_settings(
        path,
        written,
        settings,
        "the checkpoint belongs to a run with another {names}; delete it, or pass the settings it was made with",
    )
    tensors = read_tensors(path, expected)
    if about.get("sha256") not in (None, _sha256(tensors)):
        raise ValueError(
            f"{path}: damaged, its tensors are not those that were written; delete it to start again"
        )
    return tensors


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    return sha256(marked(part for name in sorted(tensors) for part in (name, tensors[name])))


def load_state(sae: SparseAutoencoder, optimizer: torch.optim.Adam, saved: dict[str, Tensor]) -> None:
    """Parameters and Adam's moments of a checkpoint, onto the parameters' device."""
    for name, parameter in sae.named_parameters():
        parameter.data.copy_(saved[name])
        optimizer.state[parameter] = {
            "step": saved["step"].float().to(parameter.device),
            **{moment: saved[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS},
        }


def digest(sae: SparseAutoencoder) -> str:
    """SHA-256 of an SAE's weights, which says what a run started from."""
    return sha256(piece for name, tensor in sae.state_dict().items() for piece in (name, raw(tensor.float())))
