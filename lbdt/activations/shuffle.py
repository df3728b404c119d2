"""Pseudo-random permutations and hashes in integer arithmetic: the same on every device, and never held in memory."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 4


def mix(*values: int | Tensor) -> Tensor:
    """A 32-bit hash of integers, or element by element of int64 tensors (broadcast): int64 in [0, 2^32).

    Every value is taken in two 32-bit halves through MurmurHash3's finaliser (Appleby, public domain), which permutes
    32-bit words.
    """
    state = torch.tensor(0x9E3779B9, dtype=torch.int64)
    for value in values:
        value = torch.as_tensor(value, dtype=torch.int64)
        for half in (value & _WORD, (value >> 32) & _WORD):
            state = _finalise((state * 5 + 0xE6546B64 & _WORD).to(half.device) ^ half)
    return state


def _finalise(word: Tensor) -> Tensor:
    # Products wrap at 2^64, which leaves their low 32 bits right.
    word = (word ^ (word >> 16)) * 0x85EBCA6B & _WORD
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & _WORD
    return word ^ (word >> 16)


def permute(
    places: Tensor,  # [n] int64 in [0, size)
    size: int,
    key: int | Tensor,  # or [n] int64, one permutation per place
) -> Tensor:
    """Where the permutation of [0, size) that `key` names sends each place: [n] int64.

    A Feistel network over the next power of two, walked until it lands inside (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", CT-RSA 2002), so no table of `size` entries exists. At least half of that power lies
    inside, so two walks are enough on average.
    """
    if size < 1:
        raise ValueError(f"size: expected an integer >= 1, got {size}")
    bits = max(2, (size - 1).bit_length())
    key = torch.as_tensor(key, dtype=torch.int64)
    out = _network(places, bits, key)
    while True:
        outside = (out >= size).nonzero().squeeze(1)
        if not outside.numel():
            return out
        out[outside] = _network(out[outside], bits, key[outside] if key.dim() else key)


def _network(places: Tensor, bits: int, key: Tensor) -> Tensor:
    low = bits // 2
    left, right = places >> low, places & (1 << low) - 1
    for turn in range(_ROUNDS):
        left = left ^ (_finalise(mix(key, 2 * turn) ^ right) & (1 << bits - low) - 1)
        right = right ^ (_finalise(mix(key, 2 * turn + 1) ^ left) & (1 << low) - 1)
    return left << low | right
