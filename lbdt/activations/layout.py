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

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbdt.activations.sites import Site

FORMAT = 1
DTYPES = {
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
    "float32": ("F32", torch.float32),
}
_HEADER_LIMIT = 1 << 24


class Part(NamedTuple):
    """One tensor of a shard file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    end: int


class Layout:
    """The shard files of one folder's settings."""

    def __init__(self, settings: Mapping[str, Any], digest: str) -> None:
        """`digest`: of settings.json. Raises ValueError on settings of another format."""
        if settings.get("format") != FORMAT:
            raise ValueError(
                f"settings: expected format {FORMAT}, got {settings.get('format')!r}; written by another version "
                "of lbdt"
            )
        self.digest = digest
        self.prompts, self.prompts_per_shard = settings["prompts"], settings["prompts_per_shard"]
        self.timesteps = tuple(settings["timesteps"])
        self.shards = -(-self.prompts // self.prompts_per_shard)
        self.sites = {Site.parse(entry["site"]): entry for entry in settings["sites"]}
        self.code, self.dtype = DTYPES[settings["dtype"]]
        self._parts: dict[int, dict[str, Part]] = {}

    def path(self, folder: Path, index: int) -> Path:
        """Where shard `index` lies."""
        return folder / "shards" / f"{index:05d}.safetensors"

    def parts(self, index: int) -> dict[str, Part]:
        """The tensors of shard `index`, in their order; the int32 ones first, so that all are aligned."""
        prompts = min(self.prompts_per_shard, self.prompts - index * self.prompts_per_shard)
        if prompts not in self._parts:
            self._parts[prompts] = self._layout(prompts)
        return self._parts[prompts]

    def _layout(self, prompts: int) -> dict[str, Part]:
        shapes: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        for site, entry in self.sites.items():
            shape = (prompts, len(self.timesteps), entry["patches"])
            if entry["patches"] < entry["of"]:
                shapes.append((f"patches/{site}", torch.int32, shape))
            shapes.append((f"x/{site}", self.dtype, (*shape, entry["width"])))
        shapes.sort(key=lambda item: item[1] != torch.int32)
        parts, start = {}, 0
        for name, dtype, shape in shapes:
            end = start + torch.Size(shape).numel() * dtype.itemsize
            parts[name] = Part(dtype, shape, start, end)
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
        try:
            with path.open("rb") as file:
                got = os.fstat(file.fileno()).st_size
                if got != expected:
                    raise ValueError(f"{path}: expected {expected} bytes, got {got}; truncated or foreign")
                head = file.read(expected - self.data_size(index))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        try:
            about = json.loads(json.loads(head[8:])["__metadata__"]["lbdt"])
            data_sha256, settings = about["sha256"], about["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: its header is damaged") from error
        if settings != self.digest:
            raise ValueError(
                f"{path}: expected a shard of settings {self.digest[:12]}, got one of {str(settings)[:12]}"
            )
        if not isinstance(data_sha256, str) or head != self.header(index, data_sha256):
            raise ValueError(
                f"{path}: expected shard {index} as {len(head)} bytes of header describe, got another"
            )
        return data_sha256


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def digest_of(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
