"""What a steering baseline did: the eraser's report, with what was run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lbdt.hooks.recorder import Call
from lbdt.report import Blind, Report, summarise


@dataclass(frozen=True)
class SteeringReport(Report):
    """`detected`: fraction of the patches in which a selected latent passes its threshold; `replaced`: fraction that
    was changed. Nothing is drawn, so `without_free` and `unchanged` are 0."""

    ran: str
    """The rule and its settings, in words."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, for JSON."""
        return {"ran": self.ran, **super().to_dict()}

    def __str__(self) -> str:
        lines = [f"steering: {self.ran}", "timestep  detected   changed"]
        lines += [f"{s.timestep:8.1f}  {s.detected:8.1%}  {s.replaced:8.1%}{s.unseen()}" for s in self.steps]
        return "\n".join(lines)


def summarise_steering(calls: list[Call], ran: str, blind: Blind | None = None) -> SteeringReport:
    """The calls of equal timestep, added up."""
    steps = tuple(replace(step, without_free=0, unchanged=0) for step in summarise(calls, blind).steps)
    return SteeringReport(steps, ran)
