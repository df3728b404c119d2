"""`lbdt::record_patches`: what a call detected and replaced, kept on the device."""

from collections.abc import Callable

import torch
from torch import Tensor

from lbdt import reference
from lbdt.ops import _checks, _cpu, _dispatch, _triton

FIELDS = 4
"""Columns of a row: detected, replaced, the timestep's float32 bits, sizes; with sums and with gated one more."""

_dispatch.define(
    "record_patches(Tensor mask, Tensor replaced, Tensor timesteps, int sizes, Tensor(a!) rows, "
    "Tensor(b!) cells, Tensor(c!) written, Tensor? sums=None, Tensor? gated=None, *, str backend='') -> ()"
)
_dispatch.define_internal(
    "record_patches_cpp(Tensor mask, Tensor replaced, Tensor timesteps, int sizes, Tensor(a!) rows, "
    "Tensor(b!) cells, Tensor(c!) written, Tensor? sums, Tensor? gated) -> ()"
)


def record_patches(
    mask: Tensor,  # [B, N]
    replaced: Tensor,  # [B, N]
    timesteps: Tensor,  # [B]
    sizes: int,
    rows: Tensor,  # [R, 4], one more with sums and with gated
    cells: Tensor,  # [C]
    written: Tensor,  # [2]
    sums: Tensor | None = None,  # [B, N]
    gated: Tensor | None = None,  # [B]
    *,
    backend: str | None = None,
) -> None:
    """Appends a call's counts to ring buffers, and its masks where `cells` has room for any; no host sync.

    Args:
        mask, replaced: bool, before and after padding.
        timesteps: float32.
        sizes: a number of the caller's, >= 0.
        rows: int64, contiguous: detected, replaced, the timestep's float32 bits, sizes, with `sums` how many of these
            are NaN or infinite, with `gated` its number.
        cells: uint8, contiguous: bit 0 detected, bit 1 replaced; C = 0: not kept.
        written: int64, contiguous: rows and cells so far; the next ones go to their remainders by R and C.
        sums: float32, of the embeddings' channels: one that is not finite tells of a NaN or infinity among them.
        gated: int64, the patches of each row that the gate took away.
        backend: "auto", or one to force (`lbdt.ops.use_backend`).

    Raises:
        ValueError, TypeError: the argument, what was expected, what was given. RuntimeError where rows, cells or
            written share memory with another argument.
    """
    torch.ops.lbdt.record_patches(
        mask, replaced, timesteps, sizes, rows, cells, written, sums, gated, backend=backend or ""
    )


@_checks.tensors
def _check(mask, replaced, timesteps, sizes, rows, cells, written, sums, gated) -> None:
    if mask.dim() != 2:
        raise ValueError(f"mask: expected [B, N], got {list(mask.shape)}")
    _checks.shape("replaced", replaced, tuple(mask.shape), "[B, N]")
    _checks.shape("timesteps", timesteps, (mask.shape[0],), "[B]")
    for name, tensor, dtype in (
        ("mask", mask, torch.bool),
        ("replaced", replaced, torch.bool),
        ("timesteps", timesteps, torch.float32),
    ):
        _checks.dtype(name, tensor, dtype)
        _checks.device(name, tensor, mask, like="mask")
    if sums is not None:
        _checks.shape("sums", sums, tuple(mask.shape), "[B, N]")
        _checks.dtype("sums", sums, torch.float32)
        _checks.device("sums", sums, mask, like="mask")
    if gated is not None:
        _checks.shape("gated", gated, (mask.shape[0],), "[B]")
        _checks.dtype("gated", gated, torch.int64)
        _checks.device("gated", gated, mask, like="mask")
    _checks.buffers(
        mask, "mask", sizes, rows, cells, written, FIELDS + (sums is not None) + (gated is not None)
    )


def _fake(
    mask, replaced, timesteps, sizes, rows, cells, written, sums=None, gated=None, *, backend=""
) -> None:
    _check(mask, replaced, timesteps, sizes, rows, cells, written, sums, gated)


def _run(
    mask, replaced, timesteps, sizes, rows, cells, written, sums=None, gated=None, *, backend=""
) -> None:
    arguments = mask, replaced, timesteps, sizes, rows, cells, written, sums, gated
    _check(*arguments)
    _dispatch.call("record_patches", backend, *arguments)


def _cpp_supports(mask, *args, **kwargs) -> str | None:
    return _cpu.supports("record_patches_cpp", mask)


def _cpp(mask, replaced, timesteps, sizes, rows, cells, written, sums=None, gated=None) -> None:
    totals = None if sums is None else sums.contiguous()
    torch.ops.lbdt.record_patches_cpp(
        mask.contiguous(), replaced.contiguous(), timesteps, sizes, rows, cells, written, totals, gated
    )


def _triton_supports(mask, *args, **kwargs) -> str | None:
    return _triton.supports(mask)


def _alone(run: Callable[..., None]) -> Callable[..., None]:
    """`run` on buffers that share no memory; the C++ op looks itself, in less time than Python takes."""

    def checked(mask, replaced, timesteps, sizes, rows, cells, written, sums=None, gated=None) -> None:
        read = [tensor for tensor in (mask, replaced, timesteps, sums, gated) if tensor is not None]
        _checks.own_memory({"rows": rows, "cells": cells, "written": written}, *read)
        run(mask, replaced, timesteps, sizes, rows, cells, written, sums, gated)

    return checked


_dispatch.implement("record_patches", _run, _fake)
_triton.register("record_patches", _triton_supports, _alone)
_dispatch.register("record_patches", "cpp", _cpp_supports, _cpp)
_dispatch.register("record_patches", "reference", _dispatch.always, _alone(reference.record_patches))
