"""The launches by which `lbdt::detect_patches` screens survivors in int8 (METHOD.md, 2.7)."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbdt.kernels._common import INTERPRET, Config, precision, programs, set_bits
from lbdt.kernels._count import CountConfig, detect_patches_count_kernel
from lbdt.kernels._pairs import detect_patches_pairs_kernel

LEAST_ROWS = 1024
"""Rows of a call from which on it may be screened: of fewer few survive, and then three launches are for nothing."""
_LEAST, _SHARE = 128, 4
_CODED_P, _CODED_D = 2, 2048  # survivors and channels, coded at a time
BUDGET = 0.5
"""Latents between the bounds of a block of survivors, in parts of the dictionary, up to which they are taken one by
one: more take longer than tiles of all, by the arithmetic of benchmarks/paper_model.py."""
_ROUND = tl.constexpr(1.5 * 2.0**23)  # which added to a small number rounds it to the nearest integer
_FENCED = tl.constexpr(64)  # columns whose halves a barrier parts, or the compiler would load too far ahead
_LARGE = tl.constexpr(2.0**60)  # from which on products may overflow: there is no bound


class Survivors(NamedTuple):
    """What the first launch leaves, by slot but for the mask."""

    packed: Tensor
    """[B * N, PARTS * room], their columns."""
    mask: Tensor
    """[B, N] uint8."""
    total: Tensor
    """[1 and more] int32, how many there are."""
    value: Tensor
    """[B * N] float32, what is exceeded."""
    places: Tensor
    """[3 + S, B * N] int32: owner, patch, count on the prefix."""
    states: Tensor
    """[3, B * N] int32, zero: latents behind the prefix that are above for certain; those between their bounds; what is
    counted exactly."""


def screen_config(able: tuple[int, int]) -> Config:
    """Tiles of int8 products: on Hopper as many bytes and clocks a step as half precision has in twice as many
    channels. Elsewhere the comparison of so many sums spills registers."""
    if able[0] == 9:
        return Config(128, 256, 128, 8, 3)
    return Config(128, 128, 128, 8, 4) if able[0] == 10 else Config(128, 128, 64, 8, 4)


@triton.jit(do_not_specialize=["rows", "unscreened"])
def detect_patches_code_kernel(
    packed,  # [B * N, PARTS * room]
    total,  # [1] int32: number of survivors
    centre,  # [d] float32
    codes,  # [B * N, coded_room] int8, out
    coded,  # [3, B * N] float32, out: the scale of the codes; the length of what they leave out; of all
    rows,
    unscreened,
    room,
    coded_room,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    MORE: tl.constexpr,
    TINY: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Codes of one byte and a scale for survivors less the centre, and what it takes to bound their products.

    Nothing where `unscreened` or less survive. Reads a survivor's row once, a long one twice; writes a byte a channel
    and 12. An update has x and -minus apart, whose products are summed apart: what rounding adds goes by the lengths of
    both.
    """
    candidates = tl.load(total)
    if candidates > unscreened:
        channel = tl.arange(0, BLOCK_D)[None, :]
        for first in range(tl.program_id(0) * BLOCK_P, candidates, tl.num_programs(0) * BLOCK_P):
            slot = first + tl.arange(0, BLOCK_P)
            listed = slot < candidates
            row = packed + tl.minimum(slot, candidates - 1).to(tl.int64)[:, None] * (PARTS * room)
            most = tl.zeros([BLOCK_P], tl.float32)
            # Summed up across lanes at the end alone: a square fused with the first of these sums would be another
            # number on every lane.
            length = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
            whole = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
            rest = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
            off = length
            for start in range(0, D, BLOCK_D):
                off, value, minus = _from_centre(row, room, centre, start + channel, D, PARTS)
                most = tl.maximum(most, tl.max(tl.abs(off), axis=1))
                length += off * off
                whole += value * value
                if PARTS > 1:
                    whole += minus * minus
            scale = most / 127.0
            unit = tl.where(most > 7.888609052210118e-31, 127.0 / most, 0.0)  # 2^-100
            for start in range(0, coded_room, BLOCK_D):
                if D > BLOCK_D:
                    off, value, minus = _from_centre(row, room, centre, start + channel, D, PARTS)
                code = off * unit[:, None] + _ROUND - _ROUND
                # Of what is no number none is kept: it has no bounds.
                code = tl.where(tl.abs(code) <= 127.0, code, 0.0)
                missed = off - code * scale[:, None]
                rest += missed * missed
                to = codes + slot.to(tl.int64)[:, None] * coded_room + start + channel
                tl.store(to, code.to(tl.int8), mask=listed[:, None] & (start + channel < coded_room))
            off_length = tl.sqrt(tl.sum(length, axis=1)) * MORE + TINY
            # Of two parts no less than the sum of their lengths.
            whole_length = tl.sqrt(tl.sum(whole, axis=1) * PARTS) * MORE + TINY
            slack = ROUNDING * (whole_length + off_length)
            inner = tl.sqrt(tl.sum(rest, axis=1)) * MORE + TINY + slack
            bounded = (off_length < _LARGE) & (whole_length < _LARGE)
            tl.store(coded + slot, scale, mask=listed)
            kinds = tl.cast(rows, tl.int64)
            tl.store(coded + kinds + slot, tl.where(bounded, inner, float("inf")), mask=listed)
            tl.store(coded + 2 * kinds + slot, off_length + slack, mask=listed)


