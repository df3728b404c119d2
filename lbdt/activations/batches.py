"""Training batches of a source's activations; every batch is a pure function of the settings and its step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lbdt.activations.shuffle import mix, permute
from lbdt.activations.sites import Site
from lbdt.activations.source import Shard, Source, regrouped, require_site, shard_count

GIB = 1 << 30
PAIRED = ("concepts", "styles", "both")
"""What maps that come in twos have in common."""


class Samples(NamedTuple):
    """Whole maps of single prompts at single timesteps, with the prompts' labels."""

    x: Tensor
    """[S, M, d], in the source's dtype."""
    concepts: Tensor
    """[S] int64, places in the source's `concepts`; -1: none."""
    styles: Tensor
    """[S] int64, places in the source's `styles`; -1: none."""


class Batches:
    """Batches of activations that are at hand: files, memory, or a source small enough to be loaded.

    Rows are numbered ((prompt * T) + timestep) * M + patch. Step s takes the places [s * size, (s + 1) * size) of an
    endless sequence, which runs through all rows once an epoch in an order of its own; maps likewise.
    """

    def __init__(self, source: Source, site: Site, seed: int = 0, memory: int = 2 * GIB) -> None:
        """Loads everything where it takes at most `memory` bytes; else rows are gathered as they are asked for.

        Raises ValueError for a site that the source does not hold.
        """
        require_site(source, site)
        self.source, self.site, self.seed = source, site, seed
        self.patches, self.width = source.patches(site), source.width(site)
        self.maps = source.prompts * len(source.timesteps)
        """Pairs of prompt and timestep."""
        self.total = self.maps * self.patches
        """Rows of an epoch."""
        self.labels = source.labels()
        self._pairs: dict[str, Tensor] = {}
        first = source.shard(0, site).x
        self._x: Tensor | None = None
        if self.total * self.width * first.element_size() <= memory:
            self._x = _load(source, site, first.dtype)

    def rows(self, step: int, size: int) -> Tensor:
        """[size, d], in the source's dtype."""
        rows = _places(step, size, self.total, mix(self.seed, 0))
        return self._rows(rows)

    def samples(self, step: int, count: int, pairs: str | None = None) -> Samples:
        """`count` maps, each of one prompt at one timestep; `pairs`: an even number of them, in twos of `paired`.

        Raises ValueError where no two maps have the same of these labels.
        """
        if pairs is None:
            maps = _places(step, count, self.maps, mix(self.seed, 1))
        else:
            if pairs not in self._pairs:
                self._pairs[pairs] = paired(*self.labels, len(self.source.timesteps), pairs)
            maps = _pairs_at(step, count, self._pairs[pairs], mix(self.seed, 5))
        rows = maps.unsqueeze(1) * self.patches + torch.arange(self.patches)
        prompts = maps // len(self.source.timesteps)
        x = self._rows(rows.flatten()).view(-1, self.patches, self.width)
        return Samples(x, *(label[prompts] for label in self.labels))

    def _rows(self, rows: Tensor) -> Tensor:
        if self._x is not None:
            return self._x.index_select(0, rows)
        return self.source.gather(self.site, rows)


