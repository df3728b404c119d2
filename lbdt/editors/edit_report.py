"""What an attached editor did, step by step."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from lbdt.hooks.recorder import Call, Row

_SHOWN = 8


@dataclass(frozen=True)
class StepReport:
    """All UNet calls at one timestep. Rows are images times guidance halves."""

    timestep: float
    rows: int
    patches: int
    """Patches of all rows together."""
    detected: float
    """Fraction of the patches in which a concept was detected, before padding."""
    replaced: float
    """Fraction of the patches that were overwritten, after padding."""
    without_free: int
    """Rows without any undetected patch: they took embeddings of the bank, or are in `unchanged`."""
    unchanged: int
    """Rows without any undetected patch that were left as they were, as the dictionary has no bank."""
    not_finite: int = 0
    """Patches that the SAE looked at and that hold NaN or infinity: no concept can be detected in them."""
    blind: tuple[str, ...] = ()
    """Concepts of the attachment without any latent at this timestep: they were not looked for."""
    gated: int = 0
    """Pictures in which patches were detected, but too few for any concept, and that kept their bits here."""

    def unseen(self) -> str:
        """What was left or not looked at, as an addition to the step's line; empty where there is nothing to say."""
        note = f"; {self.gated} gated" if self.gated else ""
        note += f"; {self.not_finite} patches NaN or infinite" if self.not_finite else ""
        return note + (f"; no latent of {', '.join(self.blind)}" if self.blind else "")


class Blind:
    """Timesteps of a dictionary at which concepts have no latent that could be detected."""

    def __init__(self, timesteps: Tensor, concepts: Mapping[str, Tensor]) -> None:
        """`timesteps` [T] of the bins; by name, bool [T]: where the concept has none."""
        self._timesteps = timesteps.tolist()
        self.concepts = {name: where.tolist() for name, where in concepts.items() if bool(where.any())}

    def at(self, timestep: float) -> tuple[str, ...]:
        """The concepts without a latent in the bin of a timestep, which is the nearest one."""
        if not self.concepts:
            return ()
        distances = [abs(timestep - value) for value in self._timesteps]
        place = distances.index(min(distances))
        return tuple(name for name, where in self.concepts.items() if where[place])

    def __str__(self) -> str:
        shown = []
        for name, where in self.concepts.items():
            at = [f"{t:g}" for t, is_blind in zip(self._timesteps, where, strict=True) if is_blind]
            more = f", ... ({len(at)} of {len(where)} bins)" if len(at) > _SHOWN else ""
            shown.append(f"{name!r} at {', '.join(at[:_SHOWN])}{more}")
        return "; ".join(shown)


@dataclass(frozen=True)
class Report:
    """Steps in the order of the schedule (timestep descending), over all calls since the editor was attached."""

    steps: tuple[StepReport, ...]
    failures: tuple[str, ...] = ()
    """Why images of some calls were returned without protection, as `on_failure="generate"` asks for."""

    @property
    def detected(self) -> float:
        """Fraction of all patches of all steps in which a concept was detected; 0 without any step."""
        return self._mean("detected")

    @property
    def replaced(self) -> float:
        """Fraction of all patches of all steps that were overwritten; 0 without any step."""
        return self._mean("replaced")

    @property
    def unchanged(self) -> int:
        """Rows (over all steps) that should have changed and were left as they were."""
        return sum(step.unchanged for step in self.steps)

    @property
    def not_finite(self) -> int:
        """Patches (over all steps) with NaN or infinity, in which no concept can be detected."""
        return sum(step.not_finite for step in self.steps)

    @property
    def gated(self) -> int:
        """Pictures (added over all steps) that the gate left as they were."""
        return sum(step.gated for step in self.steps)

    def _mean(self, name: str) -> float:
        patches = sum(step.patches for step in self.steps)
        return sum(getattr(step, name) * step.patches for step in self.steps) / patches if patches else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "detected": self.detected,
            "replaced": self.replaced,
            "unchanged": self.unchanged,
            "not_finite": self.not_finite,
            "gated": self.gated,
            "failures": list(self.failures),
            "steps": [asdict(step) for step in self.steps],
        }

    def __str__(self) -> str:
        lines = ["timestep  detected  replaced  rows without undetected patch"]
        for step in self.steps:
            note = f" ({step.unchanged} left unchanged: no bank)" if step.unchanged else ""
            lines.append(
                f"{step.timestep:8.1f}  {step.detected:8.1%}  {step.replaced:8.1%}  "
                f"{step.without_free} of {step.rows}{note}{step.unseen()}"
            )
        return "\n".join([*lines, *(f"NOT PROTECTED: {failure}" for failure in self.failures)])


