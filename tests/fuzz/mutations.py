"""What becomes of valid files: bytes flipped, cut, doubled and spliced, and changes that their own format survives."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch

RAW = {
    "@deep@": "[" * 5000 + "]" * 5000,
    "@huge@": "1e999",
    "@digits@": "9" * 5000,
    "@twice@": '{"a": 1, "a": 2}',
}
"""Written by hand, where `json.dumps` has no such value."""
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 0.5, 1e38, 1e39, -1e300),
    *(float("nan"), float("inf"), "", "a", "\ud800", "a\0b", "a\nb", "x" * 5000, [], {}, [[[]]], {"a": []}),
    *(["a", "a"], [1, 2], [0.5], {"": None}, {"__class__": 1}, *RAW),
]
_WORDS = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\x80\x04",
    b"{",
    b"[",
    b"-",
    b"\n",
    b"9" * 30,
    b"nan",
    b"PK\x05\x06",
]


def blind(data: bytes, chance: random.Random) -> bytes:
    """Bytes changed without a look at what they mean."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        place = chance.randrange(len(changed) + 1)
        end = min(len(changed), place + chance.choice((1, 1, 2, 4, 8, 64)))
        match chance.randrange(6):
            case 0:
                changed[place:end] = chance.randbytes(end - place)
            case 1:
                del changed[place:end]
            case 2:
                del changed[place:]
            case 3:
                changed[place:place] = chance.choice(_WORDS)
            case 4:
                other = chance.randrange(len(changed) + 1)
                changed[place:end] = changed[other : other + 64]
            case _:
                for at in range(place, end):
                    changed[at] ^= 1 << chance.randrange(8)
    return bytes(changed)


def value(given: Any, chance: random.Random) -> Any:
    """A JSON-like value with one of its parts changed."""
    if isinstance(given, (dict, list)) and given and chance.random() < 0.85:
        copy = given.copy()
        key = chance.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        match chance.randrange(8):
            case 0:
                del copy[key]
            case 1 if isinstance(copy, dict):
                copy[chance.choice(["", "new", "x" * 3000, "\ud800", *copy])] = chance.choice(VALUES)
            case 1:
                copy.insert(key, chance.choice([*VALUES, copy[key]]))
            case 2:
                copy[key] = chance.choice(VALUES)
            case _:
                copy[key] = value(copy[key], chance)
        return copy
    return chance.choice(VALUES)


def text(data: bytes, chance: random.Random) -> bytes:
    """A JSON file with a part changed, still JSON or nearly."""
    changed = json.dumps(value(json.loads(data), chance))
    for name, raw in RAW.items():
        changed = changed.replace(f'"{name}"', raw)
    return changed.encode()


def line(data: bytes, chance: random.Random) -> bytes:
    """A file of JSON lines with one of them changed, doubled or taken out."""
    lines = data.splitlines(keepends=True)
    at = chance.randrange(len(lines))
    lines[at : at + 1] = [[text(lines[at], chance) + b"\n"], lines[at : at + 1] * 2, []][
        chance.choice((0, 0, 0, 1, 2))
    ]
    return b"".join(lines)


def header(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header is changed, its length with it."""
    length = struct.unpack("<Q", data[:8])[0]
    changed = text(data[8 : 8 + length], chance)
    return struct.pack("<Q", len(changed)) + changed + data[8 + length :]


def tensors(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file of other tensors: another dtype, shape, value or name."""
    state = safetensors.torch.load(data)
    with_metadata = struct.unpack("<Q", data[:8])[0]
    metadata = json.loads(data[8 : 8 + with_metadata]).get("__metadata__")
    if not state:
        return data
    name = chance.choice(sorted(state))
    state[name] = _tensor(state[name], chance)
    if chance.random() < 0.1:
        state[chance.choice(["", "new", "x" * 3000, "a\nb"])] = state.pop(name)
    return safetensors.torch.save({key: t.contiguous() for key, t in state.items()}, metadata)


def _tensor(given: torch.Tensor, chance: random.Random) -> torch.Tensor:
    match chance.randrange(4):
        case 0:
            dtypes = (
                "float64",
                "float16",
                "bfloat16",
                "int64",
                "uint8",
                "bool",
                "float8_e4m3fn",
                "complex64",
            )
            real = given.real if given.is_complex() else given
            return real.to(getattr(torch, chance.choice(dtypes)))
        case 1:
            shapes = [(0,), (), (1,), given.shape[:-1], (*given.shape, 1), given.shape[::-1]]
            return given.new_ones(chance.choice(shapes))
        case _:
            changed = given.double() if given.is_floating_point() and chance.random() < 0.7 else given.clone()
            extreme = (float("nan"), float("inf"), 1e300, -1e300, 1e38, -1.0, 0.0)
            whole = (-1, 2**62, -(2**62), 0) if changed.dtype == torch.int64 else (-1, 0, 1)
            if changed.numel():
                changed.view(-1)[chance.randrange(changed.numel())] = chance.choice(
                    extreme if changed.is_floating_point() else whole
                )
            return changed


def entry(data: bytes, chance: random.Random) -> bytes:
    """A zip file with an entry changed, its checksum with it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = chance.choice([name for name in entries if name.endswith("data.pkl")] * 4 + sorted(entries))
    entries[name] = blind(entries[name], chance)
    if chance.random() < 0.1:
        entries[f"{name}2"] = entries.pop(name)
    out = io.BytesIO()
    with zipfile.ZipFile(
        out, "w", chance.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))
    ) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return out.getvalue()


OWN: dict[str, tuple[Callable[[bytes, random.Random], bytes], ...]] = {
    ".json": (text, text, text),
    ".jsonl": (line, line, line),
    ".safetensors": (header, tensors, tensors),
    ".ckpt": (header, tensors, tensors),
    ".pth": (entry, entry, entry),
}


def mutate(name: str, data: bytes, chance: random.Random) -> bytes:
    """A file's bytes, changed in a way that fits its name, or blindly where they are no longer of its form."""
    change = chance.choice((blind, *OWN.get(name[name.rindex(".") :], ())))
    try:
        return change(data, chance)
    except Exception:  # whatever json, zipfile and safetensors raise
        return blind(data, chance)
