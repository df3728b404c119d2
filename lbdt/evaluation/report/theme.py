"""The look of the report: colours that differ in hue and in lightness, small multiples of pipelines, the page's frame.

A colour has a light and a dark variant: the SVG files hold the light one, the HTML report exchanges it for a variable.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from lbdt.runs.wording import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEEDS = "needs matplotlib: pip install lbdt[plot]"

COLOURS = {
    "ink": ("#202124", "#e8e8e6"),
    "faint": ("#63666b", "#a6aab0"),
    "line": ("#dcdde0", "#3a3d42"),
    "ground": ("#fdfdfb", "#1b1c1f"),
    "base": ("#9b9ea3", "#83878d"),
    "steering": ("#d97400", "#f2a33a"),
    "per": ("#0b4f8a", "#63b0f5"),
    "weak": ("#e9a54c", "#b5762a"),
    "strong": ("#8f4300", "#ffd7a1"),
    "padding-0": ("#06264f", "#eaf2fd"),
    "padding-1": ("#1f66ad", "#a9cef5"),
    "padding-2": ("#4f9bd6", "#5f9fe0"),
    "padding-3": ("#86bfe6", "#3f76b5"),
}
"""Name -> (on a light ground, on a dark ground)."""

LOOK = {"steering": ("steering", "o", "-"), "per": ("per", "D", "-"), "base": ("base", "s", ":")}
"""Method -> (colour, marker, line style)."""

_PANEL = 2.75  # inches across: four of them fill the report's 1,100 CSS pixels


def light(name: str) -> str:
    """The hexadecimal colour in the SVG files."""
    return COLOURS[name][0]


def installed() -> bool:
    """Whether matplotlib is installed. One that is installed and cannot be imported raises what it raises."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return False
    return True


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults with ours over them, whatever the user's matplotlibrc says; restored afterwards."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name in letters that the font lacks is drawn as boxes; there is nothing that one could do.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "lbdt",
                "svg.fonttype": "path",
                # Names of concepts are text, also with a dollar sign in them.
                "text.parse_math": False,
                "font.size": 9,
                "axes.titlesize": 10,
                "axes.titleweight": "bold",
                "axes.labelsize": 9,
                "xtick.labelsize": 8.5,
                "ytick.labelsize": 8.5,
                "legend.fontsize": 9,
                "legend.frameon": False,
                "text.color": light("ink"),
                "axes.labelcolor": light("ink"),
                "axes.titlecolor": light("ink"),
                "xtick.color": light("faint"),
                "ytick.color": light("faint"),
                "axes.edgecolor": light("faint"),
                "axes.linewidth": 0.8,
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": light("line"),
                "grid.linewidth": 0.7,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "figure.facecolor": light("ground"),
                "axes.facecolor": light("ground"),
                "savefig.facecolor": light("ground"),
                "lines.linewidth": 1.6,
                "lines.markersize": 4.5,
                "errorbar.capsize": 2,
            }
        )
        yield


def panels(
    columns: Sequence[str], rows: Sequence[str], height: float, **shared: Any
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """A figure of len(rows) x len(columns) panels, each `height` inches high -> the figure and (row, column) -> axes.

    The columns' names are titles, the rows' names the labels of the first column.
    """
    from matplotlib.figure import Figure

    size = (max(_PANEL * len(columns), 4.6) + 0.3, height * len(rows) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, **shared)
    found = {}
    for line, row in enumerate(rows):
        for number, column in enumerate(columns):
            axes = found[row, column] = grid[line][number]
            if line == 0:
                axes.set_title(label(column), loc="left")
            if number == 0:
                axes.set_ylabel(row)
    return figure, found


def label(name: str) -> str:
    """A name as there is room for beside an axis or over a panel."""
    return short(name, 32)


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend above all panels: each label once, in the order in which the panels first show it."""
    found: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        names = list(found)
        figure.legend(list(found.values()), names, loc="outside upper left", ncols=min(len(names), 7))


def absent(axes: Axes) -> None:
    """An empty panel that says why."""
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=light("faint"))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


def per_cent(axes: Axes) -> None:
    """An axis from 0 to 100 with room for the marks at its ends."""
    axes.set_ylim(-4, 104)
    axes.set_yticks([0, 25, 50, 75, 100])


def interval(estimate: Mapping[str, Any]) -> list[list[float]] | None:
    """`yerr` of one point; None with one seed."""
    low, high, mean = estimate.get("low"), estimate.get("high"), estimate["mean"]
    return None if low is None or high is None else [[max(0.0, mean - low)], [max(0.0, high - mean)]]


def svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes for the same figures: no date, no version of matplotlib in it."""
    stream = io.BytesIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=metadata)
    return stream.getvalue()


_PAGE_STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.25rem 5rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1rem 0 0.5rem; }
h2 { font-size: 1.4rem; margin: 3rem 0 0.75rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
h4 { font-size: 1rem; margin: 1.25rem 0 0.25rem; }
p, dd, li { max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--per); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 1rem 0 0; padding: 0; list-style: none; }
.facts, .note, figcaption, .none, dt { color: var(--faint); }
.note, figcaption { font-size: 0.9rem; }
.none { font-size: 0.85em; font-weight: normal; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; margin: 0.5rem 0; }
th, td { padding: 0.3rem 0.5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; border-bottom-color: var(--faint); }
th:first-child, td:first-child { padding-left: 0; }
tr.first td { border-top: 1px solid var(--faint); }
th.name, td.name { text-align: left; }
tbody tr:hover { background: color-mix(in srgb, var(--line) 45%, transparent); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1.25rem; font-size: 0.95rem; }
dd { margin: 0; }
figure { margin: 1.75rem 0; }
figure svg, figure img { max-width: 100%; height: auto; display: block; }
figcaption { max-width: 46rem; margin-top: 0.4rem; }
summary { cursor: pointer; padding: 0.35rem 0; }
@media (max-width: 50rem) { figure svg { min-width: 44rem; } \
dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.5rem; } }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""


def page(title: str, summary: str, sections: Iterable[tuple[tuple[str, str], str]]) -> str:
    """A whole HTML document: `title` is text, `summary` and the bodies are HTML; a section is ((id, heading), body)."""
    sections = list(sections)
    contents = "".join(f'<li><a href="#{name}">{escape(text)}</a></li>' for (name, text), _ in sections)
    bodies = "".join(
        f'<section id="{name}"><h2>{escape(text)}</h2>{body}</section>\n' for (name, text), body in sections
    )
    style = (
        f":root {{ color-scheme: light dark; {_variables(0)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(1)} }} }}{_PAGE_STYLE}"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{summary}</header>\n"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>\n<main>\n{bodies}</main>\n</body>\n</html>\n'
    )


def _variables(variant: int) -> str:
    return " ".join(f"--{name}: {colours[variant]};" for name, colours in COLOURS.items())
