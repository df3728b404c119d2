"""Lines as SVG, in the page's own colours and at any width: nothing to load, and read aloud as a sentence."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 30, 58
_COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#db2777", "#0891b2", "#ca8a04", "#64748b")
_DASHES = ("", "7 4", "2 3", "9 3 2 3")
_MOST_LINES = len(_COLOURS)

Points = Sequence[tuple[float, float]]


def lines(title: str, across: str, up: str, series: Mapping[str, Points], falling: bool = True) -> str:
    """A chart of named lines; `falling`: x from large to small, as timesteps go.

    Points that are not finite are left out; of more than eight series the first eight are drawn, and it says so.
    """
    shown = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in list(series.items())[:_MOST_LINES]
    }
    points = [point for some in shown.values() for point in some]
    parts = [f'<text x="{_LEFT}" y="16" class="title">{html.escape(title)}</text>']
    if not points:
        parts.append(
            f'<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}" text-anchor="middle">Nothing to show yet</text>'
        )
    else:
        left, right = min(x for x, _ in points), max(x for x, _ in points)
        high = _rounded(max(y for _, y in points))
        low = min(0.0, min(y for _, y in points))
        place = _Places(left, right, low, high, falling)
        parts += _axes(place, across, up)
        for number, (name, some) in enumerate(shown.items()):
            parts += _line(place, number, name, some)
    more = f"; {len(series) - _MOST_LINES} more are not drawn" if len(series) > _MOST_LINES else ""
    spoken = html.escape(f"{title}. {_spoken(shown)}{more}", quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{spoken}" '
        f'preserveAspectRatio="xMidYMid meet">{"".join(parts)}</svg>'
    )


class _Places:
    """Where values lie in the picture."""

    def __init__(self, left: float, right: float, low: float, high: float, falling: bool) -> None:
        self.left, self.right, self.low, self.high, self._falling = left, right, low, high, falling

    def x(self, value: float) -> float:
        share = (value - self.left) / (self.right - self.left) if self.right > self.left else 0.5
        return _LEFT + (1 - share if self._falling else share) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _axes(place: _Places, across: str, up: str) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for share in (0.0, 0.5, 1.0):
        value = place.low + share * (place.high - place.low)
        y = place.y(value)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        across_value = place.left + share * (place.right - place.left)
        x = place.x(across_value)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{across_value:.4g}</text>')
    parts.append(f'<text x="{right}" y="{bottom + 30}" text-anchor="end">{html.escape(across)}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{html.escape(up)}</text>'
    )
    return parts


def _line(place: _Places, number: int, name: str, points: Points) -> list[str]:
    colour, dash = _COLOURS[number % len(_COLOURS)], _DASHES[number % len(_DASHES)]
    style = f'stroke="{colour}" stroke-dasharray="{dash}"'
    column, row = number % 4, number // 4
    x, y = _LEFT + column * 102, _HEIGHT - 16 + row * 12
    parts = [
        f'<line x1="{x}" x2="{x + 18}" y1="{y - 4}" y2="{y - 4}" class="drawn" {style}/>',
        f'<text x="{x + 23}" y="{y}">{html.escape(name[:14])}</text>',
    ]
    if points:
        way = " ".join(f"{place.x(x):.1f},{place.y(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{way}" class="drawn" fill="none" {style}/>')
    return parts


def _rounded(value: float) -> float:
    """The next number that reads well."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 2, 4, 5, 6, 8, 10, 20) if step * unit >= value * (1 - 1e-9))


def _spoken(shown: Mapping[str, Points]) -> str:
    """The ends of each line."""
    told = [
        f"{name}: from {points[0][1]:.3g} to {points[-1][1]:.3g}, at most {max(y for _, y in points):.3g}"
        for name, points in shown.items()
        if points
    ]
    return "; ".join(told) or "Nothing to show yet"
