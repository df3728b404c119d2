"""Unlearning accuracy (UA), in-domain (IRA) and cross-domain retain accuracy (CRA), and their means over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CONFIDENCE = 0.95


class Unlearning(NamedTuple):
    """The rates of one erased concept, in per cent; None where no picture could say."""

    ua: float | None
    ira: float | None
    cra: float | None


def unlearning(
    erased: Tensor,
    objects: Tensor,
    styles: Tensor,
    seen_objects: Tensor,
    seen_styles: Tensor | None,
) -> dict[int, Unlearning]:
    """UA, IRA and CRA of every erased concept (METHOD.md, 8.3; SAeUron's protocol), by concept.

    - UA: the share of the pictures whose prompt names the erased concept in which it is not seen.
    - IRA: the share of those of every other object in which that object is seen, averaged over the objects.
    - CRA: the accuracy of the style classifier on all styled pictures, the erased concept's included,
      averaged over the styles. Of the others a sample may have been generated: they then stand for all
      O - 1 others of a style, so that the erased concept weighs 1 / O as in the whole grid. On the whole
      grid that is the plain mean.

    Every share is divided by the pictures that are here, not by those that were planned.

    Args:
        erased, objects: int64 [n], the concept that was erased, and that of the prompt.
        styles: int64 [n], of the prompt; -1: none.
        seen_objects: bool [n, O], which of the world's O objects are seen.
        seen_styles: int64 [n], the style classifier's verdicts; None: there is none.

    Raises:
        ValueError: tensors of different lengths, or no picture.
    """
    tensors = [erased, objects, styles, *([] if seen_styles is None else [seen_styles])]
    wrong = seen_objects.dim() != 2 or seen_objects.shape[:1] != erased.shape
    if wrong or len({t.shape for t in tensors}) != 1 or not len(erased):
        shapes = ", ".join(str(list(t.shape)) for t in (*tensors, seen_objects))
        raise ValueError(f"expected tensors of one length [n], n > 0, and objects seen [n, O]; got {shapes}")
    count = seen_objects.shape[1]
    right = named_seen(seen_objects, objects)
    right_style = None if seen_styles is None else (styles == seen_styles).double()
    scores = {}
    for concept in erased.unique().tolist():
        here = erased == concept
        own, other = here & (objects == concept), here & (objects != concept)
        cra = None
        if right_style is not None:
            parts = [
                mean_by(right_style[part & (styles >= 0)], styles[part & (styles >= 0)])
                for part in (own, other)
            ]
            if None not in parts:
                cra = (parts[0] + (count - 1) * parts[1]) / count
        ua = mean_by(1 - right[own], objects[own])
        scores[concept] = Unlearning(
            _percent(ua), _percent(mean_by(right[other], objects[other])), _percent(cra)
        )
    return scores


def named_seen(seen: Tensor, objects: Tensor) -> Tensor:
    """float64 [n]: 1 where the object `objects` (int64 [n]) is among those `seen` (bool [n, O]), else 0."""
    return seen.gather(1, objects.unsqueeze(1)).squeeze(1).double()


def average(scores: list[float | None]) -> float | None:
    """The mean of those that are there; None where none is."""
    there = [score for score in scores if score is not None]
    return sum(there) / len(there) if there else None


def global_average(
    ua: float | None, ira: float | None, cra: float | None, artifact_rate: float | None
) -> float | None:
    """GA: the mean of UA, IRA, CRA and 100 - AR, without CRA where there is none (METHOD.md, 8.4: that
    reproduces all eight published rows); None where one of the other three is missing."""
    if ua is None or ira is None or artifact_rate is None:
        return None
    return average([ua, ira, cra, 100 - artifact_rate])


def mean_by(values: Tensor, groups: Tensor) -> float | None:
    """The mean over the groups of each group's mean: float `values` [n], int64 `groups` [n]. None for none."""
    if not len(values):
        return None
    return float(torch.stack([values[groups == group].mean() for group in groups.unique()]).mean())


def estimate(values: Sequence[float | None]) -> dict[str, Any] | None:
    """The mean of one value a seed (None: not measured), and its 95 % interval by Student's t; no interval
    for one, None for no value.

    The interval says what other seeds would do to the same concepts and prompts; it may reach beyond 0 or
    100.

    Raises:
        ImportError: scipy is not installed.
    """
    there = [value for value in values if value is not None]
    if not there:
        return None
    mean = statistics.fmean(there)
    if len(there) == 1:
        return {"mean": mean, "low": None, "high": None, "seeds": 1}
    try:
        from scipy.stats import t
    except ModuleNotFoundError as error:
        raise ImportError("intervals over seeds need scipy: pip install lbdt[evaluate]") from error
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(there) - 1)) * statistics.stdev(there) / len(there) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": len(there)}


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
