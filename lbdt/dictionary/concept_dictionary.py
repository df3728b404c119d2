"""`ConceptDictionary`: mean activations per concept, timestep and latent, and the selections made from them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lbdt.dictionary import dictionary_files
from lbdt.dictionary import selection as _select
from lbdt.dictionary.activation_histograms import Histograms
from lbdt.dictionary.checks import (
    checked_assignment,
    checked_concepts,
    checked_timesteps,
    joined_site,
    require_range,
    require_same_bins,
    require_shape,
)
from lbdt.dictionary.picture_counts import PictureCounts
from lbdt.dictionary.selection import DetectionRates, Selection
from lbdt.runs.site_names import checked_site
from lbdt.runs.wording import nearest

_DEFAULT_TOP_K = 2


class ConceptDictionary:
    """The latents of an SAE that carry a concept, per denoising timestep (METHOD.md, 3).

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
        assigned: Mapping[str, int]
        | None = None,  # the latent that a concept was trained on, for some concepts
        gate: PictureCounts | None = None,
        site: str | None = None,  # where the activations were, "HOOKPOINT:kind"; None: not known
    ) -> None:
        """Raises ValueError on shapes that do not fit, negative, NaN or infinite values, candidates out of range, or
        an assignment of other concepts, of latents out of range, or of one latent to two concepts."""
        self.concepts = checked_concepts(concepts)
        self.timesteps = checked_timesteps(timesteps)
        place = (len(self.concepts), len(self.timesteps))
        require_shape("mean", mean, (*place, None))
        require_shape("counts", counts, place)
        self.mean = mean.detach().float().cpu()
        self.counts = counts.detach().to("cpu", torch.int64)
        require_range("mean", self.mean)
        require_range("counts", self.counts)
        self.histograms = histograms
        if histograms is not None:
            histograms.check(*place, self.num_latents)
        self.bank = None if bank is None else bank.detach().float().cpu()
        if self.bank is not None:
            require_shape("bank", self.bank, (place[1], None, None))
            if not bool(torch.isfinite(self.bank).all()):
                raise ValueError("bank: expected finite values, got NaN or infinity")
        self.peak = float(self.mean.max() if peak is None else peak)
        self.fired = None if fired is None else fired.detach().to("cpu", torch.int64)
        if self.fired is not None:
            require_shape("fired", self.fired, (self.num_latents,))
            require_range("fired", self.fired)
        self.assigned = checked_assignment(assigned, self.concepts, self.num_latents)
        self.gate = gate
        if gate is not None:
            gate.check(*place)
        self.site = checked_site(site)
        self._timesteps_on: dict[torch.device, Tensor] = {}

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
        near = nearest(str(concept), self.concepts)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(f"unknown concept {concept!r}{hint} Known concepts: {', '.join(self.concepts)}")

    def scores(self) -> Tensor:
        """[C, T, L] float32, see `lbdt.dictionary.selection.scores`. ValueError where a place has no patches."""
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
        assigned: bool | None = None,
    ) -> Selection:
        """The latents of a concept and, per bin, the activation above which a patch carries it.

        `percentile` takes, bin by bin, the latents that score above it; `top_k` the best ones; `assigned` the latent
        that the concept was trained on (SAEmnesia, G-SAE). By default the assigned latent where there is one, else
        top_k=2; assigned=False passes over the assignment. `thresholds` "published" is the mean over concepts;
        "calibrated" (the default where there are histograms) the activation that a fraction `false_positive` of other
        concepts' patches exceeds, never below the published one unless `allow_below_published`. Calibrated, `top_k`
        takes those of the M candidates that detect most of the concept's own patches at their thresholds. The rate
        holds per latent: several latents add up.

        Raises:
            ValueError: unknown concept, several or bad criteria, more latents than calibrated candidates, no
                histograms, no assigned latent, or a selection without any latent.
        """
        place = self.index(concept)
        criteria = {
            "percentile": percentile,
            "top_k": top_k,
            "thresholds": thresholds,
            "false_positive": false_positive,
            "allow_below_published": allow_below_published,
            "assigned": assigned,
        }
        _select.check_criteria(**criteria)
        latent = self._assigned_latent(concept, assigned, percentile, top_k)
        if percentile is None and top_k is None and latent is None:
            top_k = _DEFAULT_TOP_K if self.histograms is None else min(_DEFAULT_TOP_K, self._candidates)
        kind = thresholds or ("published" if self.histograms is None else "calibrated")
        score = self._scores([place])[0]
        if kind == "published":
            if latent is not None:
                chosen = torch.zeros_like(score, dtype=torch.bool)
                chosen[:, latent] = True
            elif percentile is None:
                chosen = _select.by_rank(score, top_k)
            else:
                chosen = _select.by_percentile(score, percentile)
            latents = chosen.any(0).nonzero().squeeze(1)
            table = torch.where(chosen[:, latents], self.published_thresholds()[:, latents], torch.inf)
        else:
            latents, table = self._calibrated(
                place, score, latent, percentile, top_k, false_positive, allow_below_published
            )
        if not latents.numel():
            raise ValueError(
                f"no latent of {concept!r} passes the criterion at any timestep (percentile {percentile}, "
                f"top_k {top_k}, assigned {latent}, thresholds {kind}); lower the percentile, raise false_positive, or "
                "use another SAE"
            )
        return Selection(latents, table, concept, kind, criteria)

    def _assigned_latent(
        self, concept: str, asked: bool | None, percentile: float | None, top_k: int | None
    ) -> int | None:
        """The assigned latent where it is to be selected."""
        criterion = percentile is not None or top_k is not None
        latent = (self.assigned or {}).get(concept)
        if asked and latent is None:
            known = ", ".join(self.assigned or {}) or "none"
            raise ValueError(
                f"no latent is assigned to {concept!r} (assigned: {known}); score with an assignment, or select by "
                "percentile or top_k"
            )
        return None if criterion or asked is False else latent

    @property
    def _candidates(self) -> int:
        return self.histograms.candidates.shape[2]

    def _calibrated(
        self,
        place: int,
        score: Tensor,  # [T, L]
        latent: int | None,
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
        usable, kept = torch.isfinite(limits), self._candidates
        order = torch.arange(kept).expand_as(candidates)
        if latent is not None:
            usable &= candidates == latent
            wanted = torch.full((len(candidates), 1), kept)
        elif percentile is None:
            wanted = torch.full((len(candidates), 1), top_k)
            rates = _select.rates_above(h.on[place], h.edges, limits)
            usable &= (score.gather(-1, candidates) > 0) & (rates > 0)
            order = rates.where(usable, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(-1)
        else:
            # By place, not by score: candidates come best first, and float16 may reorder near-equal scores.
            wanted = _select.by_percentile(score, percentile).sum(-1, keepdim=True)
            usable &= score.gather(-1, candidates) > 0
            kept -= self._last_is_foreign(place, score)
        if int(wanted.max()) > kept:
            raise ValueError(
                f"{int(wanted.max())} latents wanted at a timestep, but the calibration keeps {kept} candidates; "
                "calibrate with more candidates, select fewer, or pass thresholds='published'"
            )
        chosen = usable & (order < wanted)
        latents = candidates[chosen].unique()
        table = torch.full((len(candidates), latents.numel()), torch.inf)
        rows = chosen.nonzero()[:, 0]
        table[rows, torch.searchsorted(latents, candidates[chosen])] = limits[chosen]
        return latents, table

    def _last_is_foreign(self, place: int, score: Tensor) -> bool:
        """Whether at some bin the last candidate is there because it is assigned, not by its score."""
        latent = (self.assigned or {}).get(self.concepts[place])
        if latent is None:
            return False
        better = (score > score[:, latent, None]).sum(-1)
        return bool(
            ((self.histograms.candidates[place, :, -1] == latent) & (better >= self._candidates)).any()
        )

    def assigned_ranks(self) -> dict[str, int]:
        """How many latents score higher than the assigned one, by the score averaged over timesteps (0: it is the
        top one), per concept with an assigned latent. ValueError where a place has no patches."""
        ranks = {}
        for name, latent in (self.assigned or {}).items():
            score = self._scores([self.index(name)])[0].mean(0)
            ranks[name] = int((score > score[latent]).sum())
        return ranks

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

    def merge(self, other: ConceptDictionary) -> ConceptDictionary:
        """The dictionary over both sets of prompts (which must be disjoint), concepts of either, as a new
        object.

        Histograms merge where both have them for the same concepts and candidates; banks and assignments are joined;
        the gate, which was counted under the thresholds of one side, is dropped.
        Means were rounded to float32; to merge parts of one run bit for bit, merge their `ConceptStatistics`.

        Raises:
            ValueError: other timesteps, latents or site, other latents assigned to a concept, or histograms that do not
                merge (`without_histograms()` drops them).
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
        assigned = (self.assigned or {}) | (other.assigned or {})
        moved = [name for name, latent in (self.assigned or {}).items() if assigned[name] != latent]
        if moved:
            raise ValueError(
                f"cannot merge: other latents are assigned to {', '.join(moved)}; one SAE per dictionary"
            )
        return self.replaced(
            concepts=concepts,
            mean=sums / counts.clamp(min=1).unsqueeze(-1),
            counts=counts,
            histograms=histograms,
            bank=torch.cat(banks, dim=1) if banks else None,
            peak=max(self.peak, other.peak),
            fired=self.fired + other.fired if both_fired else None,
            assigned=assigned,
            gate=None,
            site=joined_site(self.site, other.site),
        )

    def _parts(self) -> dict[str, Any]:
        """The arguments that make this dictionary."""
        names = ("concepts", "timesteps", "mean", "counts", "histograms", "bank", "peak", "fired", "assigned")
        return {name: getattr(self, name) for name in (*names, "gate", "site")}

    def replaced(self, **changes: Any) -> ConceptDictionary:
        """The same dictionary but for some of the constructor's arguments."""
        return ConceptDictionary(**self._parts() | changes)

    def without_histograms(self) -> ConceptDictionary:
        """The same dictionary, uncalibrated."""
        return self.replaced(histograms=None, gate=None)

    def save_pretrained(self, directory: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Writes `dictionary.json` and `dictionary.safetensors`; see `lbdt.dictionary.dictionary_files.save`."""
        dictionary_files.save(self._parts(), directory, dtype)

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | os.PathLike[str], subfolder: str | None = None
    ) -> ConceptDictionary:
        """The dictionary in a folder or a Hugging Face repository, as float32 and int64.

        Raises:
            ValueError: anything absent, unreadable, of another shape, NaN or infinite, naming file and tensor.
        """
        folder, parts = dictionary_files.load(path_or_repo, subfolder)
        try:
            return cls(**parts)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder}: not a valid dictionary: {error}") from error