@dataclass(frozen=True)
class SteeringReport(Report):
    """`detected`: fraction of the patches in which a selected latent passes its threshold; `replaced`: fraction that
    was changed. Nothing is drawn, so `without_free` and `unchanged` are 0."""

    ran: str = ""
    """The rule and its settings, in words."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, for JSON."""
        return {"ran": self.ran, **super().to_dict()}

    def __str__(self) -> str:
        lines = [f"steering: {self.ran}", "timestep  detected   changed"]
        lines += [f"{s.timestep:8.1f}  {s.detected:8.1%}  {s.replaced:8.1%}{s.unseen()}" for s in self.steps]
        return "\n".join([*lines, *(f"NOT PROTECTED: {failure}" for failure in self.failures)])


@dataclass(frozen=True)
class StepMask:
    """The masks of one UNet call, conditional (or only) half."""

    timestep: float
    detected: Tensor
    """bool [images, H, W], before padding."""
    replaced: Tensor
    """bool [images, H, W], after padding."""


@dataclass(frozen=True)
class PictureReport:
    """One picture of a pipeline's call, step by step; counts are of patches, over the guidance branches."""

    timesteps: tuple[float, ...]
    detected: tuple[int, ...]
    """How many, before padding."""
    replaced: tuple[int, ...]
    """How many were overwritten, after padding."""
    gated: tuple[bool, ...]
    """Whether patches were detected, in any branch, that the gate left."""


def picture_reports(calls: Sequence[Sequence[Row]]) -> tuple[PictureReport, ...]:
    """The reports of the pictures of calls, newest first, row by row."""
    steps = [_pictures(rows) for rows in reversed(calls)]
    return tuple(PictureReport(*zip(*picture, strict=True)) for picture in zip(*steps, strict=True))


def _pictures(rows: Sequence[Row]) -> list[tuple[float, int, int, bool]]:
    images = 1 + max(row.image for row in rows)
    found = [(rows[image].timestep, rows[image::images]) for image in range(images)]
    return [
        (time, sum(r.detected for r in mine), sum(r.replaced for r in mine), any(r.gated for r in mine))
        for time, mine in found
    ]


def warn_not_finite(patches: int) -> None:
    """Warns of patches in which nothing can be detected, by their number; 0: does nothing."""
    if patches:
        warnings.warn(
            f"lbdt: {patches} patches of the hooked activation were NaN or infinite, where no concept can be detected: "
            "these pictures are not protected. Half precision that overflows does this; run the UNet in bfloat16 or "
            "float32",
            RuntimeWarning,
            stacklevel=2,
        )


def summarise(
    calls: list[Call], blind: Blind | None = None, ran: str | None = None, failures: Sequence[str] = ()
) -> Report:
    """The calls of equal timestep, added up; a `SteeringReport` where `ran` is given. Warns where patches were not
    finite."""
    warn_not_finite(sum(call.not_finite for call in calls))
    groups: dict[float, list[Call]] = defaultdict(list)
    for call in calls:
        groups[call.timestep].append(call)
    steps = []
    for timestep, group in sorted(groups.items(), reverse=True):
        patches = sum(call.rows * call.height * call.width for call in group)
        steps.append(
            StepReport(
                timestep=timestep,
                rows=sum(call.rows for call in group),
                patches=patches,
                detected=sum(call.detected for call in group) / max(patches, 1),
                replaced=sum(call.replaced for call in group) / max(patches, 1),
                without_free=sum(call.full for call in group),
                unchanged=sum(call.unchanged for call in group),
                not_finite=sum(call.not_finite for call in group),
                blind=() if blind is None else blind.at(timestep),
                gated=sum(call.gated for call in group),
            )
        )
    if ran is None:
        return Report(tuple(steps), tuple(failures))
    shown = tuple(replace(step, without_free=0, unchanged=0) for step in steps)
    return SteeringReport(shown, tuple(failures), ran=ran)


def step_masks(calls: list[Call]) -> list[StepMask]:
    """The kept masks, oldest first."""
    masks = []
    for call in calls:
        if call.cells is not None:
            cells = call.cells[call.rows - call.rows // call.halves :]
            masks.append(StepMask(call.timestep, (cells & 1) > 0, (cells & 2) > 0))
    return masks
