"""Argument checks at the door. Values are read on the CPU only: elsewhere that would be a sync."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lbdt.donors import SOURCES

_STRIDED = torch.strided
_OPTIONAL = (
    *("minus", "bank", "avoid", "sums", "owners", "least", "deciding", "gated", "so_far"),
    *("known_latents", "known_thresholds", "schedule", "run_sums", "run_last", "run_count"),
    *("codes", "bounds", "centre", "order"),
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensors(check: Callable[..., Any]) -> Callable[..., Any]:
    """`check`, with a TypeError that names the argument where None, which schemas let pass, is no tensor."""
    names = check.__code__.co_varnames[: check.__code__.co_argcount]

    @functools.wraps(check)
    def checked(*arguments):
        try:
            return check(*arguments)
        except AttributeError as error:
            for name, value in zip(names, arguments, strict=True):
                if value is None and name not in _OPTIONAL:
                    raise TypeError(f"{name}: expected a tensor, got None") from error
            raise

    return checked


def shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """ValueError unless `tensor` has the `expected` shape; `meaning` spells the axes."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected {meaning} = {list(expected)}, got {list(tensor.shape)}")


def dtype(name: str, tensor: Tensor, *expected: torch.dtype) -> None:
    """TypeError unless `tensor` is dense and has one of the `expected` dtypes."""
    if tensor.layout is not _STRIDED:
        raise TypeError(
            f"{name}: expected a dense tensor, got layout {tensor.layout}; pass {name}.to_dense()"
        )
    if tensor.dtype not in expected:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in expected)
        raise TypeError(f"{name}: expected dtype {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")


def device(name: str, tensor: Tensor, x: Tensor, like: str = "x") -> None:
    """ValueError unless `tensor` lies where `x` does, which is called `like`."""
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} like {like}, got {tensor.device}")


def target(name: str, tensor: Tensor, kind: torch.dtype, x: Tensor, like: str = "x") -> None:
    """Checks a buffer of this dtype that is written in place, on the device of `x`, which is called `like`."""
    dtype(name, tensor, kind)
    device(name, tensor, x, like)
    contiguous(name, tensor)


