"""The fourth launch of a screened `lbdt::detect_patches`: single latents, exactly (METHOD.md, 2.7)."""

import triton
import triton.language as tl

from lbdt.kernels._common import load, set_bits
from lbdt.kernels._count import undecided

# Of a step over the bits: survivors, words of each, and pairs of them and latents that are multiplied together.
_SOME, _WORDS, _PAIRS = tl.constexpr(8), tl.constexpr(32), tl.constexpr(64)


@triton.jit(do_not_specialize=["rows", "prefix", "latents", "k", "unscreened", "budget", "words"])
def detect_patches_pairs_kernel(
    packed,  # [B * N, PARTS * room], by slot
    weight,  # [L, d]
    bias,  # [L] float32
    mask,  # [B, N] uint8, in and out: cleared where a survivor is refuted
    total,  # [1] int32: number of survivors
    value,  # [B * N] float32, by slot
    survivors,  # [3 + S, B * N] int32, by slot: owner; patch b * N + p; count so far
    states,  # [3, B * N] int32, by slot: above for certain; between the bounds; counted exactly, zero, out
    between,  # [B * N, words] int32, by slot: the bits of those
    rows,
    prefix,
    latents,
    k,
    unscreened,
    budget,
    words,
    room,
    weight_stride_l,
    weight_stride_d,
    bias_stride,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Counts the latents between the bounds of those survivors that bounds leave undecided, one by one in float32.

    Nothing where `unscreened` or less survive. Of blocks of BLOCK_P survivors with more than `budget` of such pairs,
    which are left to `detect_patches_count_kernel`, none. Programs share a block: each takes a part of its words, of
    some survivors at a time. Reads a row of the dictionary a pair; writes a counter a pair that counts.
    """
    candidates = tl.load(total)
    if candidates > unscreened:
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
    # Ahead of the products, which nothing else hides.
    b = tl.load(bias + latent * bias_stride, mask=known, other=0.0)
    limit = tl.load(value + slot, mask=known, other=float("inf"))
    own = tl.load(survivors + slot, mask=known, other=-1)
    patch = tl.load(survivors + kinds + slot, mask=known, other=0)
    ahead = tl.load(survivors + 2 * kinds + slot, mask=known, other=0)
    ahead += tl.load(states + slot, mask=known, other=0)
    products = tl.zeros([slot.shape[0], BLOCK_C], tl.float32)
    for start in range(0, D, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        inside = known[:, None] & (c < D)
        w = load(w_pointers + c * weight_stride_d, inside).to(tl.float32)
        for part in tl.static_range(PARTS):
            products += load(row + part * room + c, inside).to(tl.float32) * w
    # By index, not by value: the owner's two computations may round differently.
    above = known & (tl.sum(products, axis=1) + b > limit) & (latent != own)
    before = ahead + tl.atomic_add(states + 2 * kinds + slot, 1, mask=above, sem="relaxed")
    tl.store(mask + patch, tl.zeros([slot.shape[0]], tl.uint8), mask=above & (before + 1 >= k))
