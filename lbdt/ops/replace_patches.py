"""`lbdt::replace_patches`: overwrites the masked patches' embeddings with others of the same feature map."""

from collections.abc import Callable

import torch
from torch import Tensor

from lbdt import _build, reference
from lbdt.donors import SOURCES, DonorSource
from lbdt.ops import _checks, _dispatch

# csrc/cuda/replace_patches.cu: its fixed part of a block's shared memory, and what of it every GPU has.
_FIXED_BYTES = 16 << 10
_ANY_GPU = 48 << 10

_dispatch.define(
    "replace_patches(Tensor x, Tensor mask, Tensor u, int height, int width, int padding=0, "
    "str source='random', Tensor? bank=None, Tensor? avoid=None, *, str backend='') -> (Tensor, Tensor)"
)
_dispatch.define(
    "replace_patches_(Tensor(a!) x, Tensor mask, Tensor u, int height, int width, int padding=0, "
    "str source='random', Tensor? bank=None, Tensor? avoid=None, *, str backend='') -> Tensor"
)
# x is [B, d, H, W]; source is an index into SOURCES.
_dispatch.define_internal(
    "replace_patches_cpp(Tensor x, Tensor mask, Tensor u, Tensor? bank, Tensor? avoid, int padding, "
    "int source, Tensor(a!) out, Tensor(b!) replaced) -> ()"
)
_dispatch.define_internal(
    "replace_patches_cpp_(Tensor(a!) x, Tensor mask, Tensor u, Tensor? bank, Tensor? avoid, int padding, "
    "int source, Tensor(b!) replaced) -> ()"
)


