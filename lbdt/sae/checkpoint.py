"""Checkpoint files: `cfg.json` + `sae.safetensors`, strict to read, atomic to write; no pickles."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from lbdt.files import json_bytes, read_json, read_tensors, tensor_bytes, write_files
from lbdt.hub import resolve_folder
from lbdt.sae.config import SAEConfig
from lbdt.sae.model import SparseAutoencoder

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
FORMATS = ("auto", "lbdt", "saeuron", "sdxl-unbox")


def save(
    sae: SparseAutoencoder,
    directory: str | os.PathLike[str],
    encoder_only: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes `sae` to `directory` (made if needed), readable by SAeUron's own loader when the activation is
    topk.

    `encoder_only` leaves `W_dec` out; `dtype` (float16, bfloat16, float32) casts the weights. Both files are
    written beside their final names first and then renamed, so a crash leaves the old files or the new ones,
    no half file.

    Raises:
        ValueError: NaN or infinite weights, or weights that overflow `dtype`.
    """
    without_decoder = encoder_only or sae.W_dec is None
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in sae.state_dict().items()
        if not (without_decoder and name == "W_dec")
    }
    write_files(
        Path(directory),
        {
            CONFIG_FILE: json_bytes(replace(sae.config, encoder_only=without_decoder).to_json()),
            WEIGHTS_FILE: tensor_bytes(tensors, dtype),
        },
    )


def load(
    path_or_repo: str | os.PathLike[str], hookpoint: str | None = None, format: str = "auto"
) -> SparseAutoencoder:
    """The SAE in a folder, or in a Hugging Face repository (`owner/name`; offline mode is honoured).

    `hookpoint` names a subfolder (SAeUron keeps one per hook point). The weights come back in float32,
    whatever the file's dtype, without gradients; cast with `.half()` where the pipeline is in half precision.

    Raises:
        ValueError: anything absent, unreadable, of another shape, NaN or infinite; the text names it and says
            what was expected. sdxl-unbox checkpoints (pickles) are refused.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}; got {format!r}")
    folder = resolve_folder(path_or_repo, hookpoint, marker=CONFIG_FILE, files=(CONFIG_FILE, WEIGHTS_FILE))
    pickled = sorted(path.name for path in folder.glob("state_dict.pth"))
    if format == "sdxl-unbox" or (pickled and not (folder / CONFIG_FILE).exists()):
        raise ValueError(
            f"{folder}: sdxl-unbox checkpoints (config.json + state_dict.pth, a pickle) are not read here; "
            f"expected {CONFIG_FILE} and {WEIGHTS_FILE}. Convert the checkpoint to safetensors first"
        )
    config = SAEConfig.from_json(read_json(folder / CONFIG_FILE), source=str(folder / CONFIG_FILE))
    with torch.device("meta"):
        sae = SparseAutoencoder(config)
    expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    tensors = read_tensors(folder / WEIGHTS_FILE, expected)
    sae.load_state_dict(tensors, assign=True)
    return sae.float().requires_grad_(False).eval()
