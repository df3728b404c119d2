"""How many patches of a picture are detected for a concept, in pictures of it and of others: what the gate needs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbdt.dictionary.checks import require_range, require_shape
from lbdt.dictionary.selection import check_criteria
from lbdt.ops.detect_patches import MOST_PATCHES
from lbdt.runs.reading import brief

MOST_COUNTED = 64
"""Patches of a picture that are told apart; a gate beyond would hide whole objects."""
OVER = ("call", "run")
LATE = 0.15
"""The share of a run's calls from which on `LEAST_KEPT` binds a gate over the run. Before, little is known of a
picture, and little is lost where it is left."""
MARGIN = 0.5
"""The share of what `LEAST_KEPT` allows that a gate over the run asks for where too few pictures of several things were
counted: those show less of each than pictures of one."""
SEVERAL = 0.1
"""The share of a concept's own pictures that have to show others too, so that the limit takes account of them."""
LEAST_KEPT = 0.99
"""The share of a concept's own pictures, of those detected at a timestep, that a gate lets pass whatever else it
should do."""


@dataclass(frozen=True)
class PictureCounts:
    """Histograms of the detected patches per picture, and the false-positive rate of the gate (METHOD.md, 3.6)."""

    on: Tensor
    """[C, T, K + 1] int64: pictures of the concept by how many patches are detected for it, the last: K or more."""
    off: Tensor
    """The same over the pictures of other concepts."""
    patches: int
    """N of the maps that were counted."""
    selection: Mapping[str, Any]
    """The keywords of `ConceptDictionary.select` under which they were detected."""
    false_positive: float
    """The share of other concepts' pictures that may pass the gate, in (0, 1]."""
    over: str = "call"
    """What was counted: the patches of a "call", or quarters of their mean over the calls of the "run" up to it."""
    several: tuple[int, ...] = ()
    """How many of each concept's own pictures show others too, [C]; empty: none of any."""

    def check(self, concepts: int, bins: int) -> None:
        """ValueError unless the shapes are those of a dictionary, and the values such as `score` writes."""
        for name in ("on", "off"):
            tensor = getattr(self, name)
            require_shape(f"gate {name}", tensor, (concepts, bins, None))
            require_range(f"gate {name}", tensor)
        if self.on.shape != self.off.shape or self.on.shape[2] < 2:
            raise ValueError(
                f"gate: expected on and off of one shape [C, T, K + 1 >= 2], got {list(self.on.shape)} and "
                f"{list(self.off.shape)}"
            )
        if type(self.patches) is not int or not 1 <= self.patches <= MOST_PATCHES:
            raise ValueError(
                f"gate patches: expected an integer in [1, {MOST_PATCHES}], got {brief(self.patches)}"
            )
        check_rate(self.false_positive)
        if self.over not in OVER:
            raise ValueError(f"gate over: expected one of {', '.join(OVER)}, got {brief(self.over)}")
        if not isinstance(self.several, tuple) or len(self.several) not in (0, concepts):
            raise ValueError(f"gate several: expected no number or {concepts}, got {brief(self.several)}")
        if any(type(count) is not int or count < 0 for count in self.several):
            raise ValueError("gate several: expected integers >= 0")
        if not isinstance(self.selection, Mapping):
            raise ValueError(f"gate selection: expected keywords of select, got {brief(self.selection)}")
        unknown = sorted(set(self.selection) - set(inspect.signature(check_criteria).parameters))
        if unknown:
            raise ValueError(f"gate selection: unknown key {', '.join(map(brief, unknown))}")
        check_criteria(**self.selection)

    @property
    def early(self) -> int:
        """The timesteps at a run's beginning in which its own pictures do not limit the gate (`LATE`)."""
        return round(LATE * self.on.shape[1]) if self.over == "run" else 0

    def least(self) -> Tensor:
        """The gate: [C, T] int64, the least number of patches that at most a share `false_positive` of the other
        concepts' pictures reaches, but never more than a share `LEAST_KEPT` of the concept's own pictures has, of those
        in which anything is detected: what is to be erased goes before what is to be left. Over a run that holds from a
        share `LATE` of the timesteps on, where these are four or more, and is half as many (`MARGIN`) unless a share
        `SEVERAL` of the own pictures is of several concepts."""
        reach = [
            h.flip(-1).cumsum(-1).flip(-1) for h in (self.on, self.off)
        ]  # pictures with so many patches, or more
        allowed = (self.off.sum(-1, keepdim=True) * self.false_positive).floor()
        wanted = (reach[1][..., 1:] > allowed).sum(-1) + 1
        # At least one: with no own picture, or none detected, nothing is known against it.
        needed = (reach[0][..., 1:2] * LEAST_KEPT).ceil()
        most = ((reach[0][..., 1:] >= needed) & (reach[0][..., 1:] > 0)).sum(-1).clamp(min=1)
        if self.over == "run":
            several = torch.tensor(self.several or [0] * self.on.shape[0])
            enough = (several > 0) & (several >= SEVERAL * self.on[:, 0].sum(-1))
            most = torch.where(enough.unsqueeze(1), most, (most * MARGIN).long().clamp(min=1))
            most[:, : self.early] = wanted[:, : self.early]
        return torch.minimum(wanted, most)

    def passing(self) -> tuple[Tensor, Tensor]:
        """The shares of the concept's pictures, and of others, that pass the gate: both [C, T] float64."""
        enough = torch.arange(self.on.shape[2]) >= self.least().unsqueeze(-1)
        shares = [(h * enough).sum(-1).double() / h.sum(-1).clamp(min=1) for h in (self.on, self.off)]
        return shares[0], shares[1]

    def is_for(self, selection: Mapping[str, Any]) -> bool:
        """Whether the keywords of `selection`, or their defaults, are those of the counts."""
        return _whole(self.selection) == _whole(selection)


def check_rate(value: Any) -> None:
    """ValueError unless it is a share in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"picture_false_positive: expected a share in (0, 1], got {brief(value)}")


def _whole(selection: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(check_criteria).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    return defaults | {name: value for name, value in selection.items() if value is not None}
