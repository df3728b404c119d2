"""`lbdt::encode_topk`: the sparse code of every patch."""

import torch
from torch import Tensor

from lbdt import reference
from lbdt.ops import _checks, _cpu, _dispatch, _triton

_MOST_K = 256  # the Triton kernel keeps them in registers

_dispatch.define(
    "encode_topk(Tensor x, Tensor weight, Tensor bias, int k, *, str backend='') -> (Tensor, Tensor)"
)
# Contiguous but for x and weight; bias in float32.
_dispatch.define_internal(
    "encode_topk_cpp(Tensor x, Tensor weight, Tensor bias, int k, Tensor(a!) values, Tensor(b!) indices) -> ()"
)


def encode_topk(
    x: Tensor,  # [B, d, H, W] or [B, d, N]
    weight: Tensor,  # [L, d]
    bias: Tensor,  # [L]
    k: int,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # [B, N, k], [B, N, k]
    """`ReLU(TopK_k(weight x + bias))` of every patch, largest first, without holding [B, N, L].

    Eq.: METHOD.md, 2.4 (SAeUron, arXiv 2501.18052).

    Args:
        x: float32 | float16 | bfloat16 | float64, any strides.
        weight: SAE encoder rows, dtype of x.
        bias: float32, `b_enc - weight @ b_dec`.
        k: latents kept per patch, 1 <= k <= L.
        backend: "auto", or one to force (`lbdt.ops.use_backend`).

    Returns:
        values in x's dtype (0 where a kept pre-activation is negative) and int64 indices. No gradient.
        Tied latents at the k-th place: any of them; C++ and Triton take the smaller
        ones. NaN comes first.

    Raises:
        ValueError, TypeError: the argument, what was expected, what was given. RuntimeError if x requires
        grad.
    """
    _checks.no_gradient("encode_topk", x, weight, bias)
    return torch.ops.lbdt.encode_topk(x, weight, bias, k, backend=backend or "")


@_checks.tensors
def _check(x, weight, bias, k) -> tuple[int, int]:
    batch, width, patches = _checks.feature_map(x)
    _checks.encoder(x, width, weight, bias, k, least=1)
    return batch, patches


def _fake(x, weight, bias, k, *, backend=""):
    batch, patches = _check(x, weight, bias, k)
    return x.new_empty((batch, patches, k)), x.new_empty((batch, patches, k), dtype=torch.int64)


def _run(x, weight, bias, k, *, backend=""):
    _check(x, weight, bias, k)
    return _dispatch.call("encode_topk", backend, x, weight, bias, k)


def _cpp_supports(x, *args, **kwargs) -> str | None:
    return _cpu.supports_product("encode_topk_cpp", x)


def _cpp(x, weight, bias, k) -> tuple[Tensor, Tensor]:
    size = (x.shape[0], x.shape[2:].numel(), k)
    values = torch.empty(size, dtype=x.dtype, device=x.device)
    indices = torch.empty(size, dtype=torch.int64, device=x.device)
    torch.ops.lbdt.encode_topk_cpp(x, weight, bias.float().contiguous(), k, values, indices)
    return values, indices


def _triton_supports(x, weight, bias, k) -> str | None:
    reason = _triton.supports_product(x, weight) or _triton.supports(x)
    if reason is None and k > _MOST_K:
        reason = f"keeps at most {_MOST_K} latents a patch, got k = {k}"
    return reason


_dispatch.implement("encode_topk", _run, _fake)
_triton.register("encode_topk", _triton_supports)
_dispatch.register("encode_topk", "cpp", _cpp_supports, _cpp, _cpu.declines_product)
_dispatch.register("encode_topk", "reference", _dispatch.always, reference.encode_topk)
