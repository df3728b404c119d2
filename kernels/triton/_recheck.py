"""The last launch of a screened `lbdt::detect_patches`: what bounds leave open, exactly (METHOD.md, 2.7)."""

import triton
import triton.language as tl

from lbdt.kernels._common import load, set_bits
from lbdt.kernels._count import count_tiles, undecided

# Of a step over the bits: survivors, words of each, and pairs of them and latents that are multiplied together.
_SOME, _WORDS, _PAIRS = tl.constexpr(8), tl.constexpr(32), tl.constexpr(32)


@triton.jit(do_not_specialize=["rows", "prefix", "latents", "k", "budget"])
def detect_patches_recheck_kernel(
    packed,  # [B * N, PARTS * room], by slot
    weight,  # [L, d]
    bias,  # [L] float32
    mask,  # [B, N] uint8, in and out: cleared where a survivor is refuted
    total,  # [1] int32: number of survivors
    value,  # [B * N] float32, by slot
    survivors,  # [3 + S, B * N] int32, by slot: owner; patch b * N + p; count, of a few in and out
    states,  # [3, B * N] int32, by slot: above for certain; between the bounds; counted exactly, zero, out
    between,  # [B * N, words] int32, by slot: the bits of those
    rows,
    prefix,
    latents,
    k,
    room,
    words,
    budget,
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
    BLOCK_C: tl.constexpr,
):
    """Counts what the bounds of `detect_patches_screen_kernel` leave open, in float32.

    Up to FEW_P survivors, which were not screened, as `detect_patches_count_kernel`. Of more, in blocks of MANY_P: the
    latents between the bounds of those that are undecided, one by one, or where a block has more than `budget` of
    these, by tiles over the whole dictionary behind the prefix, which then reads less. What a block takes follows from
    what launches before this one have written, so all programs agree on it.
    """
    candidates = tl.load(total)
    if candidates > FEW_P:
        _count_pairs(
            *(packed, weight, bias, mask, value, survivors, states, between, candidates, rows, prefix, latents),
            *(k, room, words, budget, weight_stride_l, weight_stride_d, bias_stride),
            *(D, PARTS, MANY_P, BLOCK_C),
        )
        if _any_dear(survivors, states, candidates, rows, k, budget, MANY_P) > 0:
            count_tiles(
                *(packed, weight, bias, mask, value, survivors, states, candidates, rows, prefix, latents, k),
                *(room, budget, weight_stride_l, weight_stride_d, bias_stride),
                *(D, PARTS, PRECISION, True, MANY_P, MANY_L, BLOCK_D),
            )
    else:
        count_tiles(
            *(packed, weight, bias, mask, value, survivors, states, candidates, rows, prefix, latents, k, room),
            *(budget, weight_stride_l, weight_stride_d, bias_stride),
            *(D, PARTS, PRECISION, False, FEW_P, FEW_L, BLOCK_D),
        )


