"""The figures of the report: small multiples, one column a pipeline, drawn by matplotlib as SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from lbdt.evaluation.report import cells, curves, distributions, theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _has_concepts(kind: Mapping[str, Any], metric: str) -> bool:
    methods = (kind.get("per concept") or {}).values()
    return any(figures.get(metric) is not None for found in methods for figures in (found or {}).values())


def _sweeps(kind: Mapping[str, Any], *metrics: str) -> bool:
    return any(all(row.get(metric) for metric in metrics) for row in kind.get("sweep") or [])


def _any_sweep(kind: Mapping[str, Any]) -> bool:
    return any(_sweeps(kind, metric) for metric in ("UA", "IRA", "AR"))


_FIGURES: dict[str, tuple[Callable[[Mapping[str, Any]], Any], Callable[[Mapping[str, Any]], Figure]]] = {
    "sweep": (_any_sweep, curves.sweep),
    "tradeoff": (lambda kind: _sweeps(kind, "UA", "IRA"), curves.tradeoff),
    "concepts-ua": (partial(_has_concepts, metric="UA"), partial(distributions.concepts, metric="UA")),
    "concepts-ar": (partial(_has_concepts, metric="AR"), partial(distributions.concepts, metric="AR")),
    "ratio": (lambda kind: kind.get("ratio"), curves.ratio),
    "activations": (lambda kind: kind.get("activations"), distributions.activations),
    "together": (lambda kind: kind.get("together"), curves.together),
}


def drawable(values: Mapping[str, Any]) -> list[str]:
    """Names of the figures that something was measured for. Needs no matplotlib."""
    kinds = cells.kinds_of(values).values()
    return [name for name, (measured, _) in _FIGURES.items() if any(measured(kind) for kind in kinds)]


def figures(values: Mapping[str, Any]) -> dict[str, bytes]:
    """Name of a figure -> SVG, the same bytes for the same values.

    Raises ImportError where matplotlib is not installed.
    """
    if not theme.installed():
        raise ImportError(f"the figures of the report: {theme.NEEDS}")
    kinds = cells.kinds_of(values)
    drawn = {}
    with theme.style():
        for name in drawable(values):
            drawn[name] = theme.svg(_FIGURES[name][1](kinds))
    return drawn
