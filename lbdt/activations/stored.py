"""Activations in a folder that `lbdt collect` wrote: a source, with quick access to single rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbdt.activations.prompts import MAX_BYTES, read_prompts
from lbdt.activations.shard_layout import SHA256, Layout
from lbdt.activations.sites import Site
from lbdt.activations.source import Shard, Source, label_places, require_site
from lbdt.runs.digests import raw, sha256
from lbdt.runs.reading import parse_json, read_bytes, read_json


class Stored(Source):
    """A complete folder of activations (`lbdt.activations.shard_layout`).

    Shards are mapped into memory, not copied; each is compared with its SHA-256 in the manifest when it is first used.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Checks settings, prompts, and that every shard is there in its size; the headers on first use.

        Raises ValueError naming the file, what was expected and what was got.
        """
        self.folder = Path(folder)
        self.settings, self._layout = read_settings(self.folder)
        self.labelled = tuple(read_prompts(self.folder / "prompts.jsonl"))
        self._check_prompts(self.folder / "prompts.jsonl")
        self.sites = tuple(self._layout.sites)
        self.concepts, self.styles = tuple(self.settings["concepts"]), tuple(self.settings["styles"])
        self.timesteps = self._layout.timesteps
        self.prompts, self.prompts_per_shard = self._layout.prompts, self._layout.prompts_per_shard
        self._labels = label_places(self.labelled, self.concepts, self.styles)
        self._maps: dict[int, Tensor] = {}
        self._sha256 = self._manifest()

    def width(self, site: Site) -> int:
        return self._entry(site)["width"]

    def patches(self, site: Site) -> int:
        return self._entry(site)["patches"]

    def rows(self, site: Site) -> int:
        """Number of rows at the site: prompts times timesteps times patches."""
        return self.prompts * len(self.timesteps) * self.patches(site)

    def origin(self) -> dict[str, Any]:
        return self.settings

    def labels(self) -> tuple[Tensor, Tensor]:
        return self._labels

    def shard(self, index: int, site: Site) -> Shard:
        require_site(self, site)
        if not 0 <= index < self._layout.shards:
            raise IndexError(f"shard {index}: expected one of {self._layout.shards}")
        x = self._tensor(index, f"x/{site}")
        if self.patches(site) < self._entry(site)["of"]:
            patches = self._tensor(index, f"patches/{site}")
        else:
            patches = torch.arange(x.shape[2], dtype=torch.int32).expand(x.shape[:3])
        first = index * self.prompts_per_shard
        concepts, styles = (label[first : first + x.shape[0]] for label in self._labels)
        return Shard(x, patches, concepts, styles)

    def gather(self, site: Site, rows: Tensor) -> Tensor:
        """Rows [n] int64, numbered ((prompt * T) + timestep) * M + patch -> [n, d], in the folder's dtype.

        Raises IndexError for rows outside of [0, rows(site)).
        """
        require_site(self, site)
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.rows(site):
            raise IndexError(
                f"rows: expected numbers in [0, {self.rows(site)}), got {int(rows.min())} to {int(rows.max())}"
            )
        out = torch.empty(len(rows), self.width(site), dtype=self._layout.dtype)
        each = self.prompts_per_shard * len(self.timesteps) * self.patches(site)
        # Ascending within a file, as a disk reads best.
        ordered, place = rows.sort()
        shards, counts = (ordered // each).unique_consecutive(return_counts=True)
        start = 0
        for index, count in zip(shards.tolist(), counts.tolist(), strict=True):
            mine = slice(start, start + count)
            x = self._tensor(index, f"x/{site}").flatten(0, 2)
            out[place[mine]] = x.index_select(0, ordered[mine] - index * each)
            start += count
        return out

    def _compare(self, index: int, got: str) -> None:
        if got != self._sha256[index]:
            raise ValueError(
                f"{self._layout.path(self.folder, index)}: expected SHA-256 {self._sha256[index][:12]}..., got "
                f"{got[:12]}...; the file is damaged: delete it, and run the same `lbdt collect` again"
            )

    def _entry(self, site: Site) -> dict[str, Any]:
        require_site(self, site)
        return self._layout.sites[site]

    def _start(self, index: int) -> int:
        """Checks the shard's header; where its tensors begin."""
        try:
            sha256 = self._layout.check(self.folder, index)
        except ValueError as error:
            raise ValueError(f"{error}; run the same `lbdt collect` again, which makes it anew") from error
        if sha256 != self._sha256[index]:
            raise ValueError(
                f"{self._layout.path(self.folder, index)}: expected SHA-256 {self._sha256[index][:12]}... by "
                f"manifest.json, got {sha256[:12]}...; delete manifest.json and run the same `lbdt collect` again"
            )
        return self._layout.size(index) - self._layout.data_size(index)

    def _tensor(self, index: int, name: str) -> Tensor:
        if index not in self._maps:
            start, path = self._start(index), self._layout.path(self.folder, index)
            # A private mapping: writing to a tensor does not change the file. It keeps no file open.
            size = self._layout.size(index)
            data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[start:]
            self._compare(index, sha256(raw(data)))
            self._maps[index] = data
        part = self._layout.parts(index)[name]
        return self._maps[index][part.start : part.end].view(part.dtype).view(part.shape)

    def _check_prompts(self, path: Path) -> None:
        data = read_bytes(path, MAX_BYTES)
        labels = [
            set(prompt.shown) <= set(self.settings["concepts"])
            and (prompt.style in self.settings["styles"] or prompt.style is None)
            for prompt in self.labelled
        ]
        if sha256(data) != self.settings["prompts_sha256"] or len(labels) != self._layout.prompts:
            raise ValueError(f"{path}: not the prompts of settings.json; damaged")
        if not all(labels):
            raise ValueError(f"{path}: has labels that settings.json has not; damaged")

    def _manifest(self) -> list[str]:
        path, again = self.folder / "manifest.json", "run the same `lbdt collect` again"
        if not path.is_file():
            made = sum(self._layout.path(self.folder, i).is_file() for i in range(self._layout.shards))
            raise ValueError(f"{self.folder}: incomplete, {made} of {self._layout.shards} shards; {again}")
        try:
            manifest = read_json(path)
            shards = manifest["shards"]
            if manifest["settings"] != self._layout.digest or len(shards) != self._layout.shards:
                raise ValueError("of other settings")
            sha256 = [shard["sha256"] for shard in shards]
            if not all(SHA256.fullmatch(digest) for digest in sha256):
                raise ValueError("not with the digests of its shards")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged ({error}); delete it, and {again}") from error
        for index in range(self._layout.shards):
            shard, expected = self._layout.path(self.folder, index), self._layout.size(index)
            got = shard.stat().st_size if shard.is_file() else None
            if got != expected:
                found = "nothing" if got is None else f"{got}"
                raise ValueError(f"{shard}: expected {expected} bytes, got {found}; {again}")
        return sha256


def read_settings(folder: Path) -> tuple[dict[str, Any], Layout]:
    """The settings of a folder, and its layout; ValueError where there are none."""
    path = folder / "settings.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no settings.json; expected a folder written by `lbdt collect`")
    data = read_bytes(path)
    settings = parse_json(data, str(path))
    try:
        return settings, Layout(settings, sha256(data))
    except ValueError as error:
        raise ValueError(
            f"{path}: not settings of `lbdt collect` ({error}); damaged, or written by another version"
        ) from error