def replace_patches(
    x: Tensor,  # [B, d, H, W] or [B, d, N]
    mask: Tensor,  # [B, N]
    u: Tensor,  # [B, N]
    height: int,
    width: int,
    padding: int = 0,
    source: str = "random",
    bank: Tensor | None = None,  # [B, M, d]
    avoid: Tensor | None = None,  # [B, N]
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # like x, [B, N]
    """Patch Embedding Replacement: the masked patches take embeddings of patches outside the mask.

    Eq.: METHOD.md, 4.1, 4.2 and 4.4; arXiv 2606.31699.

    Args:
        x: float32 | float16 | bfloat16 | float64, any strides.
        mask: bool, the detected patches.
        u: float32 in [0, 1), one number a patch (`patch_uniform`). NaN and what is below count as 0, what is
            above as the number just below 1.
        height, width: the grid; height * width = N.
        padding: the mask grows by this Chebyshev distance first, >= 0.
        source: "random": `free[floor(u * n_free)]`; "nearest": the nearest free patch; "mean": the mean of
            the 5 nearest, in float32; "row": the nearest free patch of the same row of the grid, or where that has
            none, of all. Ties go to the lowest index.
        bank: embeddings for images without a free patch, `bank[floor(u * M)]`; without it they stay as they
            are.
        avoid: bool, patches that are no donors, though free; in an image whose free patches all are in it they are. It
            is not dilated, and no patch is overwritten for it.
        backend: "auto", or one to force (`lbdt.ops.use_backend`).

    Returns:
        A tensor like x, and bool [B, N]: which patches were overwritten, padding included. The first has a
        gradient: a replaced patch hands its own to its donors in x or the bank. The mask has none.

    Raises:
        ValueError, TypeError: the argument, what was expected, what was given.
    """
    if _checks.wants_gradient(x, bank):
        return _WithGradient.apply(x, mask, u, height, width, padding, source, bank, avoid, backend or "")
    return torch.ops.lbdt.replace_patches(
        x, mask, u, height, width, padding, source, bank, avoid, backend=backend or ""
    )


def replace_patches_(
    x: Tensor,  # [B, d, H, W] or [B, d, N]
    mask: Tensor,  # [B, N]
    u: Tensor,  # [B, N]
    height: int,
    width: int,
    padding: int = 0,
    source: str = "random",
    bank: Tensor | None = None,  # [B, M, d]
    avoid: Tensor | None = None,  # [B, N]
    *,
    backend: str | None = None,
) -> Tensor:  # [B, N]
    """`replace_patches` in place on `x`; returns which patches were overwritten, bool [B, N].

    Donors lie outside the dilated mask, so none is overwritten before it is read; a mask, u, bank or avoid in x's
    own memory is copied first. Arguments and errors as there; besides, ValueError where elements of x share memory,
    and RuntimeError if x or bank requires grad.
    """
    _checks.no_gradient("replace_patches_", x, bank, instead="lbdt.ops.replace_patches")
    return torch.ops.lbdt.replace_patches_(
        x, mask, u, height, width, padding, source, bank, avoid, backend=backend or ""
    )


def replacement(x: Tensor, patches: int, avoids: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """What replaces in maps like x [B, d, ...] of so many patches, past the checks and whatever backend is forced: the
    C++ function if it can, or the reference, with the arguments of `replace_patches` all by position. For ops that
    replace among other things, and have checked theirs."""
    return _cpp if _unable(x, patches, avoids) is None else reference.replace_patches


# Not by torch.library.register_autograd: that costs 4.4 us a call without a gradient, as are all calls of a pipeline.
class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, u, height, width, padding, source, bank, avoid, backend):
        out, replaced = torch.ops.lbdt.replace_patches(
            x, mask, u, height, width, padding, source, bank, avoid, backend=backend
        )
        ctx.save_for_backward(mask, u, avoid)
        ctx.settings = (height, width, padding, source)
        ctx.bank = None if bank is None else (bank.shape[1], bank.dtype)
        ctx.mark_non_differentiable(replaced)
        return out, replaced

    @staticmethod
    def backward(ctx, gradient, _):
        mask, u, avoid = ctx.saved_tensors
        patches = mask.shape[1]
        spare, kind = ctx.bank or (0, None)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        # The op is linear in x and the bank together, so what it makes of unit vectors is its matrix [B, N + M, N].
        units = torch.eye(patches + spare, dtype=wide, device=mask.device).expand(mask.shape[0], -1, -1)
        bank = units[:, patches:] if spare else None
        matrix, _ = reference.replace_patches(units[:, :, :patches], mask, u, *ctx.settings, bank, avoid)
        both = torch.matmul(gradient.flatten(2).to(wide), matrix.transpose(1, 2))  # [B, d, N + M]
        to_x = both[:, :, :patches].reshape(gradient.shape).to(gradient.dtype)
        to_bank = both[:, :, patches:].transpose(1, 2).to(kind) if spare else None
        return to_x, *(None,) * 6, to_bank, None, None


@_checks.tensors
def _check(x, mask, u, height, width, padding, source, bank, avoid) -> None:
    batch, channels, patches = _checks.feature_map(x)
    _checks.grid(x, height, width)
    for name, tensor, kind in (("mask", mask, torch.bool), ("u", u, torch.float32)):
        _checks.shape(name, tensor, (batch, patches), "[B, N]")
        _checks.dtype(name, tensor, kind)
        _checks.device(name, tensor, x)
    _checks.donors(padding, source)
    farthest = height**2 + width**2 * (2 if source == DonorSource.row else 1)
    if source != DonorSource.random and farthest * patches >= 1 << 63:
        raise ValueError(
            f"source: {source!r} orders squared distances times patches, which on a grid of {height} x {width} "
            "exceed an int64; use 'random', or height and width that are closer to each other"
        )
    if bank is not None:
        _checks.dtype("bank", bank, *_checks.FLOATS)
        _checks.device("bank", bank, x)
        if bank.dim() != 3 or (bank.shape[0], bank.shape[2]) != (batch, channels) or bank.shape[1] == 0:
            raise ValueError(
                f"bank: expected [B, M, d] = [{batch}, M >= 1, {channels}], got {list(bank.shape)}"
            )
    if avoid is not None:
        _checks.shape("avoid", avoid, (batch, patches), "[B, N]")
        _checks.dtype("avoid", avoid, torch.bool)
        _checks.device("avoid", avoid, x)


def _fake(x, mask, u, height, width, padding=0, source="random", bank=None, avoid=None, *, backend=""):
    _check(x, mask, u, height, width, padding, source, bank, avoid)
    return torch.empty_like(x), torch.empty_like(mask, memory_format=torch.contiguous_format)


def _fake_(x, mask, u, height, width, padding=0, source="random", bank=None, avoid=None, *, backend=""):
    _check(x, mask, u, height, width, padding, source, bank, avoid)
    return torch.empty_like(mask, memory_format=torch.contiguous_format)


def _run(x, mask, u, height, width, padding=0, source="random", bank=None, avoid=None, *, backend=""):
    _check(x, mask, u, height, width, padding, source, bank, avoid)
    return _dispatch.call("replace_patches", backend, x, mask, u, height, width, padding, source, bank, avoid)


def _run_(x, mask, u, height, width, padding=0, source="random", bank=None, avoid=None, *, backend=""):
    _check(x, mask, u, height, width, padding, source, bank, avoid)
    if _checks.shares_elements(x):
        raise ValueError(
            f"x: elements share memory (strides {list(x.stride())}), so it cannot be written in place; "
            "pass x.clone(), or call replace_patches"
        )
    return _dispatch.call(
        "replace_patches_", backend, x, mask, u, height, width, padding, source, bank, avoid
    )


def _cpp_supports(x, mask, u, height, width, padding=0, source="random", bank=None, avoid=None) -> str | None:
    return _unable(x, mask.shape[1], avoid is not None)


def _unable(x, patches, avoids) -> str | None:
    reason = _build.missing("replace_patches_cpp", x.device.type)
    if reason is None and x.device.type == "cuda":
        return _shared_memory(x, patches, 3 if avoids else 2)
    return reason


def _shared_memory(x, patches, words) -> str | None:
    """Why a block's shared memory does not hold `words` words of each 32 patches; None where it does."""
    needed = _FIXED_BYTES + (patches + 31) // 32 * 4 * words
    if needed <= _ANY_GPU:
        return None
    properties = torch.cuda.get_device_properties(x.device)
    limit = getattr(properties, "shared_memory_per_block_optin", _ANY_GPU)
    if needed <= limit:
        return None
    return (
        f"keeps the mask of {patches} patches in {needed} bytes of shared memory, and {x.device} has {limit}"
    )


def _cpp_arguments(x, mask, u, height, width, padding, source, bank, avoid) -> tuple:
    return (
        x if x.dim() == 4 else x.unflatten(2, (height, width)),
        mask.contiguous(),
        u.contiguous(),
        None if bank is None else bank.to(x.dtype).contiguous(),
        None if avoid is None else avoid.contiguous(),
        padding,
        SOURCES.index(source),
    )


def _cpp_(x, mask, u, height, width, padding=0, source="random", bank=None, avoid=None) -> Tensor:
    if x.numel() == 0:
        return torch.zeros_like(mask, memory_format=torch.contiguous_format)
    replaced = torch.empty_like(mask, memory_format=torch.contiguous_format)
    arguments = _cpp_arguments(x, mask, u, height, width, padding, source, bank, avoid)
    torch.ops.lbdt.replace_patches_cpp_(*arguments, replaced)
    return replaced


def _cpp(
    x, mask, u, height, width, padding=0, source="random", bank=None, avoid=None
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out, torch.zeros_like(mask, memory_format=torch.contiguous_format)
    replaced = torch.empty_like(mask, memory_format=torch.contiguous_format)
    arguments = _cpp_arguments(x, mask, u, height, width, padding, source, bank, avoid)
    to = out if out.dim() == 4 else out.unflatten(2, (height, width))
    torch.ops.lbdt.replace_patches_cpp(*arguments, to, replaced)
    return out, replaced


_dispatch.implement("replace_patches", _run, _fake)
_dispatch.implement("replace_patches_", _run_, _fake_)
_dispatch.register("replace_patches", "cpp", _cpp_supports, _cpp)
_dispatch.register("replace_patches_", "cpp", _cpp_supports, _cpp_)
_dispatch.register("replace_patches", "reference", _dispatch.always, reference.replace_patches)
_dispatch.register("replace_patches_", "reference", _dispatch.always, reference.replace_patches_)
