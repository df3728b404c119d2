"""The report as one HTML file that needs nothing else: figures inside it, no script, no link that must be followed."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lbdt.evaluation import published
from lbdt.evaluation.report import cells, tables, theme
from lbdt.evaluation.report.cells import Table
from lbdt.evaluation.report.plots import drawable
from lbdt.runs.wording import legible

UNMEASURED = '<p class="none">not measured</p>'
NOT_DRAWN = f"not drawn: {theme.NEEDS.replace(': ', ', ')}"

_SECTIONS = (
    ("erases", "Does it erase?"),
    ("breaks", "What else breaks?"),
    ("costs", "At what cost?"),
    ("inside", "What happens inside?"),
    ("several", "Several concepts"),
    ("published", "Published figures"),
    ("how", "How it was measured"),
)
"""(id, heading)."""
_CAPTIONS = {
    "sweep": "Strength of steering against UA, IRA and artifact rate, on the sweep's seeds; PER on the same pictures "
    "at the right, and as the dotted line. The ringed strength is the one that the main table scores, on other seeds.",
    "tradeoff": "The same runs, UA against IRA: up and to the right is better. Figures beside the points are "
    "strengths.",
    "concepts-ua": "UA of every erased concept.",
    "concepts-ar": "Artifact rate of every erased concept.",
    "ratio": "Patches that PER replaces at each timestep, for every padding, in pictures of prompts that name the "
    "erased concept.",
    "activations": "Patches at the hookpoint without an eraser (grey), steered and replaced: log2 of their norms, and "
    "the one dimension that steering moves most. Logarithmic densities.",
    "together": "Concepts erased together against UA over all of them (solid) and RA, accuracy on those that are kept "
    "(dashed).",
}
_GLOSSARY = (
    ("UA", "share of pictures whose prompt names the erased concept in which it is no longer classified. "
     "Higher is better."),
    ("IRA", "share of pictures of the other concepts that are still classified as theirs. Higher is better."),
    ("CRA", "share of all styled pictures whose style is still classified. Higher is better."),
    ("AR", "share of pictures that the artifact rule rejects; AR others: of those whose prompt does not name "
     "the erased concept. Lower is better."),
    ("GA", "global average: mean of UA, IRA, CRA and 100 - AR, without CRA where there is none. Higher is better."),
    ("FD", "Frechet distance of the judge's features, of pictures whose prompt does not name the erased concept to the "
     "unedited ones of the same prompts. Lower is better."),
    ("clean", "share of pictures whose prompt names the erased concept alone in which no object at all is seen and no "
     "artifact. Higher is better."),
    ("kept", "share of pictures of the erased concept and another object in which the other one is still seen. Higher "
     "is better."),
    ("pair gone", "share of these in which the erased concept is no longer seen. Higher is better."),
    ("untouched", "share of pictures whose prompt does not name the erased concept that keep every bit. Higher is "
     "better."),
    ("CLIP", "CLIP score with the prompt, where a model was given, of pictures whose prompt does not name the erased "
     "concept. Higher is better."),
)  # fmt: skip
_ABOUT = (
    ("world", "world"),
    ("judge", "judge"),
    ("features", "features of FD"),
    ("artifacts", "artifact rule"),
    ("design", "design"),
    ("by text", "methods that work by text"),
    ("gate", "gate"),
    ("seeds", "seeds that are scored"),
    ("sweep seeds", "seeds that the strength is chosen on"),
    ("quick", "quick"),
    ("commit", "commit"),
    ("command", "command"),
    ("date", "date"),
    ("device", "device"),
    ("versions", "versions"),
)


def html(values: Mapping[str, Any], plots: Mapping[str, Path], folder: Path) -> str:
    """The whole page. `plots`: names of figures -> SVG, `grid NAME` of a kind -> PNG; relative ones lie in `folder`.

    A figure that was measured and is not in `plots` is said to be not drawn.
    """
    files = {name: folder / path for name, path in plots.items()}
    values = legible(values)
    kinds = cells.kinds_of(values)
    bodies = (
        _erases(values, kinds, files),
        _breaks(values, kinds, files),
        _costs(values, kinds),
        _inside(values, kinds, files),
        _several(values, kinds, files),
        _published(values),
        _how(values),
    )
    about = values.get("about") or {}
    title = f"Evaluation on {about['world']}" if about.get("world") else "Evaluation"
    return theme.page(title, _summary(values, about), zip(_SECTIONS, bodies, strict=True))


def _summary(values: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    facts = []
    if about.get("quick"):
        facts.append("quick run: fewer pictures")
    if about.get("seeds"):
        facts.append(f"seeds {', '.join(map(str, about['seeds']))}")
    if about.get("commit"):
        facts.append(f"commit {about['commit']}" + (" with changes" if about.get("dirty") else ""))
    text = f'<p class="facts">{escape("; ".join(facts))}</p>' if facts else ""
    return text + _list(escape(line) for line in tables.verdict(values))


def _erases(values: Mapping[str, Any], kinds: Mapping[str, Any], files: Mapping[str, Path]) -> str:
    main = tables.main_table(values, tables.columns_of(values))
    text = _table(main) if main.rows else UNMEASURED
    text += f'<p class="note">Bold: {escape(tables.MARKS)}. {escape(tables.BASE_NOTE)}.</p>'
    text += "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in _GLOSSARY) + "</dl>"
    text += _figures(values, files, ("sweep", "tradeoff"))
    if any(kind.get("sweep") for kind in kinds.values()):
        text += _folded("All figures of the sweep", _parts(kinds, "sweep"))
    text += _figures(values, files, ("concepts-ua",))
    text += "<h3>Pictures</h3>"
    shown = [name for name in kinds if f"grid {name}" in files]
    for name in shown:
        caption = (
            f"{name}: without an eraser, the patches in which the SAE saw the concept, and by each method; of a pair "
            "the first-named object is erased."
        )
        body = _figure(f"grid {name}", files[f"grid {name}"], caption)
        text += _folded(name, body, opened=name == shown[0])
    return text + ("" if shown else UNMEASURED)


def _breaks(values: Mapping[str, Any], kinds: Mapping[str, Any], files: Mapping[str, Path]) -> str:
    note = (
        "IRA, CRA, AR others, FD, kept and untouched of the main table say what else changed. Below: artifacts by "
        "concept."
    )
    return f"<p>{note}</p>" + _figures(values, files, ("concepts-ar",))


def _costs(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            times.get("unit", "seconds a picture"),
            *(_time(times, method) for method in cells.METHODS),
        ]
        for name, times in (values.get("cost") or {}).items()
        if times
    ]
    text = (
        _table(Table(["pipeline", "unit", *cells.METHODS.values()], rows, set(), 2)) if rows else UNMEASURED
    )
    if rows:
        text += '<p class="note">In brackets: over the base.</p>'
    shares = [
        [name, cells.method(row), cells.cell(row, "replaced")]
        for name, kind in kinds.items()
        for row in kind.get("rows") or []
        if row["method"] in ("ungated", "per")
    ]
    text += "<h3>Patches replaced</h3>"
    return text + (
        _table(Table(["pipeline", "method", "replaced, %"], shares, set(), 2)) if shares else UNMEASURED
    )


def _time(times: Mapping[str, Any], method: str) -> str:
    value, base = times.get(method), times.get("base")
    if value is None:
        return cells.NONE
    return f"{value:.3g}" + ("" if not base or method == "base" else f" ({100 * (value / base - 1):+.1f} %)")


def _inside(values: Mapping[str, Any], kinds: Mapping[str, Any], files: Mapping[str, Path]) -> str:
    text = _figures(values, files, ("ratio", "activations"))
    head = ["pipeline", "method", "patches", "outside, %", "distance", "of log2 norms"]
    rows = [
        [
            name,
            cells.method(row),
            cells.count(row.get("patches")),
            cells.number(row.get("outside"), "replaced"),
            cells.number(row.get("wasserstein"), "FD"),
            cells.number(row.get("norm wasserstein"), "FD"),
        ]
        for name, kind in kinds.items()
        for row in kind.get("activations") or []
    ]
    text += "<h3>Activations before and after</h3>"
    text += _table(Table(head, rows, set(), 2)) if rows else UNMEASURED
    text += (
        '<p class="note">Outside: values beyond the base model\'s 0.1 to 99.9 percentiles of their dimension '
        "(base: about 0.2). Distance: Wasserstein, to the base.</p>"
    )
    parts = {
        "padding": "Padding of PER",
        "sources": "Sources of PER",
        "avoid": "Patches that PER avoids as donors",
    }
    for part, title in parts.items():
        text += f"<h3>{title}</h3>" + _parts(kinds, part)
    return text


def _several(values: Mapping[str, Any], kinds: Mapping[str, Any], files: Mapping[str, Path]) -> str:
    text = _figures(values, files, ("together",))
    head = ["pipeline", "method", "order", "concepts", "pictures", "UA", "RA", "CRA"]
    rows = [
        [name, cells.METHODS.get(row["method"], row["method"]), row["order"], str(len(row["erased"]))]
        + [cells.count(row.get("pictures")), *(cells.cell(row, metric) for metric in ("UA", "RA", "CRA"))]
        for name, kind in kinds.items()
        for row in kind.get("together") or []
    ]
    return text + (
        _folded("All figures of several concepts", _table(Table(head, rows, set(), 3))) if rows else ""
    )


def _published(values: Mapping[str, Any]) -> str:
    ours = tables.main_table(values, ("UA", "IRA", "CRA", "AR", "GA"))
    about = values.get("about") or {}
    known = {name: about.get(name, "not recorded") for name in ("judge", "artifacts")}
    where = f"{about.get('world', 'world not recorded')}; judge: {known['judge']}; artifacts: {known['artifacts']}"
    text = "<p>Other models, pictures and judges: no figure of one table can be compared with one of another.</p>"
    text += f"<h3>Measured here</h3><p>{escape(where)}.</p>" + (_table(ours) if ours.rows else UNMEASURED)
    for title, source, each in (
        ("Published: erasing objects", published.WHERE_ERASURE, tables.published_table()),
        ("Published: under attack", published.WHERE_ATTACK, tables.published_attack_table()),
        ("Published: other methods", published.WHERE_METHODS, tables.published_methods_table()),
    ):
        text += f"<h3>{title}</h3><p>{escape(source)}.</p>" + _table(each, "no figure")
        if each == tables.published_table():
            text += (
                '<div class="note"><p>[*]: corrected.</p>' + _list(map(escape, published.NOTES)) + "</div>"
            )
    return text


def _how(values: Mapping[str, Any]) -> str:
    about = values.get("about") or {}
    known = [key for key, _ in _ABOUT]
    entries = [(label, about.get(key)) for key, label in _ABOUT]
    entries += [(key, about[key]) for key in about if key not in (*known, "dirty")]
    rows = []
    for label, value in entries:
        if label == "commit" and value and about.get("dirty"):
            value = f"{value}, with changes that are not committed"
        shown = _text(value)
        body = escape(shown) if shown else '<span class="none">not recorded</span>'
        rows.append(f"<dt>{escape(label)}</dt><dd>{body}</dd>")
    text = f"<dl>{''.join(rows)}</dl>"
    head = ["pipeline", "steps", "guidance"]
    sampling = [
        [name, str((kind.get("sampling") or {}).get("steps", cells.NONE)), _guidance(kind)]
        for name, kind in cells.kinds_of(values).items()
    ]
    return text + ("<h3>Sampling</h3>" + _table(Table(head, sampling, set(), 1)) if sampling else "")


def _guidance(kind: Mapping[str, Any]) -> str:
    value = (kind.get("sampling") or {}).get("guidance")
    return "the pipeline's own" if value is None else cells.plain(value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _parts(kinds: Mapping[str, Any], part: str) -> str:
    columns = (*tables.COLUMNS, "replaced")
    rows = [
        [name, _label(row, part), cells.count(row.get("pictures"))]
        + [cells.cell(row, metric) for metric in columns]
        for name, kind in kinds.items()
        for row in kind.get(part) or []
    ]
    head = ["pipeline", "settings", "pictures", *columns]
    return _table(Table(head, rows, set(), 2)) if rows else UNMEASURED


def _label(row: Mapping[str, Any], part: str) -> str:
    if part != "sweep":
        return cells.settings(row) or cells.method(row)
    return cells.method(row) + (", chosen" if row.get("chosen") else "")


def _folded(title: str, body: str, opened: bool = False) -> str:
    return f"<details{' open' * opened}><summary>{escape(title)}</summary>{body}</details>"


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _table(each: Table, none: str = "not measured") -> str:
    head = "".join(
        f'<th scope="col"{_name(column, each)}>{escape(text)}</th>' for column, text in enumerate(each.head)
    )
    body = []
    for line, row in enumerate(each.rows):
        texts = []
        for column, text in enumerate(row):
            shown = f'<span class="none">{none}</span>' if text == cells.NONE else escape(text)
            if (line, column) in each.marked:
                shown = f"<strong>{shown}</strong>"
            texts.append(f"<td{_name(column, each)}>{shown}</td>")
        following = each.rows[line + 1 : line + 2]
        last = each.names > 1 and bool(following) and following[0][0] != row[0]
        mark = ' class="last"' if last else ""
        body.append(f"<tr{mark}>{''.join(texts)}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _name(column: int, each: Table) -> str:
    return ' class="name"' if column < each.names else ""


def _figures(values: Mapping[str, Any], files: Mapping[str, Path], names: Sequence[str]) -> str:
    measured = drawable(values)
    text = ""
    for name in names:
        if name in files:
            text += _figure(name, files[name], _CAPTIONS[name])
        else:
            state = NOT_DRAWN if name in measured else "not measured"
            text += f'<p class="none">{escape(_CAPTIONS[name])} <em>{escape(state)}</em></p>'
    return text


def _figure(name: str, path: Path, caption: str) -> str:
    if path.suffix == ".svg":
        body = inline_svg(path.read_text(encoding="utf-8"), re.sub(r"\W+", "-", name), caption)
    else:
        data = base64.b64encode(path.read_bytes()).decode()
        body = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="wide">{body}</div><figcaption>{escape(caption)}</figcaption></figure>'


def inline_svg(text: str, prefix: str, label: str) -> str:
    """An SVG file's text as an element of the page: ids made unique by `prefix`, the theme's colours as variables of
    the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for name, (light, _) in theme.COLOURS.items():
        text = text.replace(light, f"var(--{name})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1).strip()
