"""The series of an evaluation: what is generated before the steering's strength is known, and what after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lbdt.donors import AVOIDED, SOURCES
from lbdt.evaluation.concept_texts import ConceptTexts
from lbdt.evaluation.evaluated_world import EvaluatedKind, EvaluatedWorld
from lbdt.evaluation.jobs import Design, Job, empties, erased_together, pairs, targets, together, unedited
from lbdt.evaluation.series import Series
from lbdt.runs.wording import slug

PADDINGS = (0, 1, 2, 3)
ORDERS = ("at once", "one after another")
UNGATED = {"min_patches": 1}
"""Settings of the eraser with which a single detected patch is enough."""


@dataclass(frozen=True)
class SeriesPlan:
    """All pictures of one kind, as series. Rows of the report take their jobs from them."""

    world: EvaluatedWorld
    kind: EvaluatedKind
    design: Design
    seeds: tuple[int, ...]
    sweep_seeds: tuple[int, ...]
    concepts: tuple[str, ...]
    """The concepts that are erased."""

    @cached_property
    def per_settings(self) -> dict[str, Any]:
        """Settings of the eraser as it comes: those of the main row."""
        return self.kind.per().shown

    @cached_property
    def gated(self) -> bool:
        """Whether the eraser as it comes has a gate, so that it differs from the one without."""
        return self.kind.per().digest() != self.kind.per(**UNGATED).digest()

    @property
    def guided(self) -> bool:
        """Whether the sampling has guidance, in which a negative prompt could take part (diffusers': above 1)."""
        return self.kind.guidance is None or self.kind.guidance > 1

    @cached_property
    def texts(self) -> ConceptTexts:
        """How methods that work by text are told of a concept."""
        return ConceptTexts.of(self.world)

    @cached_property
    def hookpoint(self) -> str:
        """The block whose output is watched."""
        return self.kind.per().hookpoint

    @cached_property
    def strengths(self) -> tuple[float, ...]:
        """The strengths of the sweep; of more than `design.strengths`, those spread over the whole range."""
        whole, count = self.kind.strengths, self.design.strengths
        if self.kind.steering is None or count is None or count >= len(whole):
            return whole if self.kind.steering else ()
        if count == 1:
            return (whole[len(whole) // 2],)
        return tuple(whole[round(n * (len(whole) - 1) / (count - 1))] for n in range(count))

    @cached_property
    def scored_jobs(self) -> dict[int, list[Job]]:
        """The pictures of the main rows, by seed: of one object, of two, of none."""
        design, found = self.design, self._targets(self.seeds, self.design.own, self.design.others)
        for place, (seed, jobs) in enumerate(found.items()):
            jobs += pairs(self.world, seed, design.pairs, self.concepts)
            jobs += empties(self.world, seed, place, design.empty, self.concepts)
        return found

    @cached_property
    def sweep_jobs(self) -> dict[int, list[Job]]:
        """The pictures of the strengths, by seed."""
        return self._targets(self.sweep_seeds, self.design.sweep_own, self.design.sweep_others)

    @cached_property
    def ablation_jobs(self) -> dict[int, list[Job]]:
        """The pictures of paddings and donors: of the first seed."""
        return self._targets(self.seeds[:1], self.design.ablation_own, self.design.ablation_others)

    def sweep(self) -> list[Series]:
        """What the strength is chosen on, PER and the base on the same pictures; nothing without sweep
        seeds."""
        if not self.sweep_seeds:
            return []
        jobs = _flat(self.sweep_jobs)
        settings = [{"strength": strength} for strength in self.strengths]
        return [
            self._base("sweep", jobs, watched=True),
            *(self._series("sweep", "steering", each, jobs, watched=True) for each in settings),
            self._series("sweep", "per", self.per_settings, jobs, watched=True),
        ]

    def sweep_by_class(self) -> list[Series]:
        """The steerings that the best of each class is chosen from: those of the sweep, first, and every strength with
        each other selection; nothing without sweep seeds."""
        if not (self.sweep_seeds and self.design.by_class):
            return []
        jobs = _flat(self.sweep_jobs)
        settings = [
            {"strength": strength, "selection": dict(selection)}
            for selection in self.kind.selections
            for strength in self.strengths
        ]
        own = [series for series in self.sweep() if series.method == "steering"]
        return [*own, *(self._series("sweep", "steering", each, jobs) for each in settings)]

    def scored(
        self, strength: float | None, by_class: Mapping[str, Mapping[str, Any]] | None = None
    ) -> list[Series]:
        """The main rows: base, negative prompt (without guidance, none), UCE, steering (strength None: as it comes;
        without a baseline, none), steering `by_class` (concept -> its strength and perhaps selection; None: no row),
        PER without the gate (where there is no gate, none), PER."""
        jobs, ablation = _flat(self.scored_jobs), _flat(self.ablation_jobs)
        rows = [self.base(), *([self._by_text("negative", jobs)] if self.guided else [])]
        rows.append(self._by_text("uce", jobs))
        if self.kind.steering is not None:
            rows.append(self._series("scored", "steering", self.steering_settings(strength), jobs))
        if by_class is not None:
            rows.append(
                replace(
                    self._series("scored", "by class", {}, jobs), settings=self.settings_by_class(by_class)
                )
            )
        if self.gated:
            rows.append(self._series("scored", "ungated", {**self.per_settings, **UNGATED}, jobs))
        return [*rows, self._series("scored", "per", self.per_settings, [*jobs, *ablation])]

    def base(self) -> Series:
        """The unedited pictures of all prompts of the main row."""
        return self._base("scored", [*_flat(self.scored_jobs), *_flat(self.ablation_jobs)])

    def ablation(self) -> list[Series]:
        """PER with every padding, then with every source, then with the other patches avoided; the main row's settings
        are in `scored` already."""
        jobs = _flat(self.ablation_jobs)
        settings = [{**self.per_settings, "padding": padding} for padding in PADDINGS]
        settings += [{**self.per_settings, "source": source} for source in SOURCES]
        avoided = self.kind.per().avoid
        settings += [{**self.per_settings, "avoid": other} for other in AVOIDED if other != avoided]
        return [
            self._series("ablation", "per", each, jobs)
            if each != self.per_settings
            else self._series("scored", "per", each, [*_flat(self.scored_jobs), *jobs])
            for each in settings
        ]

    def together(self, strength: float | None) -> list[tuple[Series, str]]:
        """Several concepts erased from every picture, and in which order. One attachment for all works at
        once; one for each, in the order of the requests, works on what the one before left."""
        methods = [("per", self.per_settings)]
        if self.kind.steering is not None:
            methods.insert(0, ("steering", self.steering_settings(strength)))
        rows = []
        for order in ORDERS if self.design.one_after_another else ORDERS[:1]:
            for method, settings in methods:
                for count in self._counts:
                    if order != ORDERS[0] and count == 1:
                        continue
                    erased = erased_together(self.concepts, count)
                    jobs = together(self.world, self.seeds[0], erased, self.design.per_object)
                    name = f"together-{count}-{slug(order)}"
                    series = self._series(name, method, settings, jobs)
                    rows.append((replace(series, stacked=order != ORDERS[0]), order))
        return rows

    def steering_settings(self, strength: float | None) -> dict[str, Any]:
        """Keywords of the kind's steering."""
        return {} if strength is None else {"strength": strength}

    def settings_by_class(self, by_class: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Keywords of the kind's steering, of what was chosen for each concept."""
        strengths = {name: given["strength"] for name, given in by_class.items()}
        chosen = {name: given["selection"] for name, given in by_class.items() if "selection" in given}
        if not chosen:
            return {"strength": strengths}
        own = self.kind.steering(strength=next(iter(strengths.values()))).selection
        return {"strength": strengths, "selection": {**own, **chosen}}

    @property
    def _counts(self) -> list[int]:
        # Some object must be kept, and the eraser need not know others than `concepts`.
        most = min(len(self.concepts), len(self.world.objects) - 1)
        return [count for count in self.design.counts if count <= most]

    def _targets(self, seeds: Sequence[int], own: int | None, others: int | None) -> dict[int, list[Job]]:
        return {
            seed: targets(self.world, seed, place, own, others, self.concepts)
            for place, seed in enumerate(seeds)
        }

    def _base(self, part: str, jobs: Sequence[Job], watched: bool = False) -> Series:
        bare = [unedited(job) for job in jobs]
        folder = f"base-{self.kind.steps}-{self.kind.guidance}"
        name = f"{folder}/{part}" + (f"-{slug(self.hookpoint)}" if watched else "")
        return Series(name, self.kind, "base", {}, tuple(dict.fromkeys(bare)), watched)

    def _by_text(self, method: str, jobs: Sequence[Job]) -> Series:
        # No SAE is in it: kinds of one sampling share the folder.
        name = f"{method}-{self.kind.steps}-{self.kind.guidance}/scored"
        return Series(name, self.kind, method, {}, tuple(dict.fromkeys(jobs)), texts=self.texts)

    def _series(
        self, part: str, method: str, settings: Mapping[str, Any], jobs: Sequence[Job], watched: bool = False
    ) -> Series:
        text = "-".join(f"{name}{value}" for name, value in _spread_out(settings))
        name = f"{slug(self.kind.name)}/{part}/{slug(method)}{'-' if text else ''}{slug_settings(text)}"
        return Series(name, self.kind, method, settings, tuple(dict.fromkeys(jobs)), watched)


def slug_settings(text: str) -> str:
    """Settings as a part of a folder's name; a minus sign stays."""
    return text.replace("/", "-").replace(" ", "-")


def _spread_out(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Settings, and in place of a mapping what is in it."""
    found: list[tuple[str, Any]] = []
    for name, value in settings.items():
        found += value.items() if isinstance(value, Mapping) else [(name, value)]
    return found


def _flat(jobs: Mapping[int, Sequence[Job]]) -> list[Job]:
    return [job for part in jobs.values() for job in part]
