"""Means over seeds, and how far they can be trusted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

CONFIDENCE = 0.95


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
