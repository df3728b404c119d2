"""The frame of the HTML report: headings, table of contents and style."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from lbdt.evaluation.report.theme import COLOURS

SECTIONS = (
    ("erases", "Does it erase?"),
    ("breaks", "What else breaks?"),
    ("costs", "At what cost?"),
    ("inside", "What happens inside?"),
    ("several", "Several concepts"),
    ("published", "Published figures"),
    ("how", "How it was measured"),
)
"""(id, heading)."""

_STYLE = """
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
@media (max-width: 50rem) { figure svg { min-width: 44rem; } dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.5rem; } }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""


def _variables(variant: int) -> str:
    return " ".join(f"--{name}: {colours[variant]};" for name, colours in COLOURS.items())


def page(title: str, summary: str, sections: Iterable[tuple[tuple[str, str], str]]) -> str:
    """A whole HTML document. `summary` and the sections' bodies are HTML, `title` is text; sections: ((id, heading), body)."""
    sections = list(sections)
    contents = "".join(f'<li><a href="#{name}">{escape(text)}</a></li>' for (name, text), _ in sections)
    bodies = "".join(
        f'<section id="{name}"><h2>{escape(text)}</h2>{body}</section>\n' for (name, text), body in sections
    )
    style = (
        f":root {{ color-scheme: light dark; {_variables(0)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(1)} }} }}{_STYLE}"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{summary}</header>\n"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>\n<main>\n{bodies}</main>\n</body>\n</html>\n'
    )