class Stream:
    """Batches straight from a source that makes its shards when asked, with a few of them held at a time.

    Shards come in an endless sequence, all of them once an epoch, in an order of its own. Step s draws from the
    `window` shards from place s // steps_per_shard on; rows and maps repeat only after all in the window were handed
    out. A resumed run makes its window again and sees the same batches.
    """

    def __init__(
        self, source: Source, site: Site, seed: int = 0, window: int = 4, steps_per_shard: int = 8
    ) -> None:
        """Raises ValueError for a site that the source does not hold, and for settings below 1."""
        require_site(source, site)
        for name, value in (("window", window), ("steps_per_shard", steps_per_shard)):
            if value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value}")
        self.source, self.site, self.seed = source, site, seed
        self.patches, self.width = source.patches(site), source.width(site)
        self.window, self.steps_per_shard = min(window, shard_count(source)), steps_per_shard
        self.total = source.prompts * len(source.timesteps) * self.patches
        self._held: dict[int, Shard] = {}

    def rows(self, step: int, size: int) -> Tensor:
        """[size, d], in the source's dtype and on its device."""
        shards, turn = self._at(step)
        each = len(self.source.timesteps) * self.patches
        part, row = _within(shards, each, turn, size, mix(self.seed, 3, step // self.steps_per_shard))
        return regrouped(part, row, lambda index: shards[index].x)

    def samples(self, step: int, count: int, pairs: str | None = None) -> Samples:
        """`count` maps, each of one prompt at one timestep; `pairs`: an even number of them, in twos of `paired` among
        those in the window.

        Raises ValueError where no two maps there have the same of these labels.
        """
        shards, turn = self._at(step)
        steps, key = len(self.source.timesteps), step // self.steps_per_shard
        if pairs is None:
            part, at = _within(shards, steps, turn, count, mix(self.seed, 4, key))
        else:
            labels = (
                torch.cat([getattr(shard, name).cpu() for shard in shards]) for name in ("concepts", "styles")
            )
            maps = _pairs_at(turn, count, paired(*labels, steps, pairs), mix(self.seed, 6, key))
            part, at = _split(maps, _ends(shards, steps))
        rows = at.unsqueeze(1) * self.patches + torch.arange(self.patches)
        parts = part.unsqueeze(1).expand_as(rows)
        x = regrouped(parts.flatten(), rows.flatten(), lambda index: shards[index].x)
        prompts = at // steps
        concepts, styles = (
            regrouped(part, prompts, lambda index, name=name: getattr(shards[index], name).unsqueeze(1))
            for name in ("concepts", "styles")
        )
        return Samples(x.view(-1, self.patches, self.width), concepts.squeeze(1), styles.squeeze(1))

    def _at(self, step: int) -> tuple[list[Shard], int]:
        """The shards that step `step` draws from, and which of their steps it is."""
        if step < 0:
            raise ValueError(f"step: expected an integer >= 0, got {step}")
        first, turn = divmod(step, self.steps_per_shard)
        wanted = range(first, first + self.window)
        self._held = {place: shard for place, shard in self._held.items() if place in wanted}
        order = _places(0, self.window, shard_count(self.source), mix(self.seed, 2), first).tolist()
        for place, index in zip(wanted, order, strict=True):
            if place not in self._held:
                self._held[place] = self.source.shard(index, self.site)
        return [self._held[place] for place in wanted], turn


def _places(step: int, count: int, total: int, key: Tensor, start: int = 0) -> Tensor:
    """Places [count] int64 in [0, total) of one batch of an endless sequence, all of them once an epoch."""
    if step < 0 or count < 1:
        raise ValueError(f"step, size: expected a step >= 0 and a size >= 1, got {step} and {count}")
    at = torch.arange(count) + (start + step * count)
    epochs = at // total
    if int(epochs[0]) == int(epochs[-1]):  # a single key is many times quicker
        epochs = epochs[0]
    return permute(at % total, total, mix(key, epochs))


def _within(shards: list[Shard], each: int, turn: int, count: int, key: Tensor) -> tuple[Tensor, Tensor]:
    """Places [count] int64 among shards of `each` entries a prompt: which shard, and which of its entries."""
    ends = _ends(shards, each)
    return _split(_places(turn, count, int(ends[-1]), key), ends)


def _ends(shards: list[Shard], each: int) -> Tensor:
    """Where the entries of each shard end, of `each` a prompt, counted through all shards."""
    return torch.tensor([shard.x.shape[0] * each for shard in shards]).cumsum(0)


def _split(at: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Entries that are counted through all shards: which shard, and which of its entries."""
    part = torch.searchsorted(ends, at, right=True)
    return part, at - torch.cat([ends.new_zeros(1), ends])[part]


def paired(
    concepts: Tensor,  # [P] int64, -1: none
    styles: Tensor,  # [P] int64, -1: none
    timesteps: int,
    by: str,
) -> Tensor:  # [K, 2] int64
    """Maps, prompt * T + timestep, in twos of the same concept, style, or both: two prompts at the same timestep, and
    where a label's are odd in number one prompt and another at the next timestep. So SAEParate pairs them. What has no
    label, or not both, is paired among itself; of an odd number of maps one is left out."""
    if by == "both":
        labels = concepts * (int(styles.max()) + 1) + styles
        labels = labels.where((concepts >= 0) & (styles >= 0), -1)
    else:
        labels = {"concepts": concepts, "styles": styles}[by]
    label = labels.repeat_interleave(timesteps)
    timestep = torch.arange(timesteps).repeat(labels.shape[0])
    order = torch.argsort(label * timesteps + timestep, stable=True)
    _, group, sizes = torch.unique_consecutive(label[order], return_inverse=True, return_counts=True)
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[group]
    first = ((place % 2 == 0) & (place + 1 < sizes[group])).nonzero().squeeze(1)
    return torch.stack([order[first], order[first + 1]], dim=1)


def _pairs_at(step: int, count: int, pairs: Tensor, key: Tensor) -> Tensor:
    """The maps [count] of a batch, count rounded down to an even number >= 2."""
    if not len(pairs):
        raise ValueError("pairs: no two maps have the same label; collect several prompts of each")
    return pairs[_places(step, max(1, count // 2), len(pairs), key)].flatten()


def _load(source: Source, site: Site, dtype: torch.dtype) -> Tensor:
    """Every row [rows, d], on the CPU."""
    shape = (source.prompts, len(source.timesteps), source.patches(site), source.width(site))
    out = torch.empty(shape, dtype=dtype)
    for index in range(shard_count(source)):
        first = index * source.prompts_per_shard
        out[first : first + source.prompts_per_shard] = source.shard(index, site).x
    return out.flatten(0, 2)
