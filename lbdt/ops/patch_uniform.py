"""`lbdt::patch_uniform`: the donor draws' counter-based uniform numbers."""

import torch
from torch import Tensor

from lbdt import _build, reference
from lbdt.ops import _checks, _dispatch, _triton

_dispatch.define(
    "patch_uniform(Tensor seeds, Tensor timesteps, Tensor halves, int patches, *, str backend='') -> Tensor"
)
_dispatch.define_internal(
    "patch_uniform_cpp(Tensor seeds, Tensor timesteps, Tensor halves, Tensor(a!) out) -> ()"
)


def patch_uniform(
    seeds: Tensor,  # [B]
    timesteps: Tensor,  # [B]
    halves: Tensor,  # [B]
    patches: int,
    *,
    backend: str | None = None,
) -> Tensor:  # [B, patches]
    """Uniform numbers in [0, 1) from (seed, floor(timestep), guidance half, patch) alone, in any batch.

    Eq.: METHOD.md, 4.3; Philox4x32-10 of Salmon et al., SC 2011: the seed's two words are the key,
    (patch, timestep, half, 0) the counter, the first word's upper 24 bits the number.

    Args:
        seeds: int64, one an image.
        timesteps: integer or floating point, the value the denoiser was called with; floored,
            and 0 where that is no int64 (NaN, infinity).
        halves: int64, 0 for the unconditional or the only half, 1 for the conditional one.
        patches: numbers a row, >= 0.
        backend: "auto", or one to force (`lbdt.ops.use_backend`).

    Returns:
        float32.

    Raises:
        ValueError, TypeError: the argument, what was expected, what was given.
    """
    return torch.ops.lbdt.patch_uniform(seeds, timesteps, halves, patches, backend=backend or "")


@_checks.tensors
def _check(seeds, timesteps, halves, patches) -> None:
    if seeds.dim() != 1:
        raise ValueError(f"seeds: expected [B], got {list(seeds.shape)}")
    _checks.dtype("seeds", seeds, torch.int64)
    _checks.dtype("halves", halves, torch.int64)
    _checks.dtype("timesteps", timesteps, torch.int64, torch.int32, *_checks.FLOATS)
    for name, tensor in (("timesteps", timesteps), ("halves", halves)):
        _checks.shape(name, tensor, tuple(seeds.shape), "[B]")
        if tensor.device != seeds.device:
            raise ValueError(f"{name}: expected on {seeds.device} like seeds, got {tensor.device}")
    if not 0 <= patches <= 1 << 32:
        raise ValueError(f"patches: expected 0 <= patches <= 2**32, got {patches}")


def _fake(seeds, timesteps, halves, patches, *, backend=""):
    _check(seeds, timesteps, halves, patches)
    return seeds.new_empty((seeds.shape[0], patches), dtype=torch.float32)


def _run(seeds, timesteps, halves, patches, *, backend=""):
    _check(seeds, timesteps, halves, patches)
    return _dispatch.call("patch_uniform", backend, seeds, timesteps, halves, patches)


def _cpp_supports(seeds, timesteps, halves, patches) -> str | None:
    return _build.missing("patch_uniform_cpp", seeds.device.type)


def _cpp(seeds, timesteps, halves, patches) -> Tensor:
    out = seeds.new_empty((seeds.shape[0], patches), dtype=torch.float32)
    if out.numel() != 0:
        torch.ops.lbdt.patch_uniform_cpp(seeds, timesteps, halves, out)
    return out


def _triton_supports(seeds, *args, **kwargs) -> str | None:
    return _triton.supports(seeds)


_dispatch.implement("patch_uniform", _run, _fake)
_triton.register("patch_uniform", _triton_supports)
_dispatch.register("patch_uniform", "cpp", _cpp_supports, _cpp)
_dispatch.register("patch_uniform", "reference", _dispatch.always, reference.patch_uniform)
