"""Figures of lines: strength of steering, the trade-off, replaced patches over timesteps, several concepts at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from lbdt.evaluation.report import cells, theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = ("-", (0, (5, 1.5)), (0, (2.5, 1.2)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "v")
_BESIDE = 8
"""Places that are so near to a point that its label needs no line to it."""
_LEADER = {"arrowstyle": "-", "linewidth": 0.6, "color": theme.light("faint"), "shrinkA": 1, "shrinkB": 3}
_ORDERS = ("at once", "one after another")


def sweep(kinds: Mapping[str, Any]) -> Figure:
    """Strength against UA, IRA and, where measured, AR; PER at the right, with a line across at its height."""
    metrics = [m for m in ("UA", "IRA", "AR") if any(_measured(kind, m) for kind in kinds.values())]
    figure, grid = theme.panels(list(kinds), [f"{metric}, %" for metric in metrics], 1.75)
    for (name, kind), metric in product(kinds.items(), metrics):
        axes = grid[f"{metric}, %", name]
        if not _measured(kind, metric):
            theme.absent(axes)
            continue
        steered, replaced = _sorted(kind)
        labels = [_strength(row) for row in steered] + ["PER"] * bool(replaced)
        _sweep_line(axes, steered, metric)
        for row in replaced[:1]:
            _per_point(axes, row, metric, len(steered))
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.4, len(labels) - 0.6)
        theme.per_cent(axes)
        if metric == metrics[-1]:
            axes.set_xlabel("strength of steering")
    theme.legend(figure, list(grid.values()))
    return figure


def _sweep_line(axes: Axes, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    colour, marker, line = theme.LOOK["steering"]
    points = [(place, row) for place, row in enumerate(rows) if row.get(metric)]
    if not points:
        return
    heights = [row[metric]["mean"] for _, row in points]
    axes.plot(
        [p for p, _ in points],
        heights,
        linestyle=line,
        marker=marker,
        color=theme.light(colour),
        label="steering",
    )
    for place, row in points:
        _error(axes, place, row[metric], colour)
        if row.get("chosen"):
            _ring(axes, place, row[metric]["mean"])


def _per_point(axes: Axes, row: Mapping[str, Any], metric: str, place: int) -> None:
    if not row.get(metric):
        return
    colour, marker, _ = theme.LOOK["per"]
    height = row[metric]["mean"]
    axes.axhline(height, linestyle=":", linewidth=1, color=theme.light(colour))
    axes.plot(
        [place],
        [height],
        linestyle="",
        marker=marker,
        markersize=6,
        color=theme.light(colour),
        label="PER",
        clip_on=False,
    )
    _error(axes, place, row[metric], colour)


def tradeoff(kinds: Mapping[str, Any]) -> Figure:
    """UA across, IRA up: the strengths of steering joined in their order and labelled, PER as a point."""
    figure, grid = theme.panels(list(kinds), ["IRA, %"], 2.6)
    labels = []
    for name, kind in kinds.items():
        axes = grid["IRA, %", name]
        if not (_measured(kind, "UA") and _measured(kind, "IRA")):
            theme.absent(axes)
            continue
        points = []
        for rows, look in zip(_sorted(kind), ("steering", "per"), strict=True):
            rows = [row for row in rows if row.get("UA") and row.get("IRA")]
            places = [(row["UA"]["mean"], row["IRA"]["mean"]) for row in rows]
            if not rows:
                continue
            colour, marker, line = theme.LOOK[look]
            axes.plot(
                *zip(*places, strict=True),
                linestyle=line if look == "steering" else "",
                linewidth=1.1,
                marker=marker,
                markersize=4.5 if look == "steering" else 6.5,
                color=theme.light(colour),
                label=cells.METHODS[look],
                zorder=3 if look == "steering" else 4,
            )
            for row, place in zip(rows, places, strict=True):
                if row.get("chosen"):
                    _ring(axes, *place)
                text = _strength(row) if look == "steering" else "PER"
                points.append((place, text, colour, bool(row.get("chosen")) or look == "per"))
        theme.per_cent(axes)
        axes.set_xlim(-6, 106)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel("UA, %")
        labels.append((axes, points))
    theme.legend(figure, list(grid.values()))
    figure.draw_without_rendering()
    for axes, points in labels:
        _labels(axes, points)
    return figure


def _labels(axes: Axes, points: Sequence[tuple[tuple[float, float], str, str, bool]]) -> None:
    """Writes each label beside its point, where it covers no point, no line between points and no other label.

    A label that is not right beside its point has a line to it; one that finds no place is left out;
    those marked True have the first choice. The figure must have been laid out.
    """
    scale = 72 / axes.figure.dpi
    spots = [tuple(scale * value for value in axes.transData.transform(place)) for place, *_ in points]
    frame = tuple(scale * value for value in axes.bbox.extents)
    steered = [spot for spot, (_, text, *_) in zip(spots, points, strict=True) if text != "PER"]
    lines = [point for pair in zip(steered, steered[1:], strict=False) for point in _between(*pair)]
    taken = [_box(x, y, 4, 4) for x, y in spots] + [_box(x, y, 1, 1) for x, y in lines]
    for (x, y), (place, text, colour, _) in sorted(
        zip(spots, points, strict=True), key=lambda pair: not pair[1][3]
    ):
        across, down = 2.6 * len(text) + 1, 4.5  # half the size of the text at 8 points
        for number, (dx, dy) in enumerate(_sides(across, down)):
            box = _box(x + dx, y + dy, across, down)
            if _inside(box, frame) and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                axes.annotate(
                    text,
                    place,
                    xytext=(dx, dy),
                    textcoords="offset points",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=theme.light(colour),
                    in_layout=False,
                    arrowprops=_LEADER if number >= _BESIDE else None,
                )
                break


def _sides(across: float, down: float) -> list[tuple[float, float]]:
    """Offsets of a text's centre from its point, the nearest first."""
    near = [(across + 6, 0), (-across - 6, 0), (0, down + 6), (0, -down - 6)]
    corners = [(sx * (across + 4), sy * (down + 3)) for sx, sy in product((1, -1), (-1, 1))]
    return [*near, *corners, *((1.5 * x, 1.6 * y) for x, y in [*corners, *near])]


