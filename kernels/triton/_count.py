"""The second launch of `lbdt::detect_patches`: what is left of the rank test, on packed rows (METHOD.md, 2.2)."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbdt.kernels._common import INTERPRET, Config, load

_IDLE = 64


class CountConfig(NamedTuple):
    """Tiles of the second launch, whose programs choose by the number of survivors."""

    many: Config
    few: Config
    """The tile for up to its `block_p` survivors; step, warps and stages are those of `many`."""


def count_config(x: Tensor, latents: int, capability: tuple[int, int]) -> CountConfig:
    """Tiles for the `latents` behind the prefix. In half precision they are as large as registers hold: many survivors
    are bound by the products and by what L2 delivers, few by reading the dictionary, so these get smaller tiles only
    where most multiprocessors would have none. One program fits a multiprocessor.

    A tile has more than 32 survivors, or the warps of a program would decide on copies of `count` of their own.
    """
    if x.dtype == torch.float32:
        return CountConfig(Config(128, 128, 16, 8, 3), Config(64, 64, 16, 8, 3))
    # Others have less shared memory.
    many = Config(128, 256, 64, 8, 3) if capability[0] in (9, 10) else Config(128, 256, 32, 8, 4)
    idle = triton.cdiv(latents, many.block_l) <= _IDLE
    # Blackwell's larger tile spills where the smaller one is as wide.
    wide = 128 if capability[0] == 10 else many.block_l
    return CountConfig(many, many._replace(block_p=64, block_l=64 if idle else wide))


@triton.jit
def undecided(survivors, states, slot, listed, rows, k):
    """What the prefix has counted for screened survivors, which of them bounds leave undecided, and how many latents
    lie between the bounds of those, else 0. The launch that asks for this writes none of it."""
    kinds = tl.cast(rows, tl.int64)
    ahead = tl.load(survivors + 2 * kinds + slot, mask=listed, other=0)
    certain = ahead + tl.load(states + slot, mask=listed, other=0)
    between = tl.load(states + kinds + slot, mask=listed, other=0)
    open = listed & (certain < k) & (certain + between >= k)
    # So few that the sum of a block fits, whatever the dictionary.
    return ahead, open, tl.where(open, tl.minimum(between, 1 << 20), 0)


@triton.jit
def _count_tiles(
    packed,
    weight,
    bias,
    mask,
    value,
    survivors,
    states,
    candidates,
    rows,
    prefix,
    latents,
    k,
    unscreened,
    budget,
    room,
    weight_stride_l,
    weight_stride_d,
    bias_stride,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCREENED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Counts on tiles of BLOCK_P survivors x BLOCK_L latents.

    SCREENED: the count behind the prefix is the last of `states`.
    """
    # The smallest count of up to 32 survivors is taken inside of each warp, of a load of its own: others may see
    # another one and take the other branch. Of more it goes through shared memory, and is one for all.
    tl.static_assert(
        INTERPRET or BLOCK_P > 32, "a tile of at most 32 survivors is decided on by each warp alone"
    )
    place = survivors + tl.cast(rows, tl.int64)
    count = place + rows
    behind = count
    if SCREENED:
        behind = states + 2 * tl.cast(rows, tl.int64)
    channel = tl.arange(0, BLOCK_D)
    across = tl.cdiv(candidates, BLOCK_P)
    # Without hoisting, which fills the registers of the sums with what each tile can compute again.
    for tile in tl.range(
        tl.program_id(0), across * tl.cdiv(latents - prefix, BLOCK_L), tl.num_programs(0), disable_licm=True
    ):
        slot = tile % across * BLOCK_P + tl.arange(0, BLOCK_P)
        listed = slot < candidates
        # Volatile, as other programs add to it. An old value only means work that could have been spared; nothing
        # else may depend on it, as the compiler can repeat the load and get another one.
        counted = tl.load(behind + slot, mask=listed, other=k, volatile=True)
        ahead = tl.zeros([BLOCK_P], tl.int32)
        if SCREENED:
            ahead, open, pairs = undecided(survivors, states, slot, listed, rows, k)
            # By whole blocks, as the interpreter's masks are no single numbers.
            every = tl.zeros([BLOCK_P], tl.int32) + candidates <= unscreened
            listed = listed & (
                every | (open & (tl.zeros([BLOCK_P], tl.int32) + tl.sum(pairs, axis=0) > budget))
            )
            counted = tl.where(listed, counted + ahead, k)
        if tl.min(counted, axis=0) < k:
            latent = prefix + tile // across * BLOCK_L + tl.arange(0, BLOCK_L)
            # Past the end of a list its last member is computed on, and dropped by its bias or by `listed`.
            a_pointers = packed + tl.minimum(slot, candidates - 1).to(tl.int64)[:, None] * (PARTS * room)
            w_pointers = weight + tl.minimum(latent, latents - 1).to(tl.int64)[None, :] * weight_stride_l
            a_pointers += channel[None, :]
            # The sum begins with it: behind the loop it would take registers beside the sums.
            b = tl.load(bias + latent * bias_stride, mask=latent < latents, other=float("-inf"))
            h = tl.zeros([BLOCK_P, BLOCK_L], tl.float32) + b[None, :]
            for start in range(0, PARTS * room, BLOCK_D):
                first = start
                if PARTS > 1:  # for each part of a row the same channels
                    first = tl.multiple_of(start % room, BLOCK_D)
                c = first + channel[:, None]
                inside = None
                if D % BLOCK_D != 0:
                    inside = c < D
                w = load(w_pointers + c * weight_stride_d, inside)
                h = tl.dot(load(a_pointers + start, None), w, h, input_precision=PRECISION)
            limit = tl.load(value + slot, mask=listed, other=float("inf"))
            own = tl.load(survivors + slot, mask=listed, other=-1)
            # By index, not by value: the owner's two computations may round differently.
            above = (h > limit[:, None]) & (latent[None, :] != own[:, None])
            more = tl.sum(above.to(tl.int32), axis=1)
            before = ahead + tl.atomic_add(behind + slot, more, mask=listed, sem="relaxed")
            patch = tl.load(place + slot, mask=listed, other=0)
            tl.store(mask + patch, tl.zeros([BLOCK_P], tl.uint8), mask=listed & (before + more >= k))