def contiguous(name: str, tensor: Tensor) -> None:
    """ValueError unless the elements of `tensor` lie one after another."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected contiguous memory, got strides {list(tensor.stride())}")


def feature_map(x: Tensor) -> tuple[int, int, int]:
    """Batch, channels and patches of `x` [B, d, H, W] or [B, d, N]; raises on anything else."""
    dtype("x", x, *FLOATS)
    if x.dim() not in (3, 4):
        raise ValueError(f"x: expected [B, d, H, W] or [B, d, N], got shape {list(x.shape)}")
    patches = x.shape[2] if x.dim() == 3 else x.shape[2] * x.shape[3]
    return x.shape[0], x.shape[1], patches


def grid(x: Tensor, height: int, width: int) -> None:
    """ValueError unless that is the grid of `x` [B, d, H, W], or one of the patches of [B, d, N]."""
    own, patches = tuple(x.shape[2:]) if x.dim() == 4 else None, x.shape[2:].numel()
    if height < 0 or width < 0 or height * width != patches or (own and own != (height, width)):
        given = f"x has {list(own)}" if own else f"x has {patches} patches"
        raise ValueError(f"height, width: expected x's grid, got {height} x {width}, but {given}")


def donors(padding: int, source: str) -> None:
    """ValueError unless donors can be chosen by these."""
    if padding < 0:
        raise ValueError(f"padding: expected >= 0, got {padding}")
    if source not in SOURCES:
        raise ValueError(f"source: expected one of {', '.join(SOURCES)}, got {source!r}")


def buffers(
    like: Tensor, named: str, sizes: int, rows: Tensor, cells: Tensor, written: Tensor, fields: int
) -> None:
    """Checks the ring buffers, whose rows have so many `fields`, on the device of `like`, which is called `named`."""
    shape("written", written, (2,), "[2]")
    if rows.dim() != 2 or rows.shape[0] == 0 or rows.shape[1] != fields:
        raise ValueError(f"rows: expected [R >= 1, {fields}], got {list(rows.shape)}")
    if cells.dim() != 1:
        raise ValueError(f"cells: expected [C], got {list(cells.shape)}")
    for name, tensor, kind in (
        ("rows", rows, torch.int64),
        ("cells", cells, torch.uint8),
        ("written", written, torch.int64),
    ):
        target(name, tensor, kind, like, named)
    if not 0 <= sizes < 1 << 63:
        raise ValueError(f"sizes: expected 0 <= sizes < 2**63, got {sizes}")


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


def gate(
    x: Tensor,
    union: int,
    bins: int,
    owners: Tensor | None,
    least: Tensor | None,
    least_of: int,
    deciding: Tensor | None,
    gated: Tensor | None,
    so_far: Tensor | None,
    most: int,
) -> None:
    """Checks the gate's arguments of `detect_patches` on `x` with U = `union` and T = `bins`, on maps of up to `most`
    patches."""
    for name, tensor in (("owners", owners), ("least", least)):
        if tensor is None:
            raise ValueError(f"{name}: expected a tensor, as the gate needs owners and least, got None")
    shape("owners", owners, (union,), "[U]")
    if least.dim() != 2 or least.shape[0] != bins or least.shape[1] == 0:
        raise ValueError(f"least: expected [T, C >= 1] with T = {bins}, got {list(least.shape)}")
    if not 0 <= least_of <= most:
        raise ValueError(f"least_of: expected 0 <= least_of <= {most}, got {least_of}")
    given = [("owners", owners), ("least", least)]
    for name, tensor in (("deciding", deciding), ("gated", gated)):
        if tensor is not None:
            shape(name, tensor, (x.shape[0],), "[B]")
            given.append((name, tensor))
    if so_far is not None:
        shape("so_far", so_far, (x.shape[0], least.shape[1] + 1), "[B, C + 1]")
        given.append(("so_far", so_far))
    for name, tensor in (("gated", gated), ("so_far", so_far)):
        if tensor is not None:
            contiguous(name, tensor)
    for name, tensor in given:
        dtype(name, tensor, torch.int64)
        device(name, tensor, x)


def within(name: str, tensor: Tensor, count: int, meaning: str) -> None:
    """IndexError unless all values of a CPU `tensor` are in [0, count); other devices are not read."""
    if tensor.device.type != "cpu" or tensor.numel() == 0 or torch.compiler.is_compiling():
        return
    # A short list is read faster than it is reduced.
    values = tensor.flatten().tolist() if tensor.numel() <= 64 else [int(v) for v in torch.aminmax(tensor)]
    low, high = min(values), max(values)
    if low < 0 or high >= count:
        raise IndexError(f"{name}: expected values in [0, {count}) ({meaning}), got {low} to {high}")


def shares_elements(x: Tensor) -> bool:
    """Whether two places of `x` are one element in memory; exact, and quick for what is laid out in order."""
    if x.is_contiguous() or x.numel() == 0:
        return False
    span, axes = 1, [(stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    ordered = True
    for stride, size in sorted(axes):
        ordered = ordered and stride >= span
        span += stride * (size - 1)
    if ordered:
        return False
    if span < x.numel():
        return True
    places = torch.zeros(1, dtype=torch.int64)
    for stride, size in axes:
        places = (places[:, None] + torch.arange(0, stride * size, stride)).flatten()
    return places.unique().numel() < places.numel()


def own_memory(written: dict[str, Tensor], *others: Tensor) -> None:
    """RuntimeError, as torch raises it, where a `written` tensor shares memory with another one of these."""
    spans = [_span(tensor) for tensor in (*written.values(), *others)]
    for place, name in enumerate(written):
        start, end = spans[place]
        if any(max(start, a) < min(end, b) for i, (a, b) in enumerate(spans) if i != place):
            raise RuntimeError(
                f"{name}: it is written, and shares memory with another argument; pass a clone"
            )


def alone(
    run: Callable[..., Tensor], *, names: tuple[str, ...], written: tuple[str, ...]
) -> Callable[..., Tensor]:
    """`run`, whose arguments have these names, on `written` ones that are None or share no memory with any other."""

    def checked(*arguments) -> Tensor:
        named = dict(zip(names, arguments, strict=True))
        targets = {name: named.pop(name) for name in written}
        others = [value for value in named.values() if isinstance(value, Tensor)]
        own_memory({name: value for name, value in targets.items() if value is not None}, *others)
        return run(*arguments)

    return checked


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first element of `tensor` to the end of the last one."""
    start = tensor.data_ptr()
    if tensor.is_contiguous() or tensor.numel() == 0:
        return start, start + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would have to go through an op on these."""
    return torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors)


def no_gradient(op: str, *tensors: Tensor | None, instead: str | None = None) -> None:
    """RuntimeError where autograd would be cut off silently; `instead`: what to call, if not the reference."""
    if wants_gradient(*tensors):
        raise RuntimeError(
            f"lbdt.ops.{op} has no gradient: call it under torch.no_grad(), or use {instead or f'lbdt.reference.{op}'}"
        )


def screen(
    codes: Tensor | None,
    bounds: Tensor | None,
    centre: Tensor | None,
    order: Tensor | None,
    weight: Tensor,
    sizes: tuple[int, int],
) -> None:
    """ValueError or TypeError unless these are None, or have the sizes of a screen of `weight` [L, d]: so many bounds,
    and codes padded to a multiple of the second of `sizes`; and `order` is None, or a place for each latent. Places are
    looked at where they are used."""
    if order is not None:
        shape("order", order, (weight.shape[0],), "[L]")
        dtype("order", order, torch.int64)
        device("order", order, weight)
        contiguous("order", order)
    given = {"codes": codes, "bounds": bounds, "centre": centre}
    if all(tensor is None for tensor in given.values()):
        return
    if any(tensor is None for tensor in given.values()):
        raise ValueError(
            "codes, bounds, centre: expected all that lbdt.int8_screen.Screen.of makes, or none of them"
        )
    latents, width = weight.shape
    shapes = (latents, -(-width // sizes[1]) * sizes[1]), (sizes[0], latents), (width,)
    kinds = torch.int8, torch.float32, torch.float32
    for (name, tensor), expected, kind in zip(given.items(), shapes, kinds, strict=True):
        shape(name, tensor, expected, "that of a screen of weight")
        dtype(name, tensor, kind)
        device(name, tensor, weight)
        contiguous(name, tensor)
