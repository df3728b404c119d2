"""`lbdt::record_patches` in Triton: one launch of one program.

Eq.: lbdt/reference/record_patches.py, which is the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbdt.kernels._common import device_of

_BLOCK = 1024


@triton.jit(do_not_specialize=["sizes", "batch", "row_count", "cell_count"])
def record_patches_kernel(
    mask,  # [B, N] uint8, contiguous
    replaced,  # [B, N] uint8, contiguous
    timesteps,  # [B] float32
    sizes,
    rows,  # [R, 4] int64, out; one more with SUMMED and with GATED
    cells,  # [C] uint8, out
    written,  # [2] int64, in and out
    sums,  # [B, N] float32, contiguous, where SUMMED
    gated,  # [B] int64, where GATED
    batch,
    patches,
    timesteps_stride,
    gated_stride,
    row_count,
    cell_count,
    KEPT: tl.constexpr,
    SUMMED: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reads 2 bytes a patch, SUMMED 6; writes 32 bytes a row, 8 more SUMMED and GATED each, and, KEPT, a byte a
    patch."""
    rows_before, cells_before = tl.load(written), tl.load(written + 1)
    # The remainder of what is negative is negative.
    first_row = (rows_before % row_count + row_count) % row_count
    first_cell = cells_before
    if KEPT:
        first_cell = (cells_before % cell_count + cell_count) % cell_count
    # cast, not `to`: integers that are 1 arrive as constants.
    cells_now = tl.cast(batch, tl.int64) * patches
    for image in range(batch):
        detected = tl.zeros([BLOCK], tl.int32)
        overwritten = tl.zeros([BLOCK], tl.int32)
        broken = tl.zeros([BLOCK], tl.int32)
        for start in range(0, patches, BLOCK):
            patch = start + tl.arange(0, BLOCK)
            place = tl.cast(image, tl.int64) * patches + patch
            inside = patch < patches
            before = tl.load(mask + place, mask=inside, other=0).to(tl.int32)
            after = tl.load(replaced + place, mask=inside, other=0).to(tl.int32)
            detected += before
            overwritten += after
            if SUMMED:
                total = tl.load(sums + place, mask=inside, other=0.0)
                # Not larger than the largest float32, which NaN is not either.
                broken += 1 - (tl.abs(total) <= 3.4028234663852886e38).to(tl.int32)
            if KEPT:
                cell = (before + 2 * after).to(tl.uint8)
                # Of more cells than fit the last ones stay: none is written twice.
                last = cells_now - place <= cell_count
                tl.store(cells + (first_cell + place) % cell_count, cell, mask=inside & last)
        if batch - image <= row_count:
            row = rows + (first_row + image) % row_count * (4 + SUMMED + GATED)
            time = tl.load(timesteps + image * timesteps_stride)
            tl.store(row, tl.sum(detected, axis=0).to(tl.int64))
            tl.store(row + 1, tl.sum(overwritten, axis=0).to(tl.int64))
            tl.store(row + 2, time.to(tl.int32, bitcast=True).to(tl.int64))
            tl.store(row + 3, tl.cast(sizes, tl.int64))
            if SUMMED:
                tl.store(row + 4, tl.sum(broken, axis=0).to(tl.int64))
            if GATED:
                tl.store(row + 4 + SUMMED, tl.load(gated + image * gated_stride))
    tl.debug_barrier()  # every warp has read `written` by now
    tl.store(written, rows_before + batch)
    if KEPT:
        tl.store(written + 1, cells_before + cells_now)


def record_patches(
    mask: Tensor,  # [B, N]
    replaced: Tensor,  # [B, N]
    timesteps: Tensor,  # [B]
    sizes: int,
    rows: Tensor,  # [R, 4]
    cells: Tensor,  # [C]
    written: Tensor,  # [2]
    sums: Tensor | None = None,  # [B, N]
    gated: Tensor | None = None,  # [B]
) -> None:
    """`lbdt.reference.record_patches` in one launch."""
    batch, patches = mask.shape
    with device_of(mask):
        record_patches_kernel[(1,)](
            mask.contiguous().view(torch.uint8),
            replaced.contiguous().view(torch.uint8),
            timesteps,
            sizes,
            rows,
            cells,
            written,
            timesteps if sums is None else sums.contiguous(),
            timesteps if gated is None else gated,
            batch,
            patches,
            *timesteps.stride(),
            *(timesteps if gated is None else gated).stride(),
            rows.shape[0],
            cells.shape[0],
            KEPT=cells.shape[0] > 0,
            SUMMED=sums is not None,
            GATED=gated is not None,
            BLOCK=_BLOCK,
            num_warps=4,
            num_stages=1,
        )
