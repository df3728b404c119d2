"""A shard's sparse codes, bin by bin, and in which patches a selection is detected."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lbdt.runs.site_names import KINDS, may_be
from lbdt.sae import SparseCode
from lbdt.sae.config import MOVED

if TYPE_CHECKING:
    from lbdt.activations import Shard, Site, Source
    from lbdt.dictionary.selection import Selection
    from lbdt.sae import SparseAutoencoder


class Encoder:
    """Encodes shards where the SAE is; a context manager.

    On the CPU every bin is encoded on one thread, as many bins at a time as torch has threads: matrix products of
    small batches round differently on other numbers of threads, and sums must not depend on them.
    """

    def __init__(self, sae: SparseAutoencoder) -> None:
        self._sae = sae
        self._device = sae.encoder.weight.device
        self._threads = torch.get_num_threads()
        self._pool = None
        if self._device.type == "cpu" and self._threads > 1:
            self._pool = ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def codes(self, x: Tensor) -> Iterator[SparseCode]:
        """The T codes [P, M, k] of x [P, T, M, d], on the CPU, in order. ValueError on NaN or infinite activations.

        While they are taken torch runs on one thread.
        """
        with one_thread():
            waiting: deque = deque()
            for bin in range(x.shape[1]):
                if self._pool is None:
                    yield self._encode(x[:, bin])
                    continue
                waiting.append(self._pool.submit(self._encode, x[:, bin]))
                # A few ahead: all T codes of an SAE without a rank test could outgrow the memory.
                if len(waiting) > self._threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    @torch.no_grad()
    def _encode(self, x: Tensor) -> SparseCode:
        x = x.to(self._device)
        if not bool(torch.isfinite(x).all()):
            raise ValueError("activations: expected finite values, got NaN or infinity")
        return SparseCode(*(part.cpu() for part in self._sae.encode(x)))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on one CPU thread inside, so that results do not depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def labels(source: Source, by: str) -> tuple[str, ...]:
    """The source's names that a dictionary `by` "concepts" | "styles" is over. ValueError where there are none."""
    if by not in ("concepts", "styles"):
        raise ValueError(f"by: expected 'concepts' or 'styles', got {by!r}")
    names = source.concepts if by == "concepts" else source.styles
    if not names:
        raise ValueError(
            f"the activations carry no {by}; label the prompts (column {by[:-1]}) and collect again"
        )
    return tuple(names)


def labels_of(shard: Shard, by: str) -> Tensor:
    """[P] int64 on the CPU, places in `labels(source, by)`; -1: none."""
    return (shard.concepts if by == "concepts" else shard.styles).cpu()


def shown_names(source: Source, by: str, label: Tensor, first: int = 0) -> list[tuple[str, ...]]:
    """The names that each prompt from `first` on shows, several where it names several; `label` [P] int64: their places
    in `labels(source, by)`, -1: none."""
    if by == "concepts" and source.labelled is not None:
        return [prompt.shown for prompt in source.labelled[first : first + len(label)]]
    own = labels(source, by)
    return [(own[place],) if place >= 0 else () for place in label.tolist()]


def shown_in(source: Source, shard: Shard, index: int, names: Sequence[str], by: str) -> Tensor:
    """bool [P, C] on the CPU: which of `names` each prompt of shard `index` shows."""
    shown = shown_names(source, by, labels_of(shard, by), index * source.prompts_per_shard)
    return torch.tensor([[name in own for name in names] for own in shown], dtype=torch.bool)


def rows_by_label(shard: Shard, by: str) -> list[tuple[int, Tensor]]:
    """(place, prompts of the shard) for each label in it; unlabelled prompts are left out."""
    label = labels_of(shard, by)
    return [(place, (label == place).nonzero().squeeze(1)) for place in label.unique().tolist() if place >= 0]


def rows_of(code: SparseCode, rows: Tensor) -> SparseCode:
    """The code of some prompts [P, M, k]."""
    return SparseCode(code.values[rows], code.indices[rows])


def detected(code: SparseCode, selection: Selection, bin: int, num_latents: int) -> Tensor:
    """The patches in which a latent of `selection` passes its threshold of a bin: bool [...] of a code [..., k]."""
    limits = torch.full((num_latents,), torch.inf)
    limits[selection.latents] = selection.thresholds[bin]
    return (code.values > limits[code.indices]).any(-1)


def check_fit(source: Source, site: Site, sae: SparseAutoencoder) -> None:
    """ValueError unless the SAE is one of this site: width, kind, and the site that it names, if any."""
    from lbdt.activations.source import require_site

    require_site(source, site)
    if source.width(site) != sae.config.d_in:
        raise ValueError(
            f"site {site}: has activations of width {source.width(site)}, but the SAE was trained on "
            f"{sae.config.d_in}; give the SAE's own site"
        )
    if site.update != sae.config.update:
        raise ValueError(
            f"site {site}: the SAE was trained on the block's {KINDS[sae.config.update]}; give "
            f"{site.hookpoint}:{KINDS[sae.config.update]}"
        )
    if not may_be(sae.config.site, str(site)):
        raise ValueError(f"site {site}: the SAE was trained at {sae.config.site}; give that site, or {MOVED}")
