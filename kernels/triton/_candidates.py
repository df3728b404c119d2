"""The first launch of `lbdt::detect_patches`: candidates, what refutes them early, and those that are left, packed
(METHOD.md, 2.2)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbdt.kernels._common import Config, accumulate, load, patch_offset
from lbdt.kernels._gate import keep_evidence

_PREFIX = 512
_COLUMNS = tl.constexpr(128)


def candidates_config(x: Tensor, update: bool, capability: tuple[int, int]) -> Config:
    """Tiles of the first launch: little work and much to read, so small ones, each with its loads well ahead."""
    old = capability < (9, 0)
    # Before Hopper one more step ahead spills registers, and so do more patches with a second operand.
    if x.dtype == torch.float32:
        return Config(32, 64, 16, 4, 2 if old else 3)
    return Config(32 if update and old else 64, 64, 64, 4, 4)


def prefix_rows(latents: int, k: int) -> int:
    """Rows of the dictionary on which the first launch counts: most candidates reach k within the latents that fire
    most often, and are dropped before they are packed. Few enough to cost little where none of them does."""
    rows = min(_PREFIX, latents // 4)
    return rows if rows > k else 0


@triton.jit
def _watched(
    column,  # [P] int32, positions in the union
    selected,  # [P] bool
    latents,
    latents_stride,
    total_latents,
):
    """The latents of some columns, and which of them are in the dictionary."""
    latent = tl.load(latents + column * latents_stride, mask=selected, other=0)
    known = selected & (latent >= 0) & (latent < total_latents)
    return tl.where(known, latent, 0), known


@triton.jit(
    do_not_specialize=[
        *("union", "total_latents", "bins", "thresholds_stride_t", "enabled_stride_b", "words", "prefix", "k")
    ]
)
def detect_patches_candidates_kernel(
    x,  # [B, d, H, W] by its strides
    minus,  # like x
    weight,  # [L, d]
    bias,  # [L] float32
    latents,  # [U] int64
    thresholds,  # [T, U] float32
    timestep_bin,  # [B] int64
    enabled,  # [B, U] uint8
    mask,  # [B, N] uint8, out
    total,  # [1 + B * blocks] int32, zero: number of survivors, out; then of each block the programs that are done
    packed,  # [B * N, PARTS * room], out: of each survivor its column,
    value,  # [B * N] float32, out: its largest passing pre-activation,
    survivors,  # [3 + S, B * N] int32, out: the latent it belongs to; the patch b * N + p; the count so far; by patch
    # what each of a block's S programs counts
    owners,  # [U] int64, where GATED
    evidence,  # [W, B * N] int32, where GATED, out: bit c of a patch: whether a latent of concept c passes
    words,
    patches,
    union,
    total_latents,
    bins,
    prefix,
    k,
    room,
    width,
    x_stride_b,
    x_stride_d,
    x_stride_h,
    x_stride_w,
    minus_stride_b,
    minus_stride_d,
    minus_stride_h,
    minus_stride_w,
    weight_stride_l,
    weight_stride_d,
    bias_stride,
    latents_stride,
    thresholds_stride_t,
    thresholds_stride_u,
    bin_stride,
    enabled_stride_b,
    enabled_stride_u,
    owners_stride,
    D: tl.constexpr,
    FLAT: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    PARTS: tl.constexpr,
    RANKED: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`max{ h_u : h_u > mu_u }` of each patch (items 1 and 2 of the identity), what exceeds it among the first `prefix`
    latents, and the columns of those that are left.

    S programs share a block of BLOCK_P patches: each computes the watched pre-activations and counts on its part of
    the prefix, and the last to be done adds up and packs. A block without a candidate ends before the count. Reads x,
    the watched rows and a part of the prefix once a program; writes N bytes, and of each survivor its column and 16
    bytes. The list's order is that in which programs arrive; no result depends on it.
    """
    image, part, parts = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    patch = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = patch < patches
    x_pointers = (
        x + image.to(tl.int64) * x_stride_b + patch_offset(patch, width, x_stride_h, x_stride_w, FLAT)
    )
    minus_pointers = x_pointers
    if HAS_MINUS:
        minus_pointers = minus + image.to(tl.int64) * minus_stride_b
        minus_pointers += patch_offset(patch, width, minus_stride_h, minus_stride_w, FLAT)
    # The host does not read these values, so one that is no position counts as a latent that is not selected.
    time = tl.load(timestep_bin + image * bin_stride)
    selected = tl.where((time >= 0) & (time < bins), union, 0)
    place = image.to(tl.int64) * patches + patch
    rows = tl.num_programs(0).to(tl.int64) * patches
    seen = survivors + 3 * rows

    largest = tl.full([BLOCK_P], float("-inf"), tl.float32)
    own = tl.zeros([BLOCK_P], tl.int32)
    written = patch < 0
    for chunk in range(0, union, _COLUMNS):
        column = chunk + tl.arange(0, _COLUMNS)
        mu = tl.load(
            thresholds + time * thresholds_stride_t + column * thresholds_stride_u,
            mask=column < selected,
            other=float("inf"),
        )
        on = tl.load(
            enabled + image * enabled_stride_b + column * enabled_stride_u, mask=column < selected, other=0
        )
        # Only columns that can pass are multiplied: of a union over concepts and bins a part.
        counts = (mu < float("inf")) & (on != 0)
        nth = tl.cumsum(counts.to(tl.int32), axis=0) - 1
        active = tl.sum(counts.to(tl.int32), axis=0)
        # Without hoisting, which would fill the registers with what each tile can compute again.
        for start in tl.range(0, active, BLOCK_U, disable_licm=True):
            wanted = start + tl.arange(0, BLOCK_U)
            chosen = counts[None, :] & (nth[None, :] == wanted[:, None])
            u = chunk + tl.sum(tl.where(chosen, tl.arange(0, _COLUMNS)[None, :], 0), axis=1)
            latent, known = _watched(u, wanted < active, latents, latents_stride, total_latents)
            h = accumulate(
                tl.zeros([BLOCK_U, BLOCK_P], tl.float32),
                weight + latent[:, None] * weight_stride_l,
                weight_stride_d,
                x_pointers[None, :],
                x_stride_d,
                minus_pointers[None, :],
                minus_stride_d,
                inside[None, :],
                D,
                BLOCK_D,
                HAS_MINUS,
                PRECISION,
            )
            h += tl.load(bias + latent * bias_stride, mask=known, other=0.0)[:, None]
            floor = thresholds + time * thresholds_stride_t + u * thresholds_stride_u
            passing = h > tl.load(floor, mask=known, other=float("inf"))[:, None]
            h = tl.where(passing, h, float("-inf"))
            best = tl.max(h, axis=0)
            # Of tied latents any serves: what is counted lies strictly above.
            who = tl.max(tl.where(h == best[None, :], latent[:, None].to(tl.int32), -1), axis=0)
            own = tl.where(best > largest, who, own)
            largest = tl.maximum(largest, best)
            if GATED:
                if part == 0:
                    of = tl.load(owners + u * owners_stride, mask=known, other=-1).to(tl.int32)
                    keep_evidence(evidence, place, inside, rows, passing, of, words, written)
                written = inside

    candidate = (largest > float("-inf")) & inside
    if not RANKED:
        tl.store(mask + place, candidate.to(tl.uint8), mask=inside)
    elif tl.sum(candidate.to(tl.int32), axis=0) == 0:
        if part == 0:
            tl.store(mask + place, tl.zeros([BLOCK_P], tl.uint8), mask=inside)
    else:
        above = tl.zeros([BLOCK_P], tl.int32)
        for tile in tl.range(part, tl.cdiv(prefix, BLOCK_L), parts, disable_licm=True):
            latent = tile * BLOCK_L + tl.arange(0, BLOCK_L)
            known = latent < prefix
            h = accumulate(
                tl.zeros([BLOCK_L, BLOCK_P], tl.float32),
                weight + tl.minimum(latent, prefix - 1).to(tl.int64)[:, None] * weight_stride_l,
                weight_stride_d,
                x_pointers[None, :],
                x_stride_d,
                minus_pointers[None, :],
                minus_stride_d,
                inside[None, :],
                D,
                BLOCK_D,
                HAS_MINUS,
                PRECISION,
            )
            h += tl.load(bias + latent * bias_stride, mask=known, other=0.0)[:, None]
            # By index, not by value: the owner's two computations may round differently.
            larger = (h > largest[None, :]) & (latent[:, None] != own[None, :]) & known[:, None]
            above += tl.sum(larger.to(tl.int32), axis=0)
        tl.store(seen + part * rows + place, above, mask=inside)
        tl.debug_barrier()  # all warps have stored before the program says so
        block = image * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(total + 1 + block, 1) == parts - 1:
            above = tl.zeros([BLOCK_P], tl.int32)
            for other in range(parts):
                # From L2, where other multiprocessors' stores are.
                above += tl.load(seen + other * rows + place, mask=inside, other=0, cache_modifier=".cg")
            alive = candidate & (above < k)
            tl.store(mask + place, alive.to(tl.uint8), mask=inside)
            flag = alive.to(tl.int32)
            left = tl.sum(flag, axis=0)
            if left > 0:
                slot = tl.atomic_add(total, left, sem="relaxed") + tl.cumsum(flag, axis=0) - 1
                tl.store(value + slot, largest, mask=alive)
                tl.store(survivors + slot, own, mask=alive)
                tl.store(survivors + rows + slot, place.to(tl.int32), mask=alive)
                tl.store(survivors + 2 * rows + slot, above, mask=alive)
                _pack(
                    packed + slot.to(tl.int64)[:, None] * (PARTS * room),
                    room,
                    x_pointers[:, None],
                    x_stride_d,
                    minus_pointers[:, None],
                    minus_stride_d,
                    inside[:, None],
                    alive[:, None],
                    D,
                    HAS_MINUS,
                    4 * BLOCK_D // PARTS,  # few rounds, as nothing here hides how long each takes
                )


@triton.jit
def _pack(
    to,  # [P, 1], of channel 0
    room,
    x_pointers,  # [P, 1], of channel 0
    x_stride,
    minus_pointers,  # like x_pointers
    minus_stride,
    inside,  # [P, 1]
    alive,  # [P, 1]
    D: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Columns as rows of `room` channels, 0 behind the last: x; of an update in float32 x - minus; in half precision x
    and behind it -minus, of which the second launch adds up the products, as a rounded difference would not be exact.
    """
    for start in range(0, room, BLOCK_D):
        c = start + tl.arange(0, BLOCK_D)[None, :]
        # What is read is not what is written, so that neighbours can be read at once.
        read, written = inside & (c < D), alive & (c < room)
        column = load(x_pointers + c * x_stride, read)
        if HAS_MINUS:
            minus = load(minus_pointers + c * minus_stride, read)
            if to.dtype.element_ty == tl.float32:
                column -= minus
            else:
                tl.store(to + room + c, (-minus).to(to.dtype.element_ty), mask=written)
        tl.store(to + c, column.to(to.dtype.element_ty), mask=written)
