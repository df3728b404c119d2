"""Prompts kept out of training, to say how well an SAE explains what it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lbdt.activations import Shard, Site, Source
from lbdt.activations.source import shard_count

_STRIDE = 7
_T = TypeVar("_T")


class SourcePart(Source):
    """A source with some prompts of every shard of another one: the same places in each but for a turn by `_STRIDE`,
    so that prompts in an order of concepts or styles are drawn from all of them."""

    def __init__(self, source: Source, held: int, keep: bool) -> None:
        """`held` prompts of a full shard are held out; `keep`: this is the part for training."""
        self._source, self._held, self._keep = source, held, keep
        self.turn = [held, keep]
        self.sites, self.concepts, self.styles = source.sites, source.concepts, source.styles
        self.timesteps = source.timesteps
        places = [self._places(index) for index in range(shard_count(source))]
        first = [index * source.prompts_per_shard for index in range(shard_count(source))]
        self._all = torch.cat([place + start for place, start in zip(places, first, strict=True)])
        if source.labelled is not None:
            self.labelled = tuple(source.labelled[prompt] for prompt in self._all.tolist())
        self.prompts = len(self._all)
        self.prompts_per_shard = source.prompts_per_shard - held if keep else held

    def width(self, site: Site) -> int:
        return self._source.width(site)

    def patches(self, site: Site) -> int:
        return self._source.patches(site)

    def origin(self) -> dict[str, Any] | None:
        return self._source.origin()

    def labels(self) -> tuple[Tensor, Tensor]:
        concepts, styles = self._source.labels()
        return concepts[self._all], styles[self._all]

    def shard(self, index: int, site: Site) -> Shard:
        if not 0 <= index < shard_count(self):
            raise IndexError(f"shard {index}: expected one of {shard_count(self)}")
        shard = self._source.shard(index, site)
        places = self._places(index).to(shard.x.device)
        return Shard(*(tensor[places.to(tensor.device)] for tensor in shard))

    def gather(self, site: Site, rows: Tensor) -> Tensor:
        each = len(self.timesteps) * self.patches(site)
        return self._source.gather(site, self._all[rows // each] * each + rows % each)

    def _places(self, index: int) -> Tensor:
        """Prompts of shard `index` of the whole source that are in this part, ascending."""
        size = self._source.prompts_per_shard
        count = min(size, self._source.prompts - index * size)
        out = torch.zeros(size, dtype=torch.bool)
        out[(torch.arange(self._held) * size // self._held + index * _STRIDE) % size] = True
        return (out != self._keep)[:count].nonzero().squeeze(1)


def split(source: Source, share: float) -> tuple[Source, Source]:
    """The part for training and the held-out one, with about `share` of the prompts, at least one of a shard.

    Raises:
        ValueError: shards of a single prompt, or a share that leaves none on one side.
    """
    size = source.prompts_per_shard
    held = max(1, round(share * size))
    if not 0 < share < 1 or held >= size:
        raise ValueError(
            f"held-out share: expected one in (0, 1) that leaves prompts on both sides of shards of {size}; got "
            f"{share}. Give held-out activations of their own instead"
        )
    parts = SourcePart(source, held, keep=True), SourcePart(source, held, keep=False)
    if not parts[1].prompts or not parts[0].prompts:
        raise ValueError(
            f"held-out share: {source.prompts} prompts are too few to hold some out; give held-out activations of "
            "their own instead"
        )
    return parts


def split_prompts(prompts: Sequence[_T], share: float) -> tuple[list[_T], list[_T]]:
    """The prompts for training, and those held out: about `share` of them, at least one, spread evenly but for a turn.

    Raises:
        ValueError: fewer than two prompts, or a share outside of (0, 1).
    """
    if not 0 < share < 1 or len(prompts) < 2:
        raise ValueError(
            f"held-out share: expected one in (0, 1) of two or more prompts; got {share} of {len(prompts)}"
        )
    every = max(2, round(1 / share))
    out = {
        start + (start // every * _STRIDE) % min(every, len(prompts) - start)
        for start in range(0, len(prompts), every)
    }
    if len(out) > 1 and len(prompts) % every:
        out.discard(max(out))
    return (
        [prompt for place, prompt in enumerate(prompts) if place not in out],
        [prompt for place, prompt in enumerate(prompts) if place in out],
    )
