"""A product of matrices by tensor descriptors in Triton: for the runner's own tests, as no op's kernel has any."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def described_product_kernel(
    a,  # [M, K]
    b,  # [N, K]
    product,  # [M, N] float32, out
    M,
    N,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, column = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    a_tiles = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BLOCK, BLOCK_K])
    b_tiles = tl.make_tensor_descriptor(b, [N, K], [K, 1], [BLOCK, BLOCK_K])
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        total = tl.dot(a_tiles.load([row, start]), b_tiles.load([column, start]).T, total)
    rows, columns = row + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(product + rows[:, None] * N + columns[None, :], total, mask=inside)


def described_product(a: Tensor, b: Tensor) -> Tensor:  # [M, K], [N, K] half precision, K a multiple of 64
    """`a @ b.T` [M, N] in float32."""
    block = 64
    product = torch.empty(a.shape[0], b.shape[0], dtype=torch.float32)
    described_product_kernel[(triton.cdiv(a.shape[0], block), triton.cdiv(b.shape[0], block))](
        a,
        b,
        product,
        a.shape[0],
        b.shape[0],
        K=a.shape[1],
        BLOCK=block,
        BLOCK_K=64,
        num_warps=4,
        num_stages=3,
    )
    return product