def _box(x: float, y: float, across: float, down: float) -> tuple[float, float, float, float]:
    return x - across, y - down, x + across, y + down


def _between(first: Sequence[float], second: Sequence[float]) -> list[tuple[float, float]]:
    parts = [number / 24 for number in range(1, 24)]
    return [tuple(a + part * (b - a) for a, b in zip(first, second, strict=True)) for part in parts]


def _inside(box: Sequence[float], frame: Sequence[float]) -> bool:
    return box[0] > frame[0] and box[1] > frame[1] and box[2] < frame[2] and box[3] < frame[3]


def _overlap(first: Sequence[float], second: Sequence[float]) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def ratio(kinds: Mapping[str, Any]) -> Figure:
    """Share of patches that PER replaces at each timestep, for every padding; the schedule runs from left to right."""
    figure, grid = theme.panels(list(kinds), ["patches replaced, %"], 2.3, sharex=True, sharey=True)
    for name, kind in kinds.items():
        axes = grid["patches replaced, %", name]
        if not kind.get("ratio"):
            theme.absent(axes)
            continue
        for number, (padding, steps) in enumerate(
            sorted(kind["ratio"].items(), key=lambda item: int(item[0]))
        ):
            look = number % 4
            axes.plot(
                [step["timestep"] for step in steps],
                [100 * step["replaced"] for step in steps],
                color=theme.light(f"padding-{look}"),
                linestyle=_DASHES[look],
                marker=_MARKERS[look],
                markersize=3.2,
                label=f"padding {padding}",
            )
        axes.set_xlabel("timestep")
    first = next(iter(grid.values()))
    first.set_ylim(bottom=0)
    first.invert_xaxis()
    theme.legend(figure, list(grid.values()))
    return figure


def together(kinds: Mapping[str, Any]) -> Figure:
    """Number of erased concepts against UA over them (solid) and RA on the kept ones (dashed)."""
    orders = [o for o in _ORDERS if any(_rows(kind, o) for kind in kinds.values())]
    figure, grid = theme.panels(list(kinds), [f"{order}, %" for order in orders], 2.0)
    for (name, kind), order in product(kinds.items(), orders):
        axes = grid[f"{order}, %", name]
        rows = _rows(kind, order)
        if not rows:
            theme.absent(axes)
            continue
        for method, (metric, line) in product(("steering", "per"), (("UA", "-"), ("RA", (0, (4, 1.5))))):
            points = [
                (len(row["erased"]), row[metric])
                for row in rows
                if row["method"] == method and row.get(metric)
            ]
            if not points:
                continue
            colour, marker, _ = theme.LOOK[method]
            axes.plot(
                [count for count, _ in points],
                [estimate["mean"] for _, estimate in points],
                color=theme.light(colour),
                linestyle=line,
                marker=marker,
                markerfacecolor=theme.light(colour if metric == "UA" else "ground"),
                label=f"{cells.METHODS[method]}, {metric}",
            )
            for count, estimate in points:
                _error(axes, count, estimate, colour)
        theme.per_cent(axes)
        axes.set_xticks(_counts(rows))
        if order == orders[-1]:
            axes.set_xlabel("concepts erased")
    theme.legend(figure, list(grid.values()))
    return figure


def _counts(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    found = sorted({len(row["erased"]) for row in rows})
    return found[:: -(-len(found) // 8)]


def _rows(kind: Mapping[str, Any], order: str) -> list[Mapping[str, Any]]:
    rows = [row for row in kind.get("together") or [] if row["order"] == order]
    return sorted(rows, key=lambda row: len(row["erased"]))


def _measured(kind: Mapping[str, Any], metric: str) -> bool:
    return any(row.get(metric) for row in kind.get("sweep") or [])


def _sorted(kind: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The sweep's rows of steering from weak to strong, and those of PER."""
    rows = kind.get("sweep") or []
    steered = [row for row in rows if row["method"] == "steering"]
    steered.sort(key=lambda row: abs((row.get("settings") or {}).get("strength", 0.0)))
    return steered, [row for row in rows if row["method"] == "per"]


def _strength(row: Mapping[str, Any]) -> str:
    value = (row.get("settings") or {}).get("strength")
    return "shipped" if value is None else f"{value:g}".replace("-", "\u2212")


def _error(axes: Axes, place: float, estimate: Mapping[str, Any], colour: str) -> None:
    spread = theme.interval(estimate)
    if spread is not None:
        axes.errorbar(
            [place], [estimate["mean"]], yerr=spread, fmt="none", color=theme.light(colour), elinewidth=1
        )


def _ring(axes: Axes, x: float, y: float) -> None:
    axes.plot(
        [x],
        [y],
        linestyle="",
        marker="o",
        markersize=10,
        markerfacecolor="none",
        color=theme.light("ink"),
        label="chosen strength",
        zorder=5,
        clip_on=False,
    )
