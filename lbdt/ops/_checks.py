"""Argument checks at the door. Values are read on the CPU only: elsewhere that would be a sync."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """ValueError unless `tensor` has the `expected` shape; `meaning` spells the axes."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected {meaning} = {list(expected)}, got {list(tensor.shape)}")


def dtype(name: str, tensor: Tensor, *expected: torch.dtype) -> None:
    """TypeError unless `tensor` has one of the `expected` dtypes."""
    if tensor.dtype not in expected:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in expected)
        raise TypeError(f"{name}: expected dtype {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")


def device(name: str, tensor: Tensor, x: Tensor, like: str = "x") -> None:
    """ValueError unless `tensor` lies where `x` does, which is called `like`."""
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} like {like}, got {tensor.device}")


def feature_map(x: Tensor) -> tuple[int, int, int]:
    """Batch, channels and patches of `x` [B, d, H, W] or [B, d, N]; raises on anything else."""
    dtype("x", x, *FLOATS)
    if x.dim() not in (3, 4):
        raise ValueError(f"x: expected [B, d, H, W] or [B, d, N], got shape {list(x.shape)}")
    patches = x.shape[2] if x.dim() == 3 else x.shape[2] * x.shape[3]
    return x.shape[0], x.shape[1], patches


def encoder(x: Tensor, width: int, weight: Tensor, bias: Tensor, k: int, least: int) -> None:
    """Checks `weight` [L, d], `bias` [L] and `k` in [least, L] against `x`."""
    if width == 0:
        raise ValueError("x: expected d >= 1 channels, got 0")
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(
            f"weight: expected [L, d] with d = {width} as in x, got {list(weight.shape)}; "
            "is this the SAE of another block?"
        )
    dtype("weight", weight, x.dtype)
    device("weight", weight, x)
    shape("bias", bias, (weight.shape[0],), "[L]")
    dtype("bias", bias, torch.float32, torch.float64)
    device("bias", bias, x)
    if not least <= k <= weight.shape[0]:
        raise ValueError(f"k: expected {least} <= k <= L = {weight.shape[0]}, got {k}")


def within(name: str, tensor: Tensor, count: int, meaning: str) -> None:
    """IndexError unless all values of a CPU `tensor` are in [0, count); other devices are not read."""
    if tensor.device.type != "cpu" or tensor.numel() == 0 or torch.compiler.is_compiling():
        return
    # A short list is read faster than it is reduced.
    values = tensor.flatten().tolist() if tensor.numel() <= 64 else [int(v) for v in torch.aminmax(tensor)]
    low, high = min(values), max(values)
    if low < 0 or high >= count:
        raise IndexError(f"{name}: expected values in [0, {count}) ({meaning}), got {low} to {high}")


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would have to go through an op on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def no_gradient(op: str, *tensors: Tensor | None, instead: str | None = None) -> None:
    """RuntimeError where autograd would be cut off silently; `instead`: what to call, if not the reference."""
    if wants_gradient(*tensors):
        raise RuntimeError(
            f"lbdt.ops.{op} has no gradient: call it under torch.no_grad(), or use {instead or f'lbdt.reference.{op}'}"
        )
