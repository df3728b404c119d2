"""Adapters: the tensor inside a block's output, and its patches on their grid."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn


def place_of(module: nn.Module) -> int:
    """Where in a tuple that a block returns its feature map is: some transformer blocks return their text stream
    first."""
    if type(module).__module__.startswith("diffusers."):
        from diffusers.hooks._helpers import TransformerBlockRegistry

        try:
            return TransformerBlockRegistry.get(type(module)).return_hidden_states_index or 0
        except ValueError:  # not one of diffusers' transformer blocks
            return 0
    return 0


def tensor_of(output: Any, place: int = 0) -> Tensor:
    """The feature map in what a block returned: a tensor, the one at `place` of a tuple, or a ModelOutput's first
    field.

    Raises TypeError for anything else.
    """
    if isinstance(output, Tensor):
        return output
    first = None
    if isinstance(output, tuple) and len(output) > place:
        first = output[place]
    elif isinstance(output, dict) and output:
        first = next(iter(output.values()))
    if not isinstance(first, Tensor):
        raise TypeError(
            f"hookpoint: its block returned {type(output).__name__}; expected a tensor, or a tuple or ModelOutput "
            "that begins with one. Hook another block"
        )
    return first


def with_tensor(output: Any, tensor: Tensor, place: int = 0) -> Any:
    """`output` with its feature map exchanged for `tensor`; the given object is not changed."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple):
        return (*output[:place], tensor, *output[place + 1 :])
    key = next(iter(output))
    return type(output)(**{**output, key: tensor})


def to_patches(x: Tensor, width: int) -> Tensor:
    """`x` [B, d, H, W] as it is, or [B, N, d] as a view [B, d, N]; ValueError unless d is `width`."""
    if x.dim() == 3 and x.shape[2] == width:
        return x.transpose(1, 2)
    if x.dim() == 4 and x.shape[1] == width:
        return x
    raise ValueError(
        f"hookpoint: its block returned a tensor of shape {tuple(x.shape)}; expected [B, {width}, H, W] or "
        f"[B, N, {width}] for an SAE of width {width}"
    )


def from_patches(patches: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_patches` for a result of the same layout."""
    return patches.transpose(1, 2) if like.dim() == 3 else patches


def grid_of(x: Tensor, parent: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the patches of `x` [B, d, H, W] or [B, d, N]; for the latter from the block around it.

    Raises ValueError where there is none and N is no square.
    """
    if x.dim() == 4:
        return x.shape[2], x.shape[3]
    patches = x.shape[2]
    if parent is not None and parent[0] * parent[1] == patches:
        return parent
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(
            f"hookpoint: its block returned {patches} patches without a grid, and {patches} is no square; hook the "
            "attention block around it"
        )
    return side, side
