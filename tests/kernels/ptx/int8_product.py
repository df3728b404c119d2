"""A product of int8 matrices in Triton: for the runner's own tests, every sum of which is compared."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def int8_product_kernel(
    a,  # [M, K] int8
    b,  # [N, K] int8
    product,  # [M, N] int32, out
    N,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK, BLOCK], tl.int32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(a + row[:, None] * K + start + k[None, :])
        right = tl.load(b + column[None, :] * K + start + k[:, None], eviction_policy="evict_last")
        total = tl.dot(left, right, total, out_dtype=tl.int32)
    tl.store(product + row[:, None] * N + column[None, :], total)


def int8_product(a: Tensor, b: Tensor) -> Tensor:  # [M, K], [N, K] int8, M and N multiples of 64, K of 64
    """`a @ b.T` [M, N] in int32."""
    block = 64
    product = torch.empty(a.shape[0], b.shape[0], dtype=torch.int32)
    int8_product_kernel[(a.shape[0] // block, b.shape[0] // block)](
        a,
        b,
        product,
        b.shape[0],
        K=a.shape[1],
        BLOCK=block,
        BLOCK_K=64,
        num_warps=4,
        num_stages=3,
    )
    return product
