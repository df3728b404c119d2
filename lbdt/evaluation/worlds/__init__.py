"""What an evaluation may run on: EmojiCanvas, UnlearnCanvas, and any pipeline with a user's prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lbdt.evaluation.evaluated_world import EvaluatedKind

if TYPE_CHECKING:
    from lbdt.editors import ConceptEraser, Steering

PathOrRepo = str | os.PathLike[str]

_SAEURON = (-1.0, -5.0, -10.0, -15.0, -20.0, -25.0, -30.0)
STRENGTHS = {
    "saeuron": _SAEURON,
    "saemnesia": _SAEURON,
    "gsae": (-5.0, -4.0, -3.0, -2.0, -1.5),
    "saeparate": (-0.1, -0.5, -1.0, -5.0),
}
"""The published grids of the steering sweep, by kind (METHOD.md, 5.1 and 5.2)."""
_PERCENTILES = tuple({"percentile": each, "thresholds": "published"} for each in (99.999, 99.995, 99.99))
SELECTIONS = {"saeuron": _PERCENTILES, "saeparate": _PERCENTILES}
"""The published selections that both choose from for each class (METHOD.md, 5.6)."""


def saved_kinds(
    erasers: Mapping[str, PathOrRepo],
    steering: Mapping[str, PathOrRepo],
    strengths: Mapping[str, Sequence[float]],
    steps: int,
    guidance: float | None,
) -> dict[str, EvaluatedKind]:
    """One `EvaluatedKind` per eraser: folders or Hub repositories, each read when it is used, and anew for every
    setting.

    `steering`: folders of `Steering.save_pretrained`, or an eraser's with a `steering.json`: without one there is no
    strength to start from, and it is refused when it is used. `strengths`: instead of those of `STRENGTHS`, by kind.

    Raises:
        ValueError: no eraser; steering or strengths of a kind that has none.
    """
    if not erasers:
        raise ValueError("erasers: expected one or more, {name: folder or Hub repository}, got none")
    for argument, given, known in (("steering", steering, erasers), ("strengths", strengths, steering)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(
                f"{argument}: {', '.join(unknown)}: no {'eraser' if known is erasers else 'steering'} of that name; "
                f"expected some of {', '.join(known) or 'none'}"
            )
    return {
        name: EvaluatedKind(
            name=name,
            steps=steps,
            guidance=guidance,
            per=_Per(folder),
            steering=_Steering(steering[name]) if name in steering else None,
            strengths=tuple(strengths.get(name, STRENGTHS.get(name, ()))) if name in steering else (),
            selections=SELECTIONS.get(name, ()) if name in steering else (),
        )
        for name, folder in erasers.items()
    }


class _Per:
    def __init__(self, folder: PathOrRepo) -> None:
        self.folder = folder

    def __call__(self, **settings: Any) -> ConceptEraser:
        from lbdt.editors import ConceptEraser

        known = (*ConceptEraser.SHOWN, "min_patches")
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise TypeError(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
        return ConceptEraser.from_pretrained(self.folder, **settings)


class _Steering:
    def __init__(self, folder: PathOrRepo) -> None:
        self.folder = folder

    def __call__(self, **settings: Any) -> Steering:
        from lbdt.editors import Steering

        return Steering.from_pretrained(self.folder, **settings)
