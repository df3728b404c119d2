"""Checkpoints of sdxl-unbox and Concept Steerers: `config.json` + `state_dict.pth` (METHOD.md, 7.2).

`pre = W_enc (x - pre_bias) + latent_bias`, TopK then ReLU: lbdt's "topk" under other names. `mean.pt` and `std.pt`,
which sdxl-unbox ships beside them, are statistics of the latents for its editing demo and are not read.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lbdt.formats.pth import read_pth
from lbdt.runs.files import check_tensors, json_bytes, read_json, require_floats
from lbdt.runs.folder import write_folder
from lbdt.runs.reading import brief, listed
from lbdt.sae.config import PRE_ENCODER, SAEConfig

if TYPE_CHECKING:
    from lbdt.sae.model import SparseAutoencoder

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "state_dict.pth"
_HYBRID_CONFIG = "cfg.json"
_KEYS = ("n_dirs_local", "d_model", "k", "auxk", "dead_steps_threshold", "auxk_coef")
_DEAD_STEPS = 2441
"""sdxl-unbox's own: 10 million rows in batches of 4096."""


def read_config(folder: Path) -> dict[str, Any]:
    """The settings beside `state_dict.pth`: `n_dirs_local`, `d_model` and `k` as positive integers, and the rest.

    SAEmnesia's loader wants them in a `cfg.json`, under these names or SAeUron's; both are taken.

    Raises:
        ValueError: no such file, unknown keys, a missing size.
    """
    path = folder / CONFIG_FILE
    if not path.is_file() and (folder / _HYBRID_CONFIG).is_file():
        path = folder / _HYBRID_CONFIG
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    if "d_in" in values:
        config = SAEConfig.from_json(values, source=str(path))
        if config.pre_encoder:
            raise ValueError(
                f"{path}: {PRE_ENCODER}: true, but {WEIGHTS_FILE} has no place for a pre-encoder; expected its "
                "tensors in sae.safetensors"
            )
        return {"n_dirs_local": config.num_latents, "d_model": config.d_in, "k": config.k}
    unknown = sorted(set(values) - set(_KEYS))
    if unknown:
        raise ValueError(f"{path}: unknown key {listed(unknown)} (known: {', '.join(_KEYS)})")
    for key in ("n_dirs_local", "d_model", "k"):
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {key}: expected an integer >= 1, got {brief(value)}")
    return values


def read(folder: Path, update: bool) -> tuple[SAEConfig, dict[str, Tensor]]:
    """The configuration and the tensors, by lbdt's names, of a folder; `update`: the SAE was trained on the block's
    output minus its input.

    Raises:
        ValueError: absent, damaged or refused files, missing, unknown, misshapen or non-finite tensors.
    """
    values = read_config(folder)
    n, d = values["n_dirs_local"], values["d_model"]
    path = folder / WEIGHTS_FILE
    state = read_pth(path)
    if isinstance(state, Mapping) and "models_state_dict" in state:
        raise ValueError(
            f"{path}: a checkpoint of the original G-SAE (language models), which normalises each input before "
            f"encoding; detection is defined on an affine encoder. Only the diffusion version (gsae) is read"
        )
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path}: expected a state_dict (names and tensors), got {type(state).__name__}")
    state = {name: tensor for name, tensor in state.items() if name != "stats_last_nonzero"}
    if "W_dec" in state:
        names = ("encoder.weight", "encoder.bias", "b_dec", "W_dec")
        shapes = dict(zip(names, ((n, d), (n,), (d,), (n, d)), strict=True))
    else:
        names = ("encoder.weight", "latent_bias", "pre_bias", "decoder.weight")
        shapes = dict(zip(names, ((n, d), (n,), (d,), (d, n)), strict=True))
    check_tensors(path, state, shapes)
    require_floats(path, state)
    weight, bias, pre_bias, decoder = (state[name].detach() for name in names)
    config = SAEConfig.from_json(
        {"d_in": d, "num_latents": n, "k": values["k"], "update": update}, source=str(folder)
    )
    tensors = {
        "encoder.weight": weight,
        "encoder.bias": bias,
        "b_dec": pre_bias,
        "W_dec": decoder if decoder.shape == (n, d) and "W_dec" in state else decoder.T,
    }
    return config, {name: tensor.contiguous() for name, tensor in tensors.items()}


def save_unbox(
    sae: SparseAutoencoder, directory: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> None:
    """Writes `sae` as sdxl-unbox does: `config.json` and `state_dict.pth`, both whole or not at all.

    `update` and `site` have no place in these files: sdxl-unbox reads every SAE as one of output minus input.

    Raises:
        ValueError: an activation other than topk, an SAE without its decoder or with a pre-encoder, NaN or infinite
            weights.
    """
    if sae.config.pre_encoder:
        raise ValueError(
            "sdxl-unbox files have no place for a pre-encoder; write lbdt's own files instead, which are SAEParate's"
        )
    if sae.config.activation != "topk" or sae.W_dec is None:
        raise ValueError(
            f"sdxl-unbox files hold a topk SAE with its decoder; got activation {sae.config.activation!r}"
            f"{'' if sae.W_dec is not None else ' and encoder_only'}; write lbdt's own files instead"
        )
    n, d = sae.config.num_latents, sae.config.d_in
    tensors: dict[str, Tensor] = {
        "pre_bias": sae.b_dec,
        "latent_bias": sae.encoder.bias,
        "stats_last_nonzero": torch.zeros(n, dtype=torch.int64),
        "encoder.weight": sae.encoder.weight,
        "decoder.weight": sae.W_dec.T,
    }
    state = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        cast = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        state[name] = cast.contiguous().clone()
    check_tensors(Path("state_dict"), state, {name: tuple(tensor.shape) for name, tensor in state.items()})
    data = io.BytesIO()
    torch.save({"state_dict": state}, data)
    config = {
        "n_dirs_local": n,
        "d_model": d,
        "k": sae.config.k,
        "auxk": None,
        "dead_steps_threshold": _DEAD_STEPS,
    }
    write_folder(Path(directory), {CONFIG_FILE: json_bytes(config), WEIGHTS_FILE: data.getvalue()})
