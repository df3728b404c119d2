"""The pipeline whose activations are read or changed: loading it, and telling it from another one by a few bytes."""

from __future__ import annotations

import inspect
import json
import os
from typing import Any

import torch
from torch import nn

from lbdt.hooks.lookup import unwrap
from lbdt.runs.digests import sha256

_ELEMENTS = 64


def load_pipeline(path_or_repo: str | os.PathLike[str], device: torch.device) -> Any:
    """The diffusers pipeline of a folder or Hub repository, on `device`; half precision on a GPU."""
    from diffusers import DiffusionPipeline

    # On a CPU half precision is slow or absent.
    half = {"torch_dtype": torch.float16} if device.type == "cuda" else {}
    return DiffusionPipeline.from_pretrained(os.fspath(path_or_repo), **half).to(device)


def cut_off(pipe: Any, prompt: str) -> tuple[int, int] | None:
    """(tokens of the prompt, tokens that are read) where the pipeline would leave the rest out, by the first tokenizer
    of it that reads fewer; None: it reads all."""
    given = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    least = given.default if given is not None and isinstance(given.default, int) else None
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is None:
            continue
        most = tokenizer.model_max_length if least is None else min(tokenizer.model_max_length, least)
        tokens = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if tokens > most:
            return tokens, most
    return None


def package_versions() -> dict[str, str]:
    """The versions of lbdt and of what its pipelines compute with, by the names of the packages."""
    import diffusers
    import transformers

    import lbdt

    return {package.__name__: package.__version__ for package in (lbdt, torch, diffusers, transformers)}


def fingerprint(pipe: Any) -> dict[str, str]:
    """SHA-256 of every component, by its name: of its class and settings, a tokenizer's vocabulary, and of a model's
    parameters and buffers the names, shapes, dtypes and 64 evenly spaced elements each.

    Not a proof of equality: two models that differ in few weights only may look alike.
    """
    return {
        name: digest_of_module(part) for name, part in sorted(pipe.components.items()) if part is not None
    }


def digest_of_module(part: Any) -> str:
    """SHA-256 of one component, as in `fingerprint`."""
    part = unwrap(part) if isinstance(part, nn.Module) else part
    about = {"class": type(part).__name__, "config": _plain(getattr(part, "config", None))}
    if hasattr(part, "get_vocab"):
        about["vocabulary"] = sorted(part.get_vocab().items())
    pieces: list[str | bytes] = [json.dumps(about, sort_keys=True, default=str)]
    if isinstance(part, nn.Module):
        for name, tensor in sorted([*part.named_parameters(), *part.named_buffers()]):
            name = ".".join(piece for piece in name.split(".") if piece != "_orig_mod")
            pieces += [f"{name} {tuple(tensor.shape)} {tensor.dtype}", _elements(tensor)]
    return sha256(pieces)


def _elements(tensor: torch.Tensor) -> bytes:
    # Weights that are streamed from elsewhere during a call are not here to be read.
    if tensor.is_meta or not tensor.numel():
        return b""
    flat = tensor.detach().flatten()
    return flat[:: -(-flat.numel() // _ELEMENTS)].double().cpu().numpy().tobytes()


def _plain(config: Any) -> dict[str, Any] | None:
    """Settings without the versions and paths that loading and saving leave in them."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not hasattr(config, "items"):
        return None
    return {key: value for key, value in config.items() if key[:1] != "_" and key != "transformers_version"}
