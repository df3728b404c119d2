"""`lbdt::erase_step` in Triton: a handful of launches, no host sync, no size that depends on values.

Eq.: METHOD.md, 2.2, 2.5, 2.6 and 4.1 to 4.4; reference: lbdt/reference/erase_step.py; arXiv 2606.31699.
The first launch says of each row of the call what lbdt/call_rows.py does, and of each patch its number and whether it
is finite; then come those of `detect_patches`, of a replacement that is handed in, and of `record_patches`. Over a run
one more keeps what the gate has counted.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbdt.kernels._common import both, device_of, grid_strides, load, patch_offset
from lbdt.kernels.detect_patches import detect_patches
from lbdt.kernels.patch_uniform import uniform
from lbdt.kernels.record_patches import record_patches

_BLOCK_P, _BLOCK_D, _BLOCK = 16, 256, 128


@triton.jit
def _still_finite(
    finite,  # [BLOCK_D, P] int32
    pointers,  # [1, P], of channel 0
    stride,
    mask,  # [1, P]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`finite`, and 0 besides where one of D channels is no finite number; each counts at its remainder by BLOCK_D."""
    channel = tl.arange(0, BLOCK_D)[:, None]
    for start in range(0, D, BLOCK_D):
        inside = mask
        if D % BLOCK_D != 0:
            inside = both(mask, start + channel < D)
        values = load(pointers + (start + channel).to(tl.int64) * stride, inside).to(tl.float32)
        # Not larger than the largest float32, which NaN is not either.
        finite = finite & (tl.abs(values) <= 3.4028234663852886e38).to(tl.int32)
    return finite