@triton.jit
def _from_centre(row, room, centre, channel, D: tl.constexpr, PARTS: tl.constexpr):
    """x - minus - centre, and x and -minus, float32 [P, D]; 0 behind the last channel."""
    inside = channel < D
    value = tl.load(row + channel, mask=inside, other=0.0).to(tl.float32)
    minus = tl.zeros_like(value)
    if PARTS > 1:
        minus = tl.load(row + room + channel, mask=inside, other=0.0).to(tl.float32)
    return value + minus - tl.load(centre + channel, mask=inside, other=0.0), value, minus


@triton.jit(do_not_specialize=["rows", "k", "unscreened"])
def detect_patches_screen_kernel(
    row_codes,  # [B * N, coded_room] int8, by slot
    coded,  # [3, B * N] float32, by slot
    codes,  # [L, CODES] int8
    bounds,  # [6, L] float32
    mask,  # [B, N] uint8, in and out: cleared where a survivor is refuted
    total,  # [1] int32: number of survivors
    value,  # [B * N] float32, by slot
    survivors,  # [3 + S, B * N] int32, by slot: owner; patch b * N + p; count so far
    states,  # [3, B * N] int32, zero, by slot; the first two out
    between,  # [B * N, words] int32, by slot, out
    rows,
    prefix,
    latents,
    k,
    unscreened,
    words,
    coded_room,
    CODES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The latents behind the prefix that exceed a survivor's value for certain, and those that may.

    Nothing where `unscreened` or less survive. The walk is that of `detect_patches_count_kernel`. Reads the
    dictionary's codes once per tile of survivors, a survivor's once per tile of latents; writes a bit a survivor and
    latent, and two counters a survivor and tile. A survivor that is refuted may keep bits that nobody has written.
    """
    tl.static_assert(INTERPRET or BLOCK_P > 32, "as of detect_patches_count_kernel")
    candidates = tl.load(total)
    if candidates > unscreened:
        kinds = tl.cast(rows, tl.int64)
        channel = tl.arange(0, BLOCK_D)
        WORDS: tl.constexpr = BLOCK_L // 32
        across = tl.cdiv(candidates, BLOCK_P)
        for tile in tl.range(
            tl.program_id(0),
            across * tl.cdiv(latents - prefix, BLOCK_L),
            tl.num_programs(0),
            disable_licm=True,
        ):
            slot = tile % across * BLOCK_P + tl.arange(0, BLOCK_P)
            listed = slot < candidates
            ahead = tl.load(survivors + 2 * kinds + slot, mask=listed, other=k)
            # Volatile, as other programs add to it: what depends on it is only whether work is spared.
            counted = ahead + tl.load(states + slot, mask=listed, other=0, volatile=True)
            if tl.min(counted, axis=0) < k:
                first = prefix + tile // across * BLOCK_L
                latent = tl.minimum(first + tl.arange(0, BLOCK_L), latents - 1)
                x_pointers = row_codes + tl.minimum(slot, candidates - 1).to(tl.int64)[:, None] * coded_room
                w_pointers = codes + latent.to(tl.int64)[None, :] * CODES
                units = tl.zeros([BLOCK_P, BLOCK_L], tl.int32)
                for start in range(0, coded_room, BLOCK_D):
                    x = tl.load(x_pointers + start + channel[None, :])
                    c = start + channel[:, None]
                    if CODES % BLOCK_D != 0:
                        w = tl.load(w_pointers + c, mask=c < CODES, other=0)
                    else:
                        w = tl.load(w_pointers + c)
                    units = tl.dot(x, w, units, out_dtype=tl.int32)
                scale = tl.load(coded + slot, mask=listed, other=0.0)
                inner = tl.load(coded + kinds + slot, mask=listed, other=0.0)
                outer = tl.load(coded + 2 * kinds + slot, mask=listed, other=0.0)
                limit = tl.load(value + slot, mask=listed, other=float("inf"))
                found = _compare(
                    *(units, scale, inner, outer, limit, bounds + first, tl.cast(latents, tl.int64)),
                    *(0, BLOCK_P, BLOCK_L),
                )
                low, high = tl.split(tl.reshape(found, [BLOCK_P, WORDS, 2]))
                word = tile // across * WORDS + tl.arange(0, WORDS)[None, :]
                # Of the last one only the bits of latents that there are.
                behind = tl.maximum(tl.minimum(latents - prefix - word * 32, 32), 0)
                known = tl.where(behind < 32, (tl.full([1, WORDS], 1, tl.int32) << (behind & 31)) - 1, -1)
                certain = ((low >> 16) & 0xFFFF | high & -65536) & known
                open = (low & 0xFFFF | high << 16) & known & (certain ^ -1)
                to = between + slot.to(tl.int64)[:, None] * words + word
                tl.store(to, open, mask=listed[:, None] & (word < words))
                certain, open = tl.sum(set_bits(certain), axis=1), tl.sum(set_bits(open), axis=1)
                before = tl.atomic_add(states + slot, certain, mask=listed, sem="relaxed")
                tl.atomic_add(states + kinds + slot, open, mask=listed, sem="relaxed")
                patch = tl.load(survivors + kinds + slot, mask=listed, other=0)
                refuted = listed & (ahead + before + certain >= k)
                tl.store(mask + patch, tl.zeros([BLOCK_P], tl.uint8), mask=refuted)


@triton.jit
def _compare(
    units,  # [P, L] int32, products of codes
    scale,  # [P] float32, as what follows
    inner,
    outer,
    limit,
    bounds,  # of the first latent of a tile
    kinds,  # from a bound to the next, int64
    FROM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Bits of a tile's COLUMNS latents from FROM on, 16 to an int32 [P, L / 16]: in the low half of those that may be
    above, in the high half of those that are for certain.

    In halves down to 16, as more latents' bounds would not fit in registers beside the sums.
    """
    if COLUMNS > 16:
        HALF: tl.constexpr = COLUMNS // 2
        one, other = tl.split(tl.permute(tl.reshape(units, [ROWS, 2, HALF]), [0, 2, 1]))
        found = _compare(one, scale, inner, outer, limit, bounds, kinds, FROM, ROWS, HALF)
        if COLUMNS == _FENCED:
            tl.debug_barrier()
        more = _compare(other, scale, inner, outer, limit, bounds, kinds, FROM + HALF, ROWS, HALF)
        found = tl.reshape(tl.permute(tl.join(found, more), [0, 2, 1]), [ROWS, COLUMNS // 16])
    else:
        # Behind the last latent these are of others, whose bits nobody keeps: a mask would take registers.
        column = tl.arange(0, 16)
        bounds += FROM
        unit = tl.load(bounds + column)[None, :]
        begin = tl.load(bounds + kinds + column)[None, :]
        coded = tl.load(bounds + 2 * kinds + column)[None, :]
        rest = tl.load(bounds + 3 * kinds + column)[None, :]
        slack = tl.load(bounds + 4 * kinds + column)[None, :]
        above = units.to(tl.float32) * scale[:, None] * unit + begin - limit[:, None]
        error = coded * inner[:, None] + (rest * outer[:, None] + slack)
        bit = (tl.full([16], 1, tl.int32) << column)[None, :]
        # What is no number may, whoever is the owner: the recheck leaves it out by its index.
        may = tl.where(above < -error, 0, bit)
        found = tl.sum(may + tl.where(above > error, bit << 16, 0), axis=1)[:, None]
    return found


def unscreened(rows: int) -> int:
    """Survivors of so many rows up to which none is screened: a single row of tiles, or so few of all rows that those
    that bounds leave undecided, which the first launch rarely refutes, are many of them."""
    return max(_LEAST, rows // _SHARE)


def fits_screen(x: Tensor, latents: int, prefix: int, able: tuple[int, int]) -> bool:
    """Whether survivors of `x` are screened: in half precision, where so many rows are worth it, and the dictionary is
    no smaller than a tile, which reads whole rows of bounds."""
    rows = x.shape[0] * x.shape[2:].numel()
    large = rows >= LEAST_ROWS and prefix < latents and latents >= screen_config(able).block_l
    return large and x.dtype != torch.float32


def screen_survivors(
    left: Survivors,
    screen: tuple[Tensor, Tensor, Tensor],  # codes, bounds and centre of `detect_patches`
    weight: Tensor,  # [L, d]
    bias: Tensor,  # [L] float32
    prefix: int,
    k: int,
    config: CountConfig,
    able: tuple[int, int],
) -> None:
    """Clears the mask of those survivors that k other latents exceed, in four launches: codes of their rows, products
    of codes, and what these leave open, in float32: single latents, or by the tiles of `config` all.

    Scratch: the codes, and a bit a survivor and latent behind the prefix; 24 bytes a survivor.
    """
    rows, (latents, channels) = left.value.shape[0], weight.shape
    device, tile, exact = weight.device, screen_config(able), unscreened(rows)
    (row_codes, bounds, centre), (many, few) = screen, config
    room = triton.cdiv(channels, many.block_d) * many.block_d
    parts = left.packed.shape[1] // room
    coded_room = triton.cdiv(channels, tile.block_d) * tile.block_d
    words = triton.cdiv(latents - prefix, 32)
    codes = torch.empty(rows, coded_room, dtype=torch.int8, device=device)
    coded = torch.empty(3, rows, dtype=torch.float32, device=device)
    between = torch.empty(rows, words, dtype=torch.int32, device=device)
    detect_patches_code_kernel[(min(triton.cdiv(rows, _CODED_P), programs(device, 4)),)](
        left.packed,
        left.total,
        centre,
        codes,
        coded,
        rows,
        exact,
        room,
        coded_room,
        D=channels,
        PARTS=parts,
        # As code_panel of csrc/cpu/screen.h: what sums of squares lack by rounding, and where squares vanish; and what
        # a sum of products may be off, of twice as many for an update.
        MORE=1.0 + (channels + 8) * 2.0**-23,
        TINY=2.0**-60 * channels**0.5,
        ROUNDING=(parts * channels + 64) * 2.0**-22,
        BLOCK_P=_CODED_P,
        BLOCK_D=min(_CODED_D, triton.next_power_of_2(coded_room)),
        num_warps=4,
        num_stages=1,
    )
    tiles = triton.cdiv(rows, tile.block_p) * triton.cdiv(latents - prefix, tile.block_l)
    detect_patches_screen_kernel[(min(tiles, programs(device, 1)),)](
        codes,
        coded,
        row_codes,
        bounds,
        left.mask,
        left.total,
        left.value,
        left.places,
        left.states,
        between,
        rows,
        prefix,
        latents,
        k,
        exact,
        words,
        coded_room,
        CODES=row_codes.shape[1],
        BLOCK_P=tile.block_p,
        BLOCK_L=tile.block_l,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    behind = rows, prefix, latents, k, exact, int(BUDGET * (latents - prefix))
    # Steps are as wide as registers hold: each waits for what it reads, and on older GPUs two programs hide that.
    wide = able >= (9, 0)
    detect_patches_pairs_kernel[(programs(device, 1 if wide else 2),)](
        left.packed,
        weight,
        bias,
        left.mask,
        left.total,
        left.value,
        left.places,
        left.states,
        between,
        *behind,
        words,
        room,
        *weight.stride(),
        *bias.stride(),
        D=channels,
        PARTS=parts,
        BLOCK_P=many.block_p,
        BLOCK_C=min(256 if wide else 32, triton.next_power_of_2(channels)),
        num_warps=8,
        num_stages=1,
    )
    detect_patches_count_kernel[(programs(device, 1),)](
        left.packed,
        weight,
        bias,
        left.mask,
        left.total,
        left.value,
        left.places,
        left.states,
        *behind,
        room,
        *weight.stride(),
        *bias.stride(),
        D=channels,
        PARTS=parts,
        PRECISION=precision(left.packed.dtype),
        MANY_P=many.block_p,
        MANY_L=many.block_l,
        FEW_P=few.block_p,
        FEW_L=few.block_l,
        BLOCK_D=many.block_d,
        SCREENED=True,
        num_warps=many.num_warps,
        num_stages=many.num_stages,
    )
