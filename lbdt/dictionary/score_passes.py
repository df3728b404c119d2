"""The passes of `score` over a source: what each adds up, and how one is run, resumed and gathered."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from lbdt.activations.shuffle import mix
from lbdt.dictionary.calibration import Calibration
from lbdt.dictionary.encoding import Encoder, detected, rows_by_label, rows_of, shown_in
from lbdt.dictionary.statistics import ConceptStatistics
from lbdt.reference.detect_patches import QUARTERS

if TYPE_CHECKING:
    from lbdt.activations import Site, Source
    from lbdt.dictionary.score_state import ScoreState
    from lbdt.dictionary.selection import Selection

EMPTY = 2**63 - 1
"""The priority of a place of the bank without a patch."""


class Pass(Protocol):
    """Something added up over shards, exactly, so that order and parts do not matter."""

    name: str

    def feed(self, index: int) -> None:
        """Adds a shard."""

    def tensors(self) -> dict[str, Tensor]:
        """All that was added up."""

    def join(self, tensors: Mapping[str, Tensor]) -> None:
        """Adds what another process, or an interrupted run, had added up."""


class StatisticsPass:
    """`ConceptStatistics` of a source's labelled prompts."""

    name = "statistics"

    def __init__(
        self, source: Source, site: Site, by: str, names: Sequence[str], encoder: Encoder, latents: int
    ) -> None:
        self._source, self._site, self._by, self._encoder = source, site, by, encoder
        self.statistics = ConceptStatistics(names, source.timesteps, latents)

    def feed(self, index: int) -> None:
        _feed(self.statistics, self._source, self._site, self._by, self._encoder, index)

    def tensors(self) -> dict[str, Tensor]:
        s = self.statistics
        peak = torch.tensor([s.peak], dtype=torch.float64)
        return {"units": s.units, "counts": s.counts, "fired": s.fired, "peak": peak}

    def join(self, tensors: Mapping[str, Tensor]) -> None:
        mine = self.statistics
        other = ConceptStatistics(mine.concepts, mine.timesteps, mine.num_latents)
        other.units, other.counts, other.fired = (tensors[name] for name in ("units", "counts", "fired"))
        other.peak = float(tensors["peak"])
        self.statistics = mine.merge(other)


class CalibrationPass:
    """`Calibration` of a dictionary's candidates."""

    name = "calibration"

    def __init__(
        self, source: Source, site: Site, by: str, encoder: Encoder, calibration: Calibration
    ) -> None:
        self._source, self._site, self._by, self._encoder = source, site, by, encoder
        self.calibration = calibration

    def feed(self, index: int) -> None:
        _feed(self.calibration, self._source, self._site, self._by, self._encoder, index)

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self.calibration.histograms))

    def join(self, tensors: Mapping[str, Tensor]) -> None:
        mine = self.calibration.histograms
        # Another processor may round the edges or choose candidates otherwise; then counts do not add up.
        self.calibration.histograms = type(mine)(**tensors).merge(mine)


class Bank:
    """Embeddings of undetected patches, for feature maps in which every patch is detected.

    Kept are the M patches of lowest priority seen so far per bin: a uniform draw without replacement, in memory of M
    patches. A patch's priority is a hash of (seed, prompt, timestep, patch), so the draw is the same in any order, and
    merges.
    """

    def __init__(self, bins: int, size: int, width: int) -> None:
        self.priorities = torch.full((bins, size), EMPTY, dtype=torch.int64)
        self.rows = torch.zeros(bins, size, width)

    def add(self, bin: int, priorities: Tensor, rows: Tensor) -> None:
        """Offers patches: priorities [n] int64, rows [n, d], any float dtype and device."""
        size = self.priorities.shape[1]
        priorities, order = priorities.sort()
        # Rows are gathered only where they can be among the M.
        order = order[:size][priorities[:size] < self.priorities[bin].max()]
        kept = torch.cat([self.priorities[bin], priorities[: len(order)]])
        joined = torch.cat([self.rows[bin], rows[order.to(rows.device)].float().cpu()])
        best = kept.argsort(stable=True)[:size]
        self.priorities[bin], self.rows[bin] = kept[best], joined[best]

    def build(self) -> Tensor | None:
        """[T, m, d] float32 with m <= M, as many as every bin has; None where a bin has none."""
        found = int((self.priorities < EMPTY).sum(1).min())
        return self.rows[:, :found].clone() if found else None


def priorities(seed: int, first: int, timestep: int, patches: Tensor) -> Tensor:
    """[P, M] int64 in [0, 2^63): of the patches [P, M] of prompts `first`, `first` + 1, ..., at a timestep."""
    prompts = torch.arange(first, first + len(patches)).unsqueeze(1)
    high, low = (mix(seed, part, prompts, timestep, patches.long().cpu()) for part in (0, 1))
    return high << 31 | low >> 1