@triton.jit
def _nearest(wanted, values, count, stride, BLOCK: tl.constexpr):
    """The place of the one of `values` nearest to `wanted`, a float32; of equals the first, and NaN before all."""
    least = tl.full((), float("inf"), tl.float32)
    place = tl.full((), 0, tl.int32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < count
        distance = tl.abs(wanted - load(values + i * stride, inside).to(tl.float32))
        distance = tl.where(distance == distance, distance, -1.0)
        distance = tl.where(inside, distance, float("inf"))
        closest = tl.min(distance, axis=0)
        first = tl.min(tl.where(distance == closest, i, count), axis=0)
        place = tl.where(closest < least, first, place)
        least = tl.minimum(closest, least)
    return place


@triton.jit(
    do_not_specialize=[
        *("union", "bins", "steps", "first", "last", "images", "seeds_each", "sets_each", "cond", "counted"),
        *("counting", "concepts"),
    ]
)
def erase_step_rows_kernel(
    x,  # [B, d, H, W] by its strides
    minus,  # like x, where HAS_MINUS
    timesteps,  # [B]
    times,  # [T] float32
    enabled,  # [S, U] uint8, contiguous
    seeds,  # [R] int64
    schedule,  # [*], where WINDOWED
    run_sums,  # [*, C + 1] int64, where REMEMBERS, as what follows
    run_last,  # [*] float32
    run_count,  # [] int64
    now,  # [B] float32, out
    bin_of,  # [B] int64, out
    on,  # [B, U] uint8, out
    numbers,  # [B, N] float32, out: of patch_uniform
    sums,  # [B, N] float32, out: NaN for a patch that holds a NaN or infinity, else 0
    deciding,  # [B] int64, where DECIDED, out
    so_far,  # [B, C + 1] int64, where REMEMBERS, out
    kept,  # [B] float32, where REMEMBERS, out: the timestep to be kept
    patches,
    union,
    bins,
    steps,
    first,
    last,
    images,
    seeds_each,
    sets_each,
    cond,
    counted,
    counting,
    concepts,
    width,
    x_stride_b,
    x_stride_d,
    x_stride_h,
    x_stride_w,
    minus_stride_b,
    minus_stride_d,
    minus_stride_h,
    minus_stride_w,
    timesteps_stride,
    times_stride,
    seeds_stride,
    schedule_stride,
    D: tl.constexpr,
    FLAT: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    WINDOWED: tl.constexpr,
    DECIDED: tl.constexpr,
    REMEMBERS: tl.constexpr,
    WHOLE_CALLS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows of a denoiser call, its numbers, and which patches are finite.

    A program for BLOCK_P patches of a row; the first of a row says what is of the row. Reads x and minus once; writes 8
    bytes a patch, and U + 12 a row, over a run 8 more for each concept.
    """
    row = tl.program_id(0)
    image, half = row % images, row // images
    patch = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = patch < patches
    place = row.to(tl.int64) * patches + patch

    time = tl.load(timesteps + row * timesteps_stride)
    # By a block of one: Triton's interpreter warns of a sum of single numbers that wraps.
    seed = tl.load(seeds + image // seeds_each * seeds_stride + tl.zeros([1], tl.int32)) + image % seeds_each
    tl.store(numbers + place, uniform(seed, time, half, patch), mask=inside)

    pointers = x + row.to(tl.int64) * x_stride_b + patch_offset(patch, width, x_stride_h, x_stride_w, FLAT)
    finite = tl.full([BLOCK_D, BLOCK_P], 1, tl.int32)
    finite = _still_finite(finite, pointers[None, :], x_stride_d, inside[None, :], D, BLOCK_D)
    if HAS_MINUS:
        pointers = minus + row.to(tl.int64) * minus_stride_b
        pointers += patch_offset(patch, width, minus_stride_h, minus_stride_w, FLAT)
        finite = _still_finite(finite, pointers[None, :], minus_stride_d, inside[None, :], D, BLOCK_D)
    tl.store(sums + place, tl.where(tl.min(finite, axis=0) != 0, 0.0, float("nan")), mask=inside)

    if tl.program_id(1) == 0:
        at = time.to(tl.float32)
        tl.store(now + row, at)
        tl.store(bin_of + row, _nearest(at, times, bins, times_stride, BLOCK).to(tl.int64))
        within = tl.full((), 1, tl.int1)
        if WINDOWED:
            step = _nearest(at, schedule, steps, schedule_stride, BLOCK)
            within = (step >= first) & (step < last)
        # Branches from 63 on share the mask's sign. cast, not `to`: an integer that is 1 may arrive as a constant.
        bit = (tl.cast(counted, tl.int64) >> tl.minimum(half, 63).to(tl.int64)) & 1
        treated = within & (bit != 0)
        own = enabled + (image // sets_each).to(tl.int64) * union
        for start in range(0, union, BLOCK):
            u = start + tl.arange(0, BLOCK)
            wanted = tl.load(own + u, mask=u < union, other=0) != 0
            tl.store(on + row.to(tl.int64) * union + u, (wanted & treated).to(tl.uint8), mask=u < union)
        if DECIDED:
            tl.store(deciding + row, tl.cast(cond, tl.int64) * images + image)
        if REMEMBERS:
            tl.store(kept + row, tl.where(within, at, float("-inf")))
            own_image = row % counting
            # As of the image's first row.
            of_image = tl.load(timesteps + own_image * timesteps_stride).to(tl.float32)
            before = tl.load(run_last + own_image)
            begins = tl.load(run_count) != counting
            if WHOLE_CALLS:
                begins = begins | (of_image > before)
            else:
                begins = begins | (of_image >= before)
            for start in range(0, concepts + 1, BLOCK):
                c = start + tl.arange(0, BLOCK)
                known = c <= concepts
                counts = tl.load(run_sums + own_image.to(tl.int64) * (concepts + 1) + c, mask=known, other=0)
                counts = tl.where(begins, tl.zeros_like(counts), counts)
                tl.store(so_far + row.to(tl.int64) * (concepts + 1) + c, counts, mask=known)


@triton.jit(do_not_specialize=["concepts"])
def erase_step_keep_kernel(
    so_far,  # [B, C + 1] int64
    kept,  # [B] float32
    run_sums,  # [*, C + 1] int64, out
    run_last,  # [*] float32, out
    run_count,  # [] int64, out
    concepts,
    BLOCK: tl.constexpr,
):
    """Keeps what a call has made of a run's sums, the same in every branch; a program an image."""
    image = tl.program_id(0)
    for start in range(0, concepts + 1, BLOCK):
        c = start + tl.arange(0, BLOCK)
        place = image.to(tl.int64) * (concepts + 1) + c
        tl.store(run_sums + place, tl.load(so_far + place, mask=c <= concepts, other=0), mask=c <= concepts)
    tl.store(run_last + image, tl.load(kept + image))
    tl.store(run_count, tl.num_programs(0).to(tl.int64))


class RowsOfCall(NamedTuple):
    """What the first launch says of the rows of a call and of their patches."""

    bins: Tensor
    """[B] int64."""
    now: Tensor
    """[B] float32, the timesteps."""
    on: Tensor
    """[B, U] bool, the latents that count."""
    u: Tensor
    """[B, N] float32, the numbers of `patch_uniform`."""
    sums: Tensor
    """[B, N] float32: NaN for a patch that holds a NaN or infinity, else 0."""
    deciding: Tensor | None
    """[B] int64, the row whose patches the gate counts; None: each its own."""
    so_far: Tensor | None
    """[B, C + 1] int64, what the call begins with; None: there is no run."""
    kept: Tensor | None
    """[B] float32, the timesteps that the run's memory keeps; None: there is no run."""


def rows_of_call(
    x: Tensor,  # [B, d, H, W] or [B, d, N], B >= 1
    minus: Tensor | None,  # like x
    timesteps: Tensor,  # [B]
    times: Tensor,  # [T]
    enabled: Tensor,  # [S, U]
    seeds: Tensor,  # [R]
    images: int,
    cond: int,
    counted: int,
    schedule: Tensor | None,  # [*]
    first: int,
    last: int,
    run: tuple[Tensor, Tensor, Tensor] | None,  # [*, C + 1], [*], []
    whole_calls: bool,
    gated: bool,
) -> RowsOfCall:
    """The rows of the call, in one launch. `run`: run_sums, run_last and run_count of `erase_step`; `gated`: whether
    there is a gate."""
    batch, patches, union = x.shape[0], x.shape[2:].numel(), enabled.shape[1]
    now = torch.empty(batch, dtype=torch.float32, device=x.device)
    bins = torch.empty(batch, dtype=torch.int64, device=x.device)
    u, sums = torch.empty(2, batch, patches, dtype=torch.float32, device=x.device).unbind()
    on = torch.empty(batch, union, dtype=torch.bool, device=x.device)
    deciding, so_far, kept, concepts = None, None, None, 0
    if gated and cond >= 0:
        deciding = torch.empty_like(bins)
    if run is not None:
        concepts = run[0].shape[1] - 1
        so_far = torch.empty(batch, concepts + 1, dtype=torch.int64, device=x.device)
        kept = torch.empty_like(now)
    other, steps = x if minus is None else minus, times if schedule is None else schedule
    across, stride_h, stride_w, flat = grid_strides(x)
    _, other_h, other_w, other_flat = grid_strides(other)
    with device_of(x):
        erase_step_rows_kernel[(batch, max(1, -(-patches // _BLOCK_P)))](
            x,
            other,
            timesteps,
            times,
            # Triton has no kernel arguments of torch.bool.
            enabled.contiguous().view(torch.uint8),
            seeds,
            steps,
            *((bins, now, bins) if run is None else run),
            now,
            bins,
            on.view(torch.uint8),
            u,
            sums,
            bins if deciding is None else deciding,
            bins if so_far is None else so_far,
            now if kept is None else kept,
            patches,
            union,
            times.shape[0],
            steps.shape[0],
            first,
            last,
            images,
            images // seeds.shape[0],
            images // enabled.shape[0],
            cond,
            counted,
            batch if cond < 0 else images,
            concepts,
            across,
            x.stride(0),
            x.stride(1),
            stride_h,
            stride_w,
            other.stride(0),
            other.stride(1),
            other_h,
            other_w,
            *timesteps.stride(),
            *times.stride(),
            *seeds.stride(),
            *steps.stride(),
            D=x.shape[1],
            FLAT=flat and other_flat,
            HAS_MINUS=minus is not None,
            WINDOWED=schedule is not None,
            DECIDED=deciding is not None,
            REMEMBERS=run is not None,
            WHOLE_CALLS=whole_calls,
            BLOCK_P=_BLOCK_P,
            BLOCK_D=min(_BLOCK_D, 1 << (x.shape[1] - 1).bit_length()),
            BLOCK=_BLOCK,
            num_warps=8,
            num_stages=1,
        )
    return RowsOfCall(bins, now, on, u, sums, deciding, so_far, kept)


def keep_run(so_far: Tensor, kept: Tensor, run: tuple[Tensor, Tensor, Tensor], images: int) -> None:
    """Keeps the sums `so_far` [B, C + 1] that a call has added to and the timesteps `kept` [B] of the first `images`
    rows in the tensors of `run` (`rows_of_call`)."""
    with device_of(so_far):
        erase_step_keep_kernel[(images,)](
            so_far, kept, *run, so_far.shape[1] - 1, BLOCK=_BLOCK, num_warps=1, num_stages=1
        )


def erase_step(
    x: Tensor,  # [B, d, H, W] or [B, d, N]
    timesteps: Tensor,  # [B]
    weight: Tensor,  # [L, d]
    bias: Tensor,  # [L]
    latents: Tensor,  # [U]
    thresholds: Tensor,  # [T, U]
    times: Tensor,  # [T]
    enabled: Tensor,  # [S, U]
    seeds: Tensor,  # [R]
    k: int,
    images: int,
    height: int,
    width: int,
    sizes: int,
    rows: Tensor,  # [*, 5], one more with least
    cells: Tensor,  # [*]
    written: Tensor,  # [2]
    minus: Tensor | None,  # like x
    bank: Tensor | None,  # [T, M, d]
    known_latents: Tensor | None,  # [V]
    known_thresholds: Tensor | None,  # [T, V]
    padding: int,
    source: str,
    owners: Tensor | None,  # [U]
    least: Tensor | None,  # [T, C]
    least_of: int,
    cond: int,
    counted: int,
    schedule: Tensor | None,  # [*]
    first: int,
    last: int,
    run_sums: Tensor | None,  # [*, C + 1]
    run_last: Tensor | None,  # [*]
    run_count: Tensor | None,  # []
    whole_calls: bool,
    codes: Tensor | None,  # of detect_patches, as what follows
    bounds: Tensor | None,
    centre: Tensor | None,
    replace: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:  # like x
    """`lbdt.reference.erase_step` in six launches with `replace`, a function with the arguments of
    `lbdt.reference.replace_patches`, of one; one more with the gate, the bank and over a run each, four with known
    latents, three more for each screened detection. Scratch beyond that of `detect_patches`: 10 bytes a patch."""
    batch, patches = x.shape[0], x.shape[2:].numel()
    run = None if run_sums is None else (run_sums, run_last, run_count)
    gated = None if least is None else torch.empty(batch, dtype=torch.int64, device=x.device)
    if batch == 0:
        mask = torch.empty(0, patches, dtype=torch.bool, device=x.device)
        record_patches(mask, mask, timesteps.float(), sizes, rows, cells, written, mask.float(), gated)
        return torch.empty_like(x)
    call = rows_of_call(
        *(x, minus, timesteps, times, enabled, seeds, images, cond, counted, schedule, first, last, run),
        *(whole_calls, least is not None),
    )
    gate = owners, least, least_of, call.deciding, gated, call.so_far
    screen = {"codes": codes, "bounds": bounds, "centre": centre}
    mask = detect_patches(x, weight, bias, latents, thresholds, call.bins, call.on, k, minus, *gate, **screen)
    avoid = None
    if known_latents is not None:
        of = call.bins, mask.any(1, keepdim=True).expand(-1, known_latents.shape[0]), k, minus
        avoid = detect_patches(x, weight, bias, known_latents, known_thresholds, *of, **screen)
    donors = None if bank is None else bank.index_select(0, call.bins)
    out, replaced = replace(x, mask, call.u, height, width, padding, source, donors, avoid)
    record_patches(mask, replaced, call.now, sizes, rows, cells, written, call.sums, gated)
    if run is not None:
        keep_run(call.so_far, call.kept, run, batch if cond < 0 else images)
    return out
