"""What an eraser did, step by step."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from lbdt.hooks.recorder import Call


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


@dataclass(frozen=True)
class Report:
    """Steps in the order of the schedule (timestep descending), over all calls since the eraser was attached."""

    steps: tuple[StepReport, ...]

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

    def _mean(self, name: str) -> float:
        patches = sum(step.patches for step in self.steps)
        return sum(getattr(step, name) * step.patches for step in self.steps) / patches if patches else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "detected": self.detected,
            "replaced": self.replaced,
            "unchanged": self.unchanged,
            "steps": [asdict(step) for step in self.steps],
        }

    def __str__(self) -> str:
        lines = ["timestep  detected  replaced  rows without undetected patch"]
        for step in self.steps:
            note = f" ({step.unchanged} left unchanged: no bank)" if step.unchanged else ""
            lines.append(
                f"{step.timestep:8.1f}  {step.detected:8.1%}  {step.replaced:8.1%}  "
                f"{step.without_free} of {step.rows}{note}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class StepMask:
    """The masks of one UNet call, conditional (or only) half."""

    timestep: float
    detected: Tensor
    """bool [images, H, W], before padding."""
    replaced: Tensor
    """bool [images, H, W], after padding."""


def summarise(calls: list[Call]) -> Report:
    """The calls of equal timestep, added up."""
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
            )
        )
    return Report(tuple(steps))


def step_masks(calls: list[Call]) -> list[StepMask]:
    """The kept masks, oldest first."""
    masks = []
    for call in calls:
        if call.cells is not None:
            cells = call.cells[call.rows - call.rows // call.halves :]
            masks.append(StepMask(call.timestep, (cells & 1) > 0, (cells & 2) > 0))
    return masks