@triton.jit
def _any_dear(survivors, states, candidates, rows, k, budget, BLOCK_P: tl.constexpr):
    """1 where some block of survivors has more than `budget` latents between their bounds, else 0."""
    dear = tl.full((), 0, tl.int32)
    for first in range(0, candidates, 8 * BLOCK_P):
        slot = first + tl.arange(0, 8)[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        _, _, pairs = undecided(survivors, states, slot, slot < candidates, rows, k)
        dear = tl.maximum(dear, tl.max((tl.sum(pairs, axis=1) > budget).to(tl.int32), axis=0))
    return dear


@triton.jit
def _count_pairs(
    packed,
    weight,
    bias,
    mask,
    value,
    survivors,
    states,
    between,
    candidates,
    rows,
    prefix,
    latents,
    k,
    room,
    words,
    budget,
    weight_stride_l,
    weight_stride_d,
    bias_stride,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The pairs of undecided survivors and latents between their bounds, of blocks with `budget` of them at most.

    Programs share a block: each takes a part of its words, of some survivors at a time.
    """
    across = tl.cdiv(candidates, BLOCK_P)
    parts = tl.maximum(tl.num_programs(0) // across, 1)
    share = tl.cdiv(words, parts)
    for item in tl.range(tl.program_id(0), across * parts, tl.num_programs(0), disable_licm=True):
        slot = item % across * BLOCK_P + tl.arange(0, BLOCK_P)
        _, open, pairs = undecided(survivors, states, slot, slot < candidates, rows, k)
        number = tl.sum(pairs, axis=0)
        if (number > 0) & (number <= budget):
            nth = tl.cumsum(open.to(tl.int32), axis=0) - 1
            count = tl.sum(open.to(tl.int32), axis=0)
            begin = item // across * share
            end = tl.minimum(begin + share, words)
            for group in tl.range(0, count, _SOME, disable_licm=True):
                wanted = group + tl.arange(0, _SOME)
                chosen = open[None, :] & (nth[None, :] == wanted[:, None])
                some = tl.sum(tl.where(chosen, slot[None, :], 0), axis=1)
                for first in tl.range(begin, end, _WORDS, disable_licm=True):
                    word = first + tl.arange(0, _WORDS)
                    found = tl.load(
                        between + some.to(tl.int64)[:, None] * words + word[None, :],
                        mask=(wanted < count)[:, None] & (word < end)[None, :],
                        other=0,
                    )
                    upto = tl.cumsum(tl.reshape(set_bits(found), [_SOME * _WORDS]), axis=0)
                    for start in tl.range(0, tl.max(upto, axis=0), _PAIRS, disable_licm=True):
                        i = start + tl.arange(0, _PAIRS)
                        before = upto[None, :] <= i[:, None]
                        entry = tl.sum(before.to(tl.int32), axis=1)
                        n = i - tl.max(tl.where(before, upto[None, :], 0), axis=1)
                        within = entry < _SOME * _WORDS
                        of = entry // _WORDS == tl.arange(0, _SOME)[:, None]
                        pair = tl.sum(tl.where(of, some[:, None], 0), axis=0)
                        at = first + entry % _WORDS
                        bits = tl.load(between + pair.to(tl.int64) * words + at, mask=within, other=0)
                        each = (bits[:, None] >> tl.arange(0, 32)[None, :]) & 1
                        bit = tl.sum((tl.cumsum(each, axis=1) <= n[:, None]).to(tl.int32), axis=1)
                        _count_each(
                            *(packed, weight, bias, mask, value, survivors, states, pair),
                            *(prefix + at * 32 + bit, within, rows, latents, k, room),
                            *(weight_stride_l, weight_stride_d, bias_stride),
                            *(D, PARTS, BLOCK_C),
                        )


@triton.jit
def _count_each(
    packed,
    weight,
    bias,
    mask,
    value,
    survivors,
    states,
    slot,  # [I]
    latent,  # [I]
    known,  # [I]
    rows,
    latents,
    k,
    room,
    weight_stride_l,
    weight_stride_d,
    bias_stride,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Counts those of some pairs whose latent is another than the owner and has a larger pre-activation."""
    kinds = tl.cast(rows, tl.int64)
    known = known & (latent < latents)
    latent = tl.where(known, latent, 0)
    row = packed + slot.to(tl.int64)[:, None] * (PARTS * room)
    w_pointers = weight + latent.to(tl.int64)[:, None] * weight_stride_l
    products = tl.zeros([slot.shape[0], BLOCK_C], tl.float32)
    for start in range(0, D, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        inside = known[:, None] & (c < D)
        w = load(w_pointers + c * weight_stride_d, inside).to(tl.float32)
        for part in tl.static_range(PARTS):
            products += load(row + part * room + c, inside).to(tl.float32) * w
    h = tl.sum(products, axis=1) + tl.load(bias + latent * bias_stride, mask=known, other=0.0)
    limit = tl.load(value + slot, mask=known, other=float("inf"))
    # By index, not by value: the owner's two computations may round differently.
    above = known & (h > limit) & (latent != tl.load(survivors + slot, mask=known, other=-1))
    before = tl.atomic_add(states + 2 * kinds + slot, 1, mask=above, sem="relaxed")
    before += tl.load(survivors + 2 * kinds + slot, mask=above, other=0)
    before += tl.load(states + slot, mask=above, other=0)
    patch = tl.load(survivors + kinds + slot, mask=above, other=0)
    tl.store(mask + patch, tl.zeros([slot.shape[0]], tl.uint8), mask=above & (before + 1 >= k))
