"""`ConceptDictionary`: mean activations per concept, timestep and latent, and the selections made from
them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lbdt.dictionary import selection as _select
from lbdt.dictionary.selection import DetectionRates, Selection
from lbdt.dictionary.statistics import checked_concepts, checked_timesteps, require_same_bins

_DEFAULT_TOP_K = 2


@dataclass
class Histograms:
    """Activations of the candidate latents, counted in K bins (edges[j], edges[j+1]], zeros in the first."""

    candidates: Tensor
    """[C, T, M] int64, the best-scoring latents of a concept and bin, best first."""
    on: Tensor
    """[C, T, M, K] int64, patches of the concept's own prompts."""
    off: Tensor
    """[C, T, M, K] int64, patches of other concepts' prompts."""
    edges: Tensor
    """[K + 1] float32, ascending from 0. The last bin also holds what lies above."""

    def clone(self) -> Histograms:
        return Histograms(self.candidates.clone(), self.on.clone(), self.off.clone(), self.edges.clone())

    def merge(self, other: Histograms) -> Histograms:
        """Summed counts; ValueError where candidates or edges differ."""
        if not torch.equal(self.candidates, other.candidates) or not torch.equal(self.edges, other.edges):
            raise ValueError(
                "cannot merge: the calibrations have other candidates or edges; merge the statistics first, "
                "then calibrate every part with the one dictionary built from them"
            )
        return Histograms(self.candidates, self.on + other.on, self.off + other.off, self.edges)


