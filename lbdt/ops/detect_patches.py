"""`lbdt::detect_patches`: which patches of a feature map carry a concept."""

import torch
from torch import Tensor

from lbdt import reference
from lbdt.ops import _checks, _cpu, _dispatch, _triton

_dispatch.define(
    "detect_patches(Tensor x, Tensor weight, Tensor bias, Tensor latents, Tensor thresholds, "
    "Tensor timestep_bin, Tensor enabled, int k, Tensor? minus=None, *, str backend='') -> Tensor"
)
# Contiguous but for x, weight and minus; bias and thresholds in float32.
_dispatch.define_internal(
    "detect_patches_cpp(Tensor x, Tensor weight, Tensor bias, Tensor latents, Tensor thresholds, "
    "Tensor timestep_bin, Tensor enabled, int k, Tensor? minus, Tensor(a!) mask) -> ()"
)


def detect_patches(
    x: Tensor,  # [B, d, H, W] or [B, d, N]
    weight: Tensor,  # [L, d]
    bias: Tensor,  # [L]
    latents: Tensor,  # [U]
    thresholds: Tensor,  # [T, U]
    timestep_bin: Tensor,  # [B]
    enabled: Tensor,  # [B, U]
    k: int,
    minus: Tensor | None = None,  # like x
    *,
    backend: str | None = None,
) -> Tensor:  # [B, N]
    """Mask of the patches in which at least one enabled concept latent is detected.

    Latent u is detected on a patch iff its pre-activation `h_u` is above `thresholds[timestep_bin, u]` and,
    for k > 0, fewer than k other latents of the dictionary have a strictly larger one. Eq.: METHOD.md, 2.2;
    arXiv 2606.31699. Nothing of size N x L is held; without a candidate the dictionary is not read.

    Args:
        x: float32 | float16 | bfloat16 | float64, any strides.
        weight: SAE encoder rows, dtype of x.
        bias: float32, `b_enc - weight @ b_dec`.
        latents: int64, the union of the concepts' latents, each in [0, L). Only on the CPU are these values and
            those of timestep_bin looked at first; on a GPU Triton takes one outside for a latent not selected.
        thresholds: float32, on pre-activations; +inf where a latent is not selected in a bin.
        timestep_bin: int64, each in [0, T).
        enabled: bool, the latents that count for each image.
        k: latents kept per patch; 0 for activation functions without a rank test.
        minus: detect on `x - minus`, for an SAE of a block's update.
        backend: "auto", or one to force (`lbdt.ops.use_backend`).

    Returns:
        bool [B, N]. No gradient. Accumulated in float32 (float64 for float64).

    Raises:
        ValueError, TypeError, IndexError: the argument, what was expected, what was given.
    """
    return torch.ops.lbdt.detect_patches(
        x, weight, bias, latents, thresholds, timestep_bin, enabled, k, minus, backend=backend or ""
    )


@_checks.tensors
def _check(x, weight, bias, latents, thresholds, timestep_bin, enabled, k, minus) -> tuple[int, int]:
    batch, width, patches = _checks.feature_map(x)
    _checks.encoder(x, width, weight, bias, k, least=0)
    if latents.dim() != 1:
        raise ValueError(f"latents: expected [U], got {list(latents.shape)}")
    union = latents.shape[0]
    if thresholds.dim() != 2 or thresholds.shape[1] != union:
        raise ValueError(f"thresholds: expected [T, U] with U = {union}, got {list(thresholds.shape)}")
    _checks.shape("timestep_bin", timestep_bin, (batch,), "[B]")
    _checks.shape("enabled", enabled, (batch, union), "[B, U]")
    _checks.dtype("latents", latents, torch.int64)
    _checks.dtype("thresholds", thresholds, torch.float32, torch.float64)
    _checks.dtype("timestep_bin", timestep_bin, torch.int64)
    _checks.dtype("enabled", enabled, torch.bool)
    for name, tensor in (
        ("latents", latents),
        ("thresholds", thresholds),
        ("timestep_bin", timestep_bin),
        ("enabled", enabled),
    ):
        _checks.device(name, tensor, x)
    if minus is not None:
        _checks.shape("minus", minus, tuple(x.shape), "the shape of x")
        _checks.dtype("minus", minus, x.dtype)
        _checks.device("minus", minus, x)
    return batch, patches


def _fake(x, weight, bias, latents, thresholds, timestep_bin, enabled, k, minus=None, *, backend=""):
    batch, patches = _check(x, weight, bias, latents, thresholds, timestep_bin, enabled, k, minus)
    return x.new_empty((batch, patches), dtype=torch.bool)


def _run(x, weight, bias, latents, thresholds, timestep_bin, enabled, k, minus=None, *, backend=""):
    _check(x, weight, bias, latents, thresholds, timestep_bin, enabled, k, minus)
    _checks.within("latents", latents, weight.shape[0], "L, the latents of weight")
    _checks.within("timestep_bin", timestep_bin, thresholds.shape[0], "T, the bins of thresholds")
    return _dispatch.call(
        "detect_patches", backend, x, weight, bias, latents, thresholds, timestep_bin, enabled, k, minus
    )


def _cpp_supports(x, *args, **kwargs) -> str | None:
    return _cpu.supports_product("detect_patches_cpp", x)


def _cpp(x, weight, bias, latents, thresholds, timestep_bin, enabled, k, minus=None) -> Tensor:
    mask = torch.empty(x.shape[0], x.shape[2:].numel(), dtype=torch.bool)
    torch.ops.lbdt.detect_patches_cpp(
        x,
        weight,
        bias.float().contiguous(),
        latents.contiguous(),
        thresholds.float().contiguous(),
        timestep_bin.contiguous(),
        enabled.contiguous(),
        k,
        minus,
        mask,
    )
    return mask


def _triton_supports(
    x, weight, bias, latents, thresholds, timestep_bin, enabled, k, minus=None
) -> str | None:
    return _triton.supports_product(x, weight, minus) or _triton.supports(x)


_dispatch.implement("detect_patches", _run, _fake)
_triton.register("detect_patches", _triton_supports)
_dispatch.register("detect_patches", "cpp", _cpp_supports, _cpp, _cpu.declines_product)
_dispatch.register("detect_patches", "reference", _dispatch.always, reference.detect_patches)
