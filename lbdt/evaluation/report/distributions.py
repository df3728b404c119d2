"""Figures of histograms and bars: activations before and after an edit, and every concept for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lbdt.evaluation.report import cells, theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PARTS = {"norms": "log2 of patch norm", "dimension": "the most moved dimension"}
_STRENGTHS = ("weak", "steering", "strong")
_DASHES = {"weak": (0, (1, 1)), "steering": (0, (4, 1.5)), "strong": "-"}


def activations(kinds: Mapping[str, Any]) -> Figure:
    """Densities of log2 patch norms and of one dimension: base filled, steering at up to three strengths, PER.

    The vertical axis is logarithmic: what leaves the distribution is in the tails.
    """
    figure, grid = theme.panels(list(kinds), [f"density,\n{part}" for part in _PARTS.values()], 2.0)
    for name, kind in kinds.items():
        for part, label in _PARTS.items():
            axes = grid[f"density,\n{label}", name]
            rows = [row for row in kind.get("activations") or [] if row.get(part)]
            if not rows:
                theme.absent(axes)
                continue
            _densities(axes, rows, part)
            index = rows[0][part].get("index")
            axes.set_xlabel("log2 of the L2 norm" if index is None else f"value of dimension {index}")
    theme.legend(figure, list(grid.values()))
    return figure


def _densities(axes: Axes, rows: Sequence[Mapping[str, Any]], part: str) -> None:
    smallest = []
    for row, (colour, line, label) in shown(rows):
        edges, shares = row[part]["edges"], row[part]["share"]
        heights = [s / (b - a) for s, a, b in zip(shares, edges[:-1], edges[1:], strict=True)]
        smallest += [height for height in heights if height > 0]
        given = {"edgecolor": theme.light(colour), "label": label, "linestyle": line, "linewidth": 1.4}
        if row["method"] == "base":
            given |= {"fill": True, "facecolor": theme.light(colour), "alpha": 0.55, "linewidth": 0}
        # Zero cannot be drawn on a logarithmic axis: the outline goes down to its lower end.
        axes.stairs(heights, edges, baseline=None if row["method"] != "base" else 0, **given)
    axes.set_yscale("log", nonpositive="clip")
    if smallest:
        axes.set_ylim(bottom=min(smallest) / 2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def shown(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], tuple[str, Any, str]]]:
    """The rows that a figure has room for: base, the weakest, the middle and the strongest steering, and PER.

    Returns each with (colour, line style, label).
    """
    steered = [row for row in rows if row["method"] == "steering"]
    steered.sort(key=lambda row: abs((row.get("settings") or {}).get("strength", 0.0)))
    last = len(steered) - 1
    places = {0: ["steering"], 1: ["weak", "strong"]}.get(last, list(_STRENGTHS))
    chosen = (
        [steered[round(number * last / max(1, len(places) - 1))] for number in range(len(places))]
        if steered
        else []
    )
    looks = [(row, ("base", "-", "base")) for row in rows if row["method"] == "base"]
    words = {"weak": "steering, weakest", "steering": "steering, middle", "strong": "steering, strongest"}
    for row, look in zip(chosen, places, strict=False):
        looks.append((row, (look, _DASHES[look], "steering" if last == 0 else words[look])))
    return looks + [(row, ("per", "-", cells.METHODS["per"])) for row in rows if row["method"] == "per"]


def concepts(kinds: Mapping[str, Any], metric: str) -> Figure:
    """One pair of bars a concept: steering beside PER, the concepts in their order from the top."""
    names = list(dict.fromkeys(c for kind in kinds.values() for m in _methods(kind).values() for c in m))
    figure, grid = theme.panels(list(kinds), [""], 0.27 * len(names) + 0.3, sharey=True)
    for name, kind in kinds.items():
        axes = grid["", name]
        measured = False
        for method, shift in (("steering", -0.2), ("per", 0.2)):
            found = _methods(kind).get(method) or {}
            points = [
                (place, found[concept][metric])
                for place, concept in enumerate(names)
                if found.get(concept) and found[concept].get(metric) is not None
            ]
            if not points:
                continue
            measured = True
            axes.barh(
                [place + shift for place, _ in points],
                [value for _, value in points],
                height=0.38,
                color=theme.light(theme.LOOK[method][0]),
                label=cells.METHODS[method],
            )
        if not measured:
            axes.text(50, len(names) / 2, "not measured", ha="center", color=theme.light("faint"))
        axes.set_xlim(0, 102)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel(f"{metric}, %")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    first = next(iter(grid.values()))
    first.set_yticks(range(len(names)), [theme.label(name) for name in names], color=theme.light("ink"))
    first.set_ylim(len(names) - 0.4, -0.6)
    theme.legend(figure, list(grid.values()))
    return figure


def _methods(kind: Mapping[str, Any]) -> Mapping[str, Any]:
    return {method: found or {} for method, found in (kind.get("per concept") or {}).items()}