class BankPass:
    """`Bank` of patches in which their picture's own label is not detected, taken where patches are replaced."""

    name = "bank"

    def __init__(
        self,
        source: Source,
        site: Site,
        by: str,
        encoder: Encoder,
        bank_site: Site,
        selections: Sequence[Selection],
        latents: int,
        size: int,
        seed: int,
    ) -> None:
        self._source, self._site, self._bank_site, self._by = source, site, bank_site, by
        self._encoder, self._selections, self._latents, self._seed = encoder, selections, latents, seed
        self.bank = Bank(len(source.timesteps), size, source.width(bank_site))

    def feed(self, index: int) -> None:
        seen = self._source.shard(index, self._site)
        replaced = seen
        if self._bank_site != self._site:
            replaced = self._source.shard(index, self._bank_site)
            if not torch.equal(seen.patches.cpu(), replaced.patches.cpu()):
                raise ValueError(
                    f"bank_site: {self._bank_site} holds other patches of the maps than {self._site}; give a site of "
                    "the same grid, and collect all patches, or bank=0"
                )
        groups = rows_by_label(seen, self._by)
        first = index * self._source.prompts_per_shard
        for bin, code in enumerate(self._encoder.codes(seen.x)):
            order = priorities(self._seed, first, self._source.timesteps[bin], seen.patches[:, bin])
            clean = torch.zeros(code.values.shape[:2], dtype=torch.bool)
            for place, rows in groups:
                found = detected(rows_of(code, rows), self._selections[place], bin, self._latents)
                clean[rows] = ~found
            self.bank.add(bin, order[clean], replaced.x[:, bin][clean.to(replaced.x.device)])

    def tensors(self) -> dict[str, Tensor]:
        return {"priorities": self.bank.priorities, "rows": self.bank.rows}

    def join(self, tensors: Mapping[str, Tensor]) -> None:
        for bin in range(len(tensors["rows"])):
            self.bank.add(bin, tensors["priorities"][bin], tensors["rows"][bin])


class GatePass:
    """`PictureCounts` over the run: pictures by the mean number of patches in which each label is detected, over the
    timesteps up to each one, in quarters; none of a label without a selection. A picture of several concepts is one of
    each of them, one without any label is none."""

    name = "gate"

    def __init__(
        self,
        source: Source,
        site: Site,
        by: str,
        names: Sequence[str],
        encoder: Encoder,
        selections: Sequence[Selection | None],
        latents: int,
        most: int,
    ) -> None:
        self._source, self._site, self._by, self._encoder = source, site, by, encoder
        self._names, self._selections, self._latents = names, selections, latents
        # [2, C, T, most + 1]: of pictures with the label, and of others.
        self.counts = torch.zeros(2, len(selections), len(source.timesteps), most + 1, dtype=torch.int64)
        self._sampled = torch.zeros(1, dtype=torch.int64)
        self._several = torch.zeros(len(selections), dtype=torch.int64)

    @property
    def several(self) -> tuple[int, ...]:
        """How many of each label's pictures show others too; empty: none of any."""
        return tuple(self._several.tolist()) if self._several.any() else ()

    @property
    def sampled(self) -> bool:
        """Whether a map was not whole."""
        return bool(self._sampled)

    def feed(self, index: int) -> None:
        shard = self._source.shard(index, self._site)
        own = shown_in(self._source, shard, index, self._names, self._by)
        # One with concepts that the dictionary has not may show any.
        known = own.any(1)
        most = self.counts.shape[-1]
        self._sampled += int((shard.patches.cpu() != torch.arange(shard.x.shape[2])).any())
        self._several += own[own.sum(1) > 1].sum(0)
        sums = torch.zeros(len(self._selections), len(own), dtype=torch.int64)
        for bin, code in enumerate(self._encoder.codes(shard.x)):
            for place, selection in enumerate(self._selections):
                if selection is None:
                    continue
                sums[place] += detected(code, selection, bin, self._latents).sum(-1)
                found = (sums[place] * QUARTERS // (bin + 1)).clamp(max=most - 1)  # [P]
                for group, pictures in enumerate((own[:, place], known & ~own[:, place])):
                    self.counts[group, place, bin] += found[pictures].bincount(minlength=most)

    def tensors(self) -> dict[str, Tensor]:
        return {"counts": self.counts, "sampled": self._sampled, "several": self._several}

    def join(self, tensors: Mapping[str, Tensor]) -> None:
        self.counts += tensors["counts"]
        self._sampled += tensors["sampled"]
        self._several += tensors["several"]


def run_pass(
    work: Pass,
    shards: Sequence[int],
    state: ScoreState | None,
    save_every: int,
    process: int,
    processes: int,
    progress: bool,
) -> None:
    """This process's share of `shards`, from where an interrupted run was, and then the other processes' results."""
    shares = [shards[number::processes] for number in range(processes)]
    shapes = {name: tuple(tensor.shape) for name, tensor in work.tensors().items()}
    mine, done = shares[process], 0
    found = None if state is None else state.load(work.name, process, shapes)
    if found is not None:
        done = found[0]
        work.join(found[1])
    bar = tqdm(
        range(done, len(mine)),
        desc=work.name,
        total=len(mine),
        initial=done,
        unit="shard",
        disable=not progress,
        file=sys.stderr,
        position=process,
    )
    for number in bar:
        if state is not None:
            state.leave_if_finished()
        work.feed(mine[number])
        if state is not None and (number + 1) % save_every == 0:
            state.save(work.name, number + 1, work.tensors())
    if state is None:
        return
    if found is None or done < len(mine):
        state.save(work.name, len(mine), work.tensors())
    for other, share in enumerate(shares):
        if other != process:
            work.join(state.gather(work.name, other, len(share), shapes))


def _feed(
    sink: ConceptStatistics | Calibration, source: Source, site: Site, by: str, encoder: Encoder, index: int
) -> None:
    shard = source.shard(index, site)
    groups = rows_by_label(shard, by)
    for bin, code in enumerate(encoder.codes(shard.x)):
        for place, rows in groups:
            sink.add(place, bin, rows_of(code, rows))