@triton.jit
def _any_dear(survivors, states, candidates, rows, k, budget, BLOCK_P: tl.constexpr):
    """1 where some block of survivors has more than `budget` latents between their bounds, else 0."""
    dear = tl.full((), 0, tl.int32)
    for first in range(0, candidates, 8 * BLOCK_P):
        slot = first + tl.arange(0, 8)[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        _, _, pairs = undecided(survivors, states, slot, slot < candidates, rows, k)
        dear = tl.maximum(dear, tl.max((tl.sum(pairs, axis=1) > budget).to(tl.int32), axis=0))
    return dear


@triton.jit(do_not_specialize=["rows", "prefix", "latents", "k", "unscreened", "budget"])
def detect_patches_count_kernel(
    packed,  # [B * N, PARTS * room], by slot
    weight,  # [L, d]
    bias,  # [L] float32
    mask,  # [B, N] uint8, in and out: cleared where a survivor is refuted
    total,  # [1] int32: number of survivors
    value,  # [B * N] float32, by slot
    survivors,  # [3 + S, B * N] int32, by slot: owner; patch b * N + p; count, in and, but where SCREENED, out
    states,  # [3, B * N] int32, by slot, where SCREENED: above for certain; between bounds; counted here, zero, out
    rows,
    prefix,
    latents,
    k,
    unscreened,
    budget,
    room,
    weight_stride_l,
    weight_stride_d,
    bias_stride,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    MANY_P: tl.constexpr,
    MANY_L: tl.constexpr,
    FEW_P: tl.constexpr,
    FEW_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCREENED: tl.constexpr,
):
    """`#{ j != owner : h_j > value }` of each survivor, from the prefix's on, until it reaches k (items 3 and 5 of the
    identity).

    A grid of fixed size walks over the tiles, latents slowest, so that later tiles find the counts of earlier ones and
    are skipped where all their survivors are refuted. Reads the dictionary behind the prefix once per tile of
    survivors, and a survivor's row once per tile of latents, mostly from L2; writes a counter a survivor and tile.

    SCREENED (METHOD.md, 2.7): of more than `unscreened` survivors only those that bounds leave undecided, in blocks
    with more than `budget` latents between the bounds. What a block takes follows from what earlier launches have
    written, so all programs agree on it.
    """
    candidates = tl.load(total)
    if candidates > FEW_P:
        wanted = tl.full((), 1, tl.int32)
        if SCREENED:
            if candidates > unscreened:
                wanted = _any_dear(survivors, states, candidates, rows, k, budget, MANY_P)
        if wanted > 0:
            _count_tiles(
                *(packed, weight, bias, mask, value, survivors, states, candidates, rows, prefix, latents, k),
                *(unscreened, budget, room, weight_stride_l, weight_stride_d, bias_stride),
                *(D, PARTS, PRECISION, SCREENED, MANY_P, MANY_L, BLOCK_D),
            )
    else:
        _count_tiles(
            *(packed, weight, bias, mask, value, survivors, states, candidates, rows, prefix, latents, k),
            *(unscreened, budget, room, weight_stride_l, weight_stride_d, bias_stride),
            *(D, PARTS, PRECISION, False, FEW_P, FEW_L, BLOCK_D),
        )