class ConceptDictionary:
    """Which latents of an SAE carry a concept, per denoising timestep (method.md, "Concept-latent
    dictionary").

    Bins are keyed by timestep VALUE (what the UNet is called with), never by the number of a step, so another
    scheduler or number of steps finds its bins with `nearest_bin`.
    """

    def __init__(
        self,
        concepts: Sequence[str],
        timesteps: Tensor | Sequence[int],  # [T], strictly descending
        mean: Tensor,  # [C, T, L], a[c, t, i] >= 0, cast to float32
        counts: Tensor,  # [C, T] patches behind each mean
        histograms: Histograms | None = None,
        bank: Tensor | None = None,  # [T, M, d] embeddings of undetected patches
        peak: float | None = None,  # largest activation seen; None: the largest mean
        fired: Tensor | None = None,  # [L] patches on which each latent was active, of all concepts and bins
    ) -> None:
        """Raises ValueError on shapes that do not fit, negative, NaN or infinite values, or candidates out of
        range."""
        self.concepts = checked_concepts(concepts)
        self.timesteps = checked_timesteps(timesteps)
        place = (len(self.concepts), len(self.timesteps))
        _require_shape("mean", mean, (*place, None))
        _require_shape("counts", counts, place)
        self.mean = mean.detach().float().cpu()
        self.counts = counts.detach().to("cpu", torch.int64)
        _require_range("mean", self.mean)
        _require_range("counts", self.counts)
        self.histograms = histograms
        if histograms is not None:
            self._check_histograms(histograms, place)
        self.bank = None if bank is None else bank.detach().float().cpu()
        if self.bank is not None:
            _require_shape("bank", self.bank, (place[1], None, None))
            if not bool(torch.isfinite(self.bank).all()):
                raise ValueError("bank: expected finite values, got NaN or infinity")
        self.peak = float(self.mean.max() if peak is None else peak)
        self.fired = None if fired is None else fired.detach().to("cpu", torch.int64)
        if self.fired is not None:
            _require_shape("fired", self.fired, (self.num_latents,))
            _require_range("fired", self.fired)
        self._timesteps_on: dict[torch.device, Tensor] = {}

    def _check_histograms(self, histograms: Histograms, place: tuple[int, int]) -> None:
        _require_shape("candidates", histograms.candidates, (*place, None))
        bins = histograms.edges.numel() - 1
        shape = (*histograms.candidates.shape, bins)
        _require_shape("on", histograms.on, shape)
        _require_shape("off", histograms.off, shape)
        _require_range("on", histograms.on)
        _require_range("off", histograms.off)
        edges = histograms.edges
        if edges.dim() != 1 or bins < 2 or float(edges[0]) != 0 or not bool((edges[1:] > edges[:-1]).all()):
            raise ValueError("edges: expected [K + 1] values ascending from 0, K >= 2")
        _require_range("candidates", histograms.candidates)
        if int(histograms.candidates.max()) >= self.num_latents:
            raise ValueError(
                f"candidates: expected latents in [0, {self.num_latents}), got "
                f"{int(histograms.candidates.max())}"
            )

    @property
    def num_latents(self) -> int:
        """L, the size of the SAE that the dictionary was made with."""
        return self.mean.shape[2]

    def __repr__(self) -> str:
        kind = "calibrated" if self.histograms is not None else "uncalibrated"
        return (
            f"ConceptDictionary({len(self.concepts)} concepts, {len(self.timesteps)} timesteps, "
            f"{self.num_latents} latents, {kind})"
        )

    def index(self, concept: str) -> int:
        """The place of a concept; ValueError naming the known ones and the nearest."""
        if concept in self.concepts:
            return self.concepts.index(concept)
        lowered = {name.lower(): name for name in self.concepts}
        near = difflib.get_close_matches(str(concept).lower(), lowered, n=1, cutoff=0.5)
        hint = f"; did you mean {lowered[near[0]]!r}?" if near else ""
        raise ValueError(f"unknown concept {concept!r}{hint} Known concepts: {', '.join(self.concepts)}")

    def scores(self) -> Tensor:
        """[C, T, L] float32, see `lbdt.dictionary.selection.scores`. ValueError where a place has no
        patches."""
        return self._scores(range(len(self.concepts)))

    def _scores(self, concepts: Sequence[int]) -> Tensor:
        empty = (self.counts == 0).nonzero()
        if empty.numel():
            concept, bin = empty[0].tolist()
            raise ValueError(
                f"the dictionary has no patches of {self.concepts[concept]!r} at timestep "
                f"{int(self.timesteps[bin])} ({len(empty)} such places); run those prompts, or merge the "
                "dictionary that has them"
            )
        return _select.scores(self.mean, self.counts, concepts)

    def published_thresholds(self) -> Tensor:
        """`mu_i(t)`: mean of `a[c, t, i]` over all concepts, [T, L] float32."""
        return self.mean.mean(0)

    def firing_order(self) -> Tensor:
        """The latents by how often they fire, most often first, [L] int64; where that was not counted, by their mean
        activation over concepts and bins. Counting latents above a value in this order stops early."""
        rate = self.mean.sum((0, 1)) if self.fired is None else self.fired
        return rate.argsort(descending=True, stable=True)

    def select(
        self,
        concept: str,
        *,
        percentile: float | None = None,
        top_k: int | None = None,
        thresholds: str | None = None,
        false_positive: float = 0.02,
        allow_below_published: bool = False,
    ) -> Selection:
        """The latents of a concept and, per bin, the activation above which a patch carries it.

        `percentile` takes, bin by bin, the latents that score above it; `top_k` the best ones (default:
        top_k=2). `thresholds` "published" is the mean over concepts; "calibrated" (the default where there
        are histograms) the activation that a fraction `false_positive` of other concepts' patches exceeds,
        never below the published one unless `allow_below_published`. Calibrated, `top_k` takes those of the M
        candidates that detect most of the concept's own patches at their thresholds. The rate holds per
        latent: several latents add up.

        Raises:
            ValueError: unknown concept, both or bad criteria, more latents than calibrated candidates, no
                histograms, or a selection without any latent.
        """
        place = self.index(concept)
        if percentile is not None and top_k is not None:
            raise ValueError(f"give percentile or top_k, not both (got {percentile} and {top_k})")
        if percentile is None and top_k is None:
            top_k = _DEFAULT_TOP_K if self.histograms is None else min(_DEFAULT_TOP_K, self._candidates)
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k: expected an integer >= 1, got {top_k!r}")
        kind = thresholds or ("published" if self.histograms is None else "calibrated")
        if kind not in ("published", "calibrated"):
            raise ValueError(f"thresholds: expected 'published' or 'calibrated', got {thresholds!r}")
        score = self._scores([place])[0]
        if kind == "published":
            chosen = (
                _select.by_rank(score, top_k)
                if percentile is None
                else _select.by_percentile(score, percentile)
            )
            latents = chosen.any(0).nonzero().squeeze(1)
            table = torch.where(chosen[:, latents], self.published_thresholds()[:, latents], torch.inf)
        else:
            latents, table = self._calibrated(
                place, score, percentile, top_k, false_positive, allow_below_published
            )
        if not latents.numel():
            raise ValueError(
                f"no latent of {concept!r} passes the criterion at any timestep (percentile {percentile}, "
                f"top_k {top_k}, thresholds {kind}); lower the percentile, raise false_positive, or use "
                "another SAE"
            )
        return Selection(latents, table, concept, kind)

    @property
    def _candidates(self) -> int:
        return self.histograms.candidates.shape[2]

    def _calibrated(
        self,
        place: int,
        score: Tensor,  # [T, L]
        percentile: float | None,
        top_k: int | None,
        false_positive: float,
        allow_below_published: bool,
    ) -> tuple[Tensor, Tensor]:
        h = self.histograms
        if h is None:
            raise ValueError(
                "thresholds 'calibrated' need histograms, which this dictionary lacks; run Calibration over "
                "the validation prompts, or pass thresholds='published'"
            )
        if not bool((h.on[place].sum(-1) > 0).all()) or not bool((h.off[place].sum(-1) > 0).all()):
            raise ValueError(
                f"the calibration has no patches of {self.concepts[place]!r} or of other concepts at some "
                f"timesteps; run it over the prompts of every concept"
            )
        candidates = h.candidates[place]
        limits = _select.calibrated(h.off[place], h.edges, false_positive)
        if not allow_below_published:
            limits = torch.maximum(limits, self.published_thresholds().gather(-1, candidates))
        usable = torch.isfinite(limits) & (score.gather(-1, candidates) > 0)
        order = torch.arange(self._candidates).expand_as(candidates)
        if percentile is None:
            wanted = torch.full((len(candidates), 1), top_k)
            rates = _select.rates_above(h.on[place], h.edges, limits)
            usable &= rates > 0
            order = rates.where(usable, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(-1)
        else:
            # By place, not by score: candidates come best first, and float16 may reorder near-equal scores.
            wanted = _select.by_percentile(score, percentile).sum(-1, keepdim=True)
        if int(wanted.max()) > self._candidates:
            raise ValueError(
                f"{int(wanted.max())} latents wanted at a timestep, but the calibration keeps "
                f"{self._candidates} candidates; calibrate with more candidates, select fewer, or pass "
                "thresholds='published'"
            )
        chosen = usable & (order < wanted)
        latents = candidates[chosen].unique()
        table = torch.full((len(candidates), latents.numel()), torch.inf)
        rows = chosen.nonzero()[:, 0]
        table[rows, torch.searchsorted(latents, candidates[chosen])] = limits[chosen]
        return latents, table

    def detection_rates(self, selection: Selection) -> DetectionRates:
        """How often each selected latent passes its threshold, on the concept and off it, from the
        histograms.

        Thresholds inside a histogram bin give a lower bound on the concept and an upper bound off it.

        Raises:
            ValueError: unknown concept or no histograms.
        """
        place = self.index(selection.concept)
        h = self.histograms
        if h is None:
            raise ValueError("detection rates need calibration histograms; run Calibration first")
        match = h.candidates[place].unsqueeze(1) == selection.latents.view(1, -1, 1)  # [T, U, M]
        known = match.any(-1) & torch.isfinite(selection.thresholds)
        slot = match.int().argmax(-1).unsqueeze(-1)
        rates = []
        for histogram, overstate in ((h.on[place], False), (h.off[place], True)):
            picked = histogram.gather(1, slot.expand(-1, -1, histogram.shape[-1]))
            rate = _select.rates_above(picked, h.edges, selection.thresholds, overstate)
            rates.append(rate.where(known, torch.nan))
        return DetectionRates(*rates)

    def nearest_bin(self, timesteps: Tensor) -> Tensor:
        """The bin of each timestep value (any shape, integer or float) -> int64 on its device, without a host
        sync.

        The nearest bin by value; halfway between two, the one of the higher timestep.
        """
        bins = self._timesteps_on.get(timesteps.device)
        if bins is None:
            bins = self._timesteps_on[timesteps.device] = self.timesteps.to(timesteps.device, torch.float32)
        return (timesteps.float().unsqueeze(-1) - bins).abs().argmin(-1)

    def bin_edges(self) -> Tensor:
        """[T - 1] float32, descending: halfway between successive timesteps, where `nearest_bin` changes."""
        values = self.timesteps.float()
        return (values[:-1] + values[1:]) / 2

    def merge(self, other: ConceptDictionary) -> ConceptDictionary:
        """The dictionary over both sets of prompts (which must be disjoint), concepts of either, as a new
        object.

        Histograms merge where both have them for the same concepts and candidates; banks are joined.

        Raises:
            ValueError: other timesteps or latents, or histograms that do not merge (`without_histograms()`
            drops them).
        """
        require_same_bins(self, other)
        if (self.histograms is None) != (other.histograms is None) or (
            self.histograms is not None and self.concepts != other.concepts
        ):
            raise ValueError(
                "cannot merge: calibrations of other concepts, or of one side only; merge "
                "without_histograms() of both, then calibrate again"
            )
        histograms = None if self.histograms is None else self.histograms.merge(other.histograms)
        concepts = (*self.concepts, *(name for name in other.concepts if name not in self.concepts))
        sums = torch.zeros(len(concepts), *self.mean.shape[1:])
        counts = torch.zeros(len(concepts), self.counts.shape[1], dtype=torch.int64)
        for part in (self, other):
            rows = torch.tensor([concepts.index(name) for name in part.concepts])
            sums[rows] += part.mean * part.counts.unsqueeze(-1)
            counts[rows] += part.counts
        both_fired = self.fired is not None and other.fired is not None
        banks = [part.bank for part in (self, other) if part.bank is not None]
        return ConceptDictionary(
            concepts,
            self.timesteps,
            sums / counts.clamp(min=1).unsqueeze(-1),
            counts,
            histograms,
            torch.cat(banks, dim=1) if banks else None,
            max(self.peak, other.peak),
            self.fired + other.fired if both_fired else None,
        )

    def without_histograms(self) -> ConceptDictionary:
        """The same dictionary, uncalibrated."""
        return ConceptDictionary(
            self.concepts, self.timesteps, self.mean, self.counts, None, self.bank, self.peak, self.fired
        )

    def save_pretrained(self, directory: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Writes `dictionary.json` and `dictionary.safetensors`; see `lbdt.dictionary.files.save`."""
        from lbdt.dictionary.files import save

        save(self, directory, dtype)

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | os.PathLike[str], subfolder: str | None = None
    ) -> ConceptDictionary:
        """Reads a folder or a Hugging Face repository; see `lbdt.dictionary.files.load`."""
        from lbdt.dictionary.files import load

        return load(path_or_repo, subfolder)


def _require_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(e is not None and e != g for e, g in zip(shape, got, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(got)}")
    if not tensor.numel():
        raise ValueError(f"{name}: expected a tensor with elements, got shape {list(got)}")


def _require_range(name: str, tensor: Tensor) -> None:
    if not bool(((tensor >= 0) & torch.isfinite(tensor)).all()):
        raise ValueError(f"{name}: expected finite values >= 0, got negative, infinite or NaN ones")
