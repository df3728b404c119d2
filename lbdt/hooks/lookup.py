"""The way from a pipeline and a hookpoint's name to the module, with errors that list what there is.

A hookpoint begins with the component that the denoiser is: "unet" or "transformer".
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from torch import nn

_ATTENTION_BLOCKS = ("Transformer2DModel", "DualTransformer2DModel", "TransformerTemporalModel")
_ORDER = {
    "down_blocks": 0,
    "mid_block": 1,
    "up_blocks": 2,
    "transformer_blocks": 0,
    "single_transformer_blocks": 1,
}
_TRANSFORMERS = {
    "SD3Transformer2DModel": ("time_text_embed", "pos_embed"),
    "FluxTransformer2DModel": ("time_text_embed", None),
    "PixArtTransformer2DModel": ("adaln_single", "pos_embed"),
}
"""The transformers that are known: of each, the module that is called with the timesteps of all rows, on the
scheduler's scale, and the one that makes patches of the latents [B, C, H, W]; None: these come as patches."""


class Denoiser(NamedTuple):
    """The module that a pipeline calls at every step, with what tells its hooks of a call."""

    root: str
    """The component: "unet" | "transformer"."""
    module: nn.Module
    times: nn.Module
    """Called once a denoiser call with the timesteps [B] as its first argument."""
    patches: nn.Module | None
    """Called with the latents [B, C, H, W] that it cuts into patches; None where blocks know their grid."""


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and (distributed) data-parallel wrappers."""
    while True:
        if "_orig_mod" in module._modules:
            module = module._modules["_orig_mod"]
        elif type(module).__name__ in ("DistributedDataParallel", "DataParallel"):
            module = module.module
        else:
            return module


def find_unet(pipe: object) -> nn.Module:
    """The pipeline's UNet, unwrapped.

    Raises:
        TypeError: `pipe` is not a pipeline.
        ValueError: it has no UNet, or one that does not embed timesteps by `time_proj`.
    """
    components = _components(pipe)
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, nn.Module):
        raise ValueError(
            f"pipe: {type(pipe).__name__} has no UNet (its components: {', '.join(sorted(components)) or 'none'}); "
            "expected a pipeline with a component 'unet', such as StableDiffusionPipeline"
        )
    unet = unwrap(unet)
    if not isinstance(getattr(unet, "time_proj", None), nn.Module):
        raise ValueError(
            f"pipe: its UNet ({type(unet).__name__}) has no module time_proj, from which the timestep of a call is "
            "read; expected a diffusers UNet such as UNet2DConditionModel"
        )
    return unet


def find_denoiser(pipe: object) -> Denoiser:
    """The pipeline's UNet or transformer, unwrapped.

    Raises:
        TypeError: `pipe` is not a pipeline.
        ValueError: it has neither, a UNet as `find_unet` says, or a transformer that is not known.
    """
    components = _components(pipe)
    transformer = getattr(pipe, "transformer", None)
    if isinstance(getattr(pipe, "unet", None), nn.Module):
        unet = find_unet(pipe)
        return Denoiser("unet", unet, unet.time_proj, None)
    if not isinstance(transformer, nn.Module):
        raise ValueError(
            f"pipe: {type(pipe).__name__} has no UNet and no transformer (its components: "
            f"{', '.join(sorted(components)) or 'none'}); expected a pipeline with a component 'unet' or "
            "'transformer', "
            "such as StableDiffusionPipeline"
        )
    transformer = unwrap(transformer)
    name = type(transformer).__name__
    if name not in _TRANSFORMERS:
        raise ValueError(
            f"pipe: how {name} is called with timesteps and patches is not known to lbdt; expected one of "
            f"{', '.join(_TRANSFORMERS)}, or a UNet"
        )
    times, patches = _TRANSFORMERS[name]
    cut = None if patches is None else getattr(transformer, patches)
    return Denoiser("transformer", transformer, getattr(transformer, times), cut)


def _components(pipe: object) -> dict:
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}")
    return components


def hookpoints(denoiser: nn.Module, root: str = "unet") -> list[str]:
    """The names of the attention blocks, in the order of the modules."""
    return [
        f"{root}.{_plain(name)}" for name, module in denoiser.named_modules() if _is_attention(module, name)
    ]


def find_block(
    denoiser: nn.Module, hookpoint: str, argument: str = "hookpoint", expected: str = "unet"
) -> nn.Module:
    """The module at `hookpoint`, e.g. "unet.up_blocks.1.attentions.1".

    Raises:
        ValueError: no such module, or one that is never called (the denoiser itself, a list of blocks); lists the
            attention blocks and the nearest name.
    """
    module: nn.Module | None = denoiser
    root, *parts = hookpoint.split(".")
    if root != expected or not parts:
        module = None
    for part in parts:
        module = None if module is None else unwrap(module)._modules.get(part)
    if module is None or type(module).forward is nn.Module.forward or isinstance(module, nn.ModuleList):
        known = hookpoints(denoiser, expected)
        kind = "UNet" if expected == "unet" else expected
        near = difflib.get_close_matches(hookpoint, known, n=1, cutoff=0.5)
        hint = f" did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{argument}: the {kind} has no block {hookpoint!r};{hint} Attention blocks: {', '.join(known) or 'none'}"
        )
    return unwrap(module)


def grid_parent(denoiser: nn.Module, hookpoint: str) -> nn.Module | None:
    """The attention block [B, d, H, W] around a hookpoint inside it, whose output [B, N, d] lacks the grid."""
    module, found = denoiser, None
    for part in hookpoint.split(".")[1:]:
        module = unwrap(module)
        if _is_attention(module):
            found = module
        module = module._modules[part]
    return found


def channels(block: nn.Module) -> int | None:
    """The width d of a block's output as its own attributes state it; None where none does."""
    for name in ("out_channels", "in_channels", "dim", "out_dim"):
        value = getattr(block, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    for name in ("proj_out", "proj_in", "norm"):
        part = getattr(block, name, None)
        for size in ("out_channels", "out_features", "num_channels"):
            if isinstance(getattr(part, size, None), int):
                return getattr(part, size)
    return None


def runs_before(first: str, second: str) -> bool | None:
    """Whether block `first` runs before `second` in a UNet call; None where the names do not tell."""
    keys = [_position(name) for name in (first, second)]
    return None if None in keys else keys[0] < keys[1]


def _position(hookpoint: str) -> tuple | None:
    parts = hookpoint.split(".")[1:]
    if not parts or parts[0] not in _ORDER:
        return None
    return (_ORDER[parts[0]], *(int(part) for part in parts if re.fullmatch(r"\d+", part)))


def _is_attention(module: nn.Module, name: str = "") -> bool:
    if type(module).__name__ in _ATTENTION_BLOCKS:
        return True
    parts = _plain(name).split(".")
    return len(parts) == 2 and parts[0] in ("transformer_blocks", "single_transformer_blocks")


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))
