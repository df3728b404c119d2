"""How a shard of activations lies in its safetensors file: every byte follows from the settings and the tensors.

    FOLDER/settings.json               what the activations follow from; written first
    FOLDER/prompts.jsonl               the prompts with their labels and seeds
    FOLDER/shards/00000.safetensors    prompts 0 to 15, all sites: "x/SITE" [P, T, M, d] and, where patches were drawn,
                                       "patches/SITE" [P, T, M] int32
    FOLDER/manifest.json               bytes and SHA-256 of every shard; written last

The header's metadata has one entry, "lbdt": JSON with the shard's index, the digest of settings.json, and the SHA-256
of the tensors' bytes. safetensors' own writer is not used, as it makes a copy of everything and orders nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lbdt.activations.prompts import MAX_PROMPTS
from lbdt.activations.sites import Site
from lbdt.runs.reading import brief, listed, open_regular, parse_json
from lbdt.runs.wording import require_unicode

FORMAT = 1
SHA256 = re.compile("[0-9a-f]{64}")
DTYPES = {
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
    "float32": ("F32", torch.float32),
}


class ShardTensor(NamedTuple):
    """One tensor of a shard file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    end: int


class Layout:
    """The shard files of one folder's settings."""

    def __init__(self, settings: Mapping[str, Any], digest: str) -> None:
        """`digest`: of settings.json. Raises ValueError on settings of another format, or out of range."""
        if not isinstance(settings, Mapping) or settings.get("format") != FORMAT:
            got = brief(settings.get("format") if isinstance(settings, Mapping) else settings)
            raise ValueError(
                f"settings: expected format {FORMAT}, got {got}; written by another version of lbdt"
            )
        _check(settings)
        self.digest = digest
        self.prompts, self.prompts_per_shard = settings["prompts"], settings["prompts_per_shard"]
        self.timesteps = tuple(settings["timesteps"])
        self.shards = -(-self.prompts // self.prompts_per_shard)
        self.sites = {Site.parse(entry["site"]): entry for entry in settings["sites"]}
        self.code, self.dtype = DTYPES[settings["dtype"]]
        self._parts: dict[int, dict[str, ShardTensor]] = {}

    def path(self, folder: Path, index: int) -> Path:
        """Where shard `index` lies."""
        return folder / "shards" / f"{index:05d}.safetensors"

    def parts(self, index: int) -> dict[str, ShardTensor]:
        """The tensors of shard `index`, in their order; the int32 ones first, so that all are aligned."""
        prompts = min(self.prompts_per_shard, self.prompts - index * self.prompts_per_shard)
        if prompts not in self._parts:
            self._parts[prompts] = self._layout(prompts)
        return self._parts[prompts]

    def _layout(self, prompts: int) -> dict[str, ShardTensor]:
        shapes: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        for site, entry in self.sites.items():
            shape = (prompts, len(self.timesteps), entry["patches"])
            if entry["patches"] < entry["of"]:
                shapes.append((f"patches/{site}", torch.int32, shape))
            shapes.append((f"x/{site}", self.dtype, (*shape, entry["width"])))
        shapes.sort(key=lambda item: item[1] != torch.int32)
        parts, start = {}, 0
        for name, dtype, shape in shapes:
            end = start + math.prod(shape) * dtype.itemsize
            parts[name] = ShardTensor(dtype, shape, start, end)
            start = end
        return parts

    def header(self, index: int, data_sha256: str) -> bytes:
        """The bytes of shard `index` before its tensors."""
        about = {"index": index, "settings": self.digest, "sha256": data_sha256}
        header: dict[str, Any] = {"__metadata__": {"lbdt": json.dumps(about)}}
        for name, part in self.parts(index).items():
            code = "I32" if part.dtype == torch.int32 else self.code
            header[name] = {
                "dtype": code,
                "shape": list(part.shape),
                "data_offsets": [part.start, part.end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def size(self, index: int) -> int:
        """Bytes of shard `index`."""
        return len(self.header(index, "0" * 64)) + self.data_size(index)

    def data_size(self, index: int) -> int:
        """Bytes of its tensors."""
        return max(part.end for part in self.parts(index).values())

    def check(self, folder: Path, index: int) -> str:
        """SHA-256 that shard `index` says its tensors' bytes have.

        Raises ValueError naming the file, what was expected and what was got: missing, of another size, of another
        header (damaged, or not of these settings). The tensors' bytes are not read.
        """
        path, expected = self.path(folder, index), self.size(index)
        with open_regular(path, "a shard of activations") as file:
            got = os.fstat(file.fileno()).st_size
            if got != expected:
                raise ValueError(f"{path}: expected {expected} bytes, got {got}; truncated or foreign")
            try:
                head = file.read(expected - self.data_size(index))
            except OSError as error:
                raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        try:
            about = parse_json(parse_json(head[8:], "header")["__metadata__"]["lbdt"], "header")
            data_sha256, settings = about["sha256"], about["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: its header is damaged") from error
        if settings != self.digest:
            raise ValueError(
                f"{path}: expected a shard of settings {self.digest[:12]}, got one of {brief(settings, 12)}"
            )
        if not isinstance(data_sha256, str) or head != self.header(index, data_sha256):
            raise ValueError(
                f"{path}: expected shard {index} as {len(head)} bytes of header describe, got another"
            )
        return data_sha256


def _check(settings: Mapping[str, Any]) -> None:
    """ValueError naming the entry that is missing or not as `lbdt collect` writes it."""
    for name in ("prompts", "prompts_per_shard"):
        _integer(name, settings.get(name), 1, MAX_PROMPTS)
    for name in ("concepts", "styles"):
        names = _distinct(name, settings.get(name), str)
        for label in names:
            require_unicode(name, label)
    for timestep in _distinct("timesteps", settings.get("timesteps"), int):
        _integer("timesteps", timestep, -(2**31), 2**31)
    if not settings["timesteps"]:
        raise ValueError("timesteps: expected one or more, got none")
    if not isinstance(settings.get("dtype"), str) or settings["dtype"] not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}; got {brief(settings.get('dtype'))}")
    sha256 = settings.get("prompts_sha256")
    if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        raise ValueError(f"prompts_sha256: expected 64 hexadecimal digits, got {brief(sha256)}")
    entries = settings.get("sites")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"sites: expected a list of one or more objects, got {brief(entries)}")
    for entry in entries:
        if not isinstance(entry.get("site"), str):
            raise ValueError(f"sites: site: expected a hookpoint, got {brief(entry.get('site'))}")
        _integer("sites: width", entry.get("width"), 1, 2**31)
        _integer("sites: of", entry.get("of"), 1, 2**31)
        _integer("sites: patches", entry.get("patches"), 1, entry["of"])
    _distinct("sites", [str(Site.parse(entry["site"])) for entry in entries], str)


def _integer(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}: expected an integer from {least} to {most}, got {brief(value)}")


def _distinct(name: str, values: Any, kind: type) -> list[Any]:
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise ValueError(f"{name}: expected a list of {kind.__name__}, got {brief(values)}")
    if len(set(values)) < len(values):
        raise ValueError(f"{name}: expected each once, got {listed(values)}")
    return values
