"""What hands activations to training and scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from lbdt.activations.prompts import Prompt
from lbdt.activations.sites import Site


class Shard(NamedTuple):
    """Activations of consecutive prompts at one site; conditional half only."""

    x: Tensor
    """[P, T, M, d], float16, bfloat16 or float32: M patches of each prompt's map at each timestep."""
    patches: Tensor
    """[P, T, M] int32: where on the map each lies, row by row, ascending."""
    concepts: Tensor
    """[P] int64, places in the source's `concepts`; -1: none, or several."""
    styles: Tensor
    """[P] int64, places in the source's `styles`; -1: none."""


@runtime_checkable
class Source(Protocol):
    """Activations in shards. Shard i is the same whenever and by whichever process it is asked for."""

    sites: tuple[Site, ...]
    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    timesteps: tuple[int, ...]
    """T values, strictly descending, rounded to whole numbers."""
    prompts: int
    """Number of prompts over all shards."""
    prompts_per_shard: int
    """The last shard may have fewer."""
    labelled: tuple[Prompt, ...] | None = None
    """The prompts, where they are known."""
    turn: list[Any] | None = None
    """The place of a part in a larger source (`lbdt.training.heldout.SourcePart`); None: no part."""

    def width(self, site: Site) -> int:
        """The width d at the site."""

    def patches(self, site: Site) -> int:
        """The number M of patches at the site."""

    def shard(self, index: int, site: Site) -> Shard:
        """Shard `index`, on the CPU (files, memory) or on the pipeline's device.

        Raises IndexError outside of [0, shards), ValueError for a site that is not in `sites`.
        """

    def origin(self) -> dict[str, Any] | None:
        """Everything that the activations (for a part: the larger source's) follow from, JSON-like; None: not known."""
        return None

    def labels(self) -> tuple[Tensor, Tensor]:
        """Every prompt's places in `concepts` and `styles`, two of [prompts] int64, on the CPU; -1: none."""
        shards = (self.shard(index, self.sites[0]) for index in range(shard_count(self)))
        concepts, styles = zip(*((shard.concepts.cpu(), shard.styles.cpu()) for shard in shards), strict=True)
        return torch.cat(concepts), torch.cat(styles)

    def gather(self, site: Site, rows: Tensor) -> Tensor:
        """Rows [n] int64, numbered ((prompt * T) + timestep) * M + patch -> [n, d], in the source's dtype."""
        each = self.prompts_per_shard * len(self.timesteps) * self.patches(site)
        return regrouped(rows // each, rows % each, lambda index: self.shard(index, site).x)


def shard_count(source: Source) -> int:
    """Number of shards of a source."""
    return -(-source.prompts // source.prompts_per_shard)


def label_places(
    prompts: Sequence[Prompt], concepts: Sequence[str], styles: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Every prompt's places in `concepts` and `styles`, two of [prompts] int64; -1: none, or several."""
    found = []
    for names, attribute in ((concepts, "label"), (styles, "style")):
        number = {None: -1} | {name: place for place, name in enumerate(names)}
        found.append(torch.tensor([number[getattr(p, attribute)] for p in prompts], dtype=torch.int64))
    return tuple(found)


def regrouped(part: Tensor, rows: Tensor, read: Callable[[int], Tensor]) -> Tensor:
    """Row `rows[i]` of `read(part[i])` [..., d] for every i: [n, d]. Every part is read once."""
    out: Tensor | None = None
    for index in part.unique().tolist():
        mine = (part == index).nonzero().squeeze(1)
        x = read(index)
        found = x.flatten(0, -2).index_select(0, rows[mine].to(x.device))
        out = found.new_empty(len(rows), found.shape[1]) if out is None else out
        out[mine.to(x.device)] = found
    return out


class InMemory(Source):
    """A source of activations that are at hand already, at one site; also for tests."""

    def __init__(
        self,
        x: Tensor,  # [prompts, T, M, d]
        *,
        site: Site,
        timesteps: Sequence[int],
        concepts: Sequence[str] = (),
        concept: Tensor | None = None,  # [prompts] int64, -1: none
        styles: Sequence[str] = (),
        style: Tensor | None = None,  # [prompts] int64, -1: none
        prompts_per_shard: int = 16,
    ) -> None:
        """Raises ValueError on shapes that do not fit."""
        if x.dim() != 4 or not x.numel() or x.shape[1] != len(timesteps):
            raise ValueError(
                f"x: expected [prompts, {len(timesteps)}, M, d] for {len(timesteps)} timesteps, got {tuple(x.shape)}"
            )
        if prompts_per_shard < 1:
            raise ValueError(f"prompts_per_shard: expected an integer >= 1, got {prompts_per_shard}")
        self.sites = (site,)
        self.timesteps = tuple(int(t) for t in timesteps)
        self.concepts, self.styles = tuple(concepts), tuple(styles)
        self.prompts, self.prompts_per_shard = x.shape[0], prompts_per_shard
        self._x = x
        self._concept = _labels("concept", concept, self.prompts, len(self.concepts))
        self._style = _labels("style", style, self.prompts, len(self.styles))

    def width(self, site: Site) -> int:
        require_site(self, site)
        return self._x.shape[3]

    def patches(self, site: Site) -> int:
        require_site(self, site)
        return self._x.shape[2]

    def shard(self, index: int, site: Site) -> Shard:
        require_site(self, site)
        if not 0 <= index < shard_count(self):
            raise IndexError(f"shard {index}: expected one of {shard_count(self)}")
        part = slice(index * self.prompts_per_shard, (index + 1) * self.prompts_per_shard)
        x = self._x[part]
        patches = torch.arange(x.shape[2], dtype=torch.int32).expand(x.shape[:3])
        return Shard(x, patches, self._concept[part], self._style[part])


def require_site(source: Source, site: Site) -> None:
    """ValueError naming the sites there are, unless `site` is one of them."""
    if site not in source.sites:
        known = ", ".join(map(str, source.sites))
        raise ValueError(f"site: the activations hold {known}; got {site}")


def _labels(name: str, given: Tensor | None, prompts: int, names: int) -> Tensor:
    if given is None:
        return torch.full((prompts,), -1, dtype=torch.int64)
    if tuple(given.shape) != (prompts,) or int(given.min()) < -1 or int(given.max()) >= names:
        raise ValueError(f"{name}: expected [{prompts}] places in [-1, {names}), got {given.tolist()[:8]}")
    return given.long()
