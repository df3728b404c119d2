"""How the report writes one figure, one row's name and one table; anything that was not measured is said to be so."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lbdt.runs.wording import legible

EXTRA = ("clean", "kept", "pair gone", "untouched")
"""Columns beside those of the protocol (METHOD.md, 8.8)."""
BASE = {"IRA": "object seen", "CRA": "style seen", "clean": "nothing seen", "kept": "both seen"}
"""Column -> what the unedited model's row has in it."""
PERCENT = ("UA", "IRA", "CRA", "RA", "AR", "AR others", "GA", "replaced", *EXTRA, *BASE.values())
LOWER_IS_BETTER = ("AR", "AR others", "FD")
HIGHER_IS_BETTER = ("UA", "IRA", "CRA", "RA", "GA", "CLIP", *EXTRA)
METHODS = {
    "base": "base",
    "negative": "negative prompt",
    "uce": "UCE",
    "steering": "steering",
    "by class": "steering, by class",
    "ungated": "PER without the gate",
    "per": "PER",
}
"""Method -> its name, in the order of the rows."""
NONE = "-"
_ORDER = ("UA", "IRA", "CRA", "RA", "AR", "AR others", "GA", "FD", *EXTRA, *BASE.values(), "CLIP", "replaced")


class Table(NamedTuple):
    """Text cells; the first `names` columns are names (left-aligned), the others figures."""

    head: list[str]
    rows: list[list[str]]
    marked: set[tuple[int, int]]
    """(row, column) of the cells that are the better ones."""
    names: int


def metrics_of(row: Mapping[str, Any]) -> list[str]:
    """The metrics that `row` has a figure of: the known ones in the report's order, then others by name."""
    found = [name for name, value in row.items() if isinstance(value, Mapping) and "mean" in value]
    return sorted(found, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))


def mean_of(row: Mapping[str, Any] | None, metric: str) -> float | None:
    """The mean of a metric; None where it was not measured."""
    estimate = (row or {}).get(metric)
    return None if estimate is None else estimate["mean"]


def half_of(estimate: Mapping[str, Any]) -> float | None:
    """Half the width of the 95 % interval; None with one seed."""
    low, high = estimate.get("low"), estimate.get("high")
    return None if low is None or high is None else max(high - estimate["mean"], estimate["mean"] - low)


def number(value: float | None, metric: str) -> str:
    """A plain figure of this metric: per cent with one decimal, others with three significant digits."""
    return NONE if value is None else f"{value:.{_decimals(value, metric)}f}"


def count(value: int | None) -> str:
    """A number of pictures or patches."""
    return NONE if value is None else f"{value:,}"


def cell(row: Mapping[str, Any], metric: str) -> str:
    """`91.7 ± 3.4`, `91.7` without an interval, `-` where the metric was not measured, nothing in a row that cannot be.

    Of the base's row that which `BASE` says, where it was measured.
    """
    if row.get("note"):
        return ""
    if row["method"] == "base" and row.get(BASE.get(metric, "")) is not None:
        metric = BASE[metric]
    estimate = row.get(metric)
    if estimate is None:
        return NONE
    half = half_of(estimate)
    text = number(estimate["mean"], metric)
    return text if half is None else f"{text} ± {half:.{_decimals(estimate['mean'], metric)}f}"


def _decimals(value: float, metric: str) -> int:
    if metric in PERCENT:
        return 1
    return 2 if value == 0 else min(6, max(1, 2 - math.floor(math.log10(abs(value)))))


def plain(value: Any) -> str:
    """A setting's value: numbers without a needless `.0`."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings(row: Mapping[str, Any]) -> str:
    """`strength -5`, `padding 1, nearest` (most words say themselves what they are), a row's note, or nothing."""
    if row.get("note"):
        return row["note"]
    given = [item for item in (row.get("settings") or {}).items() if item[0] != "min_patches"]
    return ", ".join(
        value if isinstance(value, str) and name != "avoid" else f"{name} {plain(value)}"
        for name, value in given
    )


def method(row: Mapping[str, Any]) -> str:
    """`PER`, with its settings in brackets where there are some."""
    name, text = METHODS.get(row["method"], row["method"]), settings(row)
    return f"{name} ({text})" if text else name


def kinds_of(values: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Name -> what was measured of it; names, here and inside, as they can be printed."""
    return legible(values.get("kinds") or {})


def main_row(kind: Mapping[str, Any], method_name: str) -> Mapping[str, Any] | None:
    """The main table's row of a method; None where it was not run."""
    return next((row for row in kind.get("rows") or [] if row["method"] == method_name), None)


def stronger_steering(kind: Mapping[str, Any], metric: str) -> Mapping[str, Any] | None:
    """The better row by a metric of those that steer; of equal ones, or where one was not measured, the first that was.
    None where none was run."""
    rows = [row for row in (main_row(kind, name) for name in ("steering", "by class")) if row is not None]
    measured = [row for row in rows if mean_of(row, metric) is not None]
    place = best([mean_of(row, metric) for row in measured], metric)
    return measured[place or 0] if measured else next(iter(rows), None)


def best(means: Sequence[float | None], metric: str) -> int | None:
    """The place of the best mean as printed; None on a tie for it, or where fewer than two were measured."""
    there = [(n, mean) for n, mean in enumerate(means) if mean is not None]
    if len(there) < 2 or metric not in LOWER_IS_BETTER + HIGHER_IS_BETTER:
        return None
    if metric in PERCENT:
        there = [(n, round(mean, 1)) for n, mean in there]
    top = (min if metric in LOWER_IS_BETTER else max)(mean for _, mean in there)
    places = [n for n, mean in there if mean == top]
    return places[0] if len(places) == 1 else None


def text_lines(table: Table) -> list[str]:
    """The table for the terminal: columns padded, `*` behind what is marked."""
    grid = [list(table.head)] + [
        [text + "*" * ((line, column) in table.marked) for column, text in enumerate(row)]
        for line, row in enumerate(table.rows)
    ]
    sizes = [max(_width(row[column]) for row in grid) for column in range(len(table.head))]
    lines = []
    for row in grid:
        cells = []
        for column, (text, size) in enumerate(zip(row, sizes, strict=True)):
            padding = " " * (size - _width(text))
            cells.append(text + padding if column < table.names else padding + text)
        lines.append("  ".join(cells).rstrip())
    return lines


def _width(text: str) -> int:
    """Columns of a terminal that the text takes."""
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in text
    )


def markdown_lines(table: Table) -> list[str]:
    """A Markdown table, with what is marked in bold."""
    rows = [
        [
            f"**{_quoted(text)}**" if (line, column) in table.marked else _quoted(text)
            for column, text in enumerate(row)
        ]
        for line, row in enumerate(table.rows)
    ]
    return _bars([[_quoted(text) for text in table.head], ["---"] * len(table.head), *rows])


def _quoted(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _bars(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines[1] = lines[1].replace(" ", "")
    return lines


def parts_of(kind: Mapping[str, Any], *names: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(part, row) of the parts that are lists of rows; absent ones are left out."""
    for name in names:
        for row in kind.get(name) or []:
            yield name, row
