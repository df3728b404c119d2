"""The tables of `lbdt evaluate`: for the terminal, for a README, and every figure as CSV.

All of them follow from the figures alone: no time, date, path or machine is in them, so that the same seeds give the
same bytes.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lbdt.evaluation import published
from lbdt.evaluation.report import cells
from lbdt.evaluation.report.cells import Table

COLUMNS = ("UA", "IRA", "CRA", "AR", "AR others", "GA", "FD")
CSV_COLUMNS = ("kind", "part", "method", "settings", "pictures", "metric", "mean", "low", "high", "seeds")
MARKS = "the best mean of the methods; ±: half of the 95 % interval over seeds"
BASE_NOTE = (
    "The base's row: its accuracies, object seen (under IRA), style seen (CRA), nothing seen where the prompt names "
    "nothing (clean), both objects of a pair seen (kept)"
)
LEGEND = f"{MARKS}; -: not measured"
TIE, UNKNOWN = "no difference", "not measured"


def main_table(values: Mapping[str, Any], columns: tuple[str, ...] = COLUMNS) -> Table:
    """Every pipeline's rows (base and methods); the best mean of the methods is marked for each metric."""
    rows, marked = [], set()
    for name, kind in cells.kinds_of(values).items():
        edited: list[tuple[int, Mapping[str, Any]]] = []
        for row in kind.get("rows") or []:
            if row["method"] != "base":
                edited.append((len(rows), row))
            figures = [cells.cell(row, metric) for metric in columns]
            count = "" if row.get("note") else cells.count(row.get("pictures"))
            rows.append([name, cells.method(row), count, *figures])
        for column, metric in enumerate(columns, start=3):
            best = cells.best([cells.mean_of(row, metric) for _, row in edited], metric)
            if best is not None:
                marked.add((edited[best][0], column))
    return Table(["pipeline", "method", "pictures", *columns], rows, marked, 2)


def columns_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """`COLUMNS`, and those of the others that were measured."""
    rows = [row for kind in cells.kinds_of(values).values() for row in kind.get("rows") or []]
    others = (*cells.EXTRA, "CLIP")
    return (
        *COLUMNS,
        *(name for name in others if any(row.get(name) or row.get(cells.BASE.get(name, "")) for row in rows)),
    )


def lines(values: Mapping[str, Any]) -> list[str]:
    """The main table for the terminal, its legend, and which method is ahead in which pipelines."""
    table = main_table(values, columns_of(values))
    if not table.rows:
        return ["no pipeline was evaluated"]
    return [*cells.text_lines(table), f"*: {LEGEND}", *_base_note(values), *verdict(values)]


def markdown(values: Mapping[str, Any]) -> list[str]:
    """The main table for a README, and its legend."""
    note = "".join(f" {line}." for line in _base_note(values))
    return [*cells.markdown_lines(main_table(values, columns_of(values))), "", f"Bold: {LEGEND}.{note}"]


def _base_note(values: Mapping[str, Any]) -> list[str]:
    """`BASE_NOTE`, where a base was measured by its accuracies."""
    bases = [cells.main_row(kind, "base") or {} for kind in cells.kinds_of(values).values()]
    return [BASE_NOTE] if any(row.get(name) for row in bases for name in cells.BASE.values()) else []


def verdict(values: Mapping[str, Any]) -> list[str]:
    """A sentence per metric: where PER is ahead of steering (of its rows the better one by that metric), where steering
    is, where nothing can be said."""
    sentences = []
    for metric, label in (("AR", "artifact rate"), ("GA", "global average")):
        found: dict[str, list[str]] = {"per": [], "steering": [], TIE: [], UNKNOWN: []}
        for name, kind in cells.kinds_of(values).items():
            pair = [cells.mean_of(row, metric) for row in _compared(kind, metric)]
            winner = UNKNOWN if None in pair else _better(kind, metric) or TIE
            shown = [cells.number(value, metric) for value in reversed(pair)]
            found[winner].append(name if None in pair else f"{name} {shown[0]} against {shown[1]}")
        compared = len(found["per"] + found["steering"] + found[TIE])
        wins = f"{label}: PER is better than steering in {len(found['per'])} of {compared} pipelines"
        if not compared:
            wins = f"{label}: PER and steering were not compared"
        if found["per"]:
            wins += f" ({', '.join(found['per'])})"
        texts = [
            f"{text}: {', '.join(found[key])}"
            for key, text in (("steering", "steering is better in"), (TIE, TIE), (UNKNOWN, UNKNOWN))
            if found[key]
        ]
        sentences.append("; ".join([wins, *texts]))
    return sentences


def csv_text(values: Mapping[str, Any]) -> str:
    """Every figure of every part, one a line; what was not measured has no line. Histograms are in values.json.

    `mean`, `low` and `high` have six significant digits; `settings` is `name=value` pairs joined by `;`, several
    names in one joined by `+`, a backslash before these in a name.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for name, kind in cells.kinds_of(values).items():
        for line in _csv_rows(kind):
            writer.writerow([name, *line])
    return text.getvalue()


def _csv_rows(kind: Mapping[str, Any]) -> Iterator[list[str]]:
    for part, row in cells.parts_of(kind, "rows", "sweep", "padding", "sources", "avoid", "together"):
        given = dict(row.get("settings") or {})
        for extra in ("chosen", "order", "erased"):
            if extra in row:
                given[extra] = row[extra]
        for metric in cells.metrics_of(row):
            yield _csv_row("main" if part == "rows" else part, row, given, metric, row[metric])
    for method, concepts in (kind.get("per concept") or {}).items():
        for concept, figures in concepts.items():
            for metric, value in figures.items():
                if value is not None:
                    row = {"method": method}
                    yield _csv_row("per concept", row, {"concept": concept}, metric, {"mean": value})
    for method, styles in (kind.get("AR per style") or {}).items():
        for style, value in styles.items():
            if value is not None:
                yield _csv_row("per style", {"method": method}, {"style": style}, "AR", {"mean": value})
    for padding, steps in (kind.get("ratio") or {}).items():
        for step in steps:
            given = {"padding": padding, "timestep": step["timestep"]}
            for metric in ("detected", "replaced"):
                yield _csv_row("ratio", {"method": "per"}, given, metric, {"mean": 100 * step[metric]})
    for row in kind.get("activations") or []:
        for metric in ("outside", "wasserstein", "norm wasserstein"):
            if row.get(metric) is not None:
                figure = {"mean": row[metric]}
                yield _csv_row("activations", row, row.get("settings") or {}, metric, figure)


def _csv_row(
    part: str, row: Mapping[str, Any], given: Mapping[str, Any], metric: str, estimate: Mapping[str, Any]
) -> list[str]:
    texts = (f"{name}={_setting(value)}" for name, value in given.items())
    figures = (estimate.get(key) for key in ("mean", "low", "high"))
    return [
        part,
        row["method"],
        ";".join(texts),
        str(row.get("pictures", "")),
        metric,
        *("" if value is None else f"{value:.6g}" for value in figures),
        str(estimate.get("seeds", "")),
    ]


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_setting, value))
    return re.sub(r"([\\;+])", r"\\\1", value) if isinstance(value, str) else cells.plain(value)


def published_table() -> Table:
    """The published figures of steering and PER, never in one table with ours; [*]: corrected, see the notes."""
    head = ["pipeline", "method", "UA", "IRA", "CRA", "average", "AR", "GA"]
    rows = []
    for row in published.ERASURE:
        average = row.average if "average" in row.misprints else row.printed_average
        shown = {"UA": row.UA, "IRA": row.IRA, "CRA": row.CRA, "average": average}
        texts = [_two(value) + " [*]" * (name in row.misprints) for name, value in shown.items()]
        figures = [*texts, f"{row.AR:.1f}", _two(row.printed_global_average)]
        rows.append([row.pipeline, cells.METHODS[row.method], *figures])
    return Table(head, rows, set(), 2)


def published_attack_table() -> Table:
    """The published figures of UnlearnDiffAtk."""
    rows = [
        [row.pipeline, cells.METHODS[row.method], f"{row.before:.1f}", f"{row.after:.1f}", f"{row.drop:.1f}"]
        for row in published.ATTACK
    ]
    return Table(["pipeline", "method", "UA before", "UA after", "drop"], rows, set(), 2)


def published_methods_table() -> Table:
    """The published figures of other erasure methods."""
    head = ["method", "task", "UA", "IRA", "CRA", "average", "FID", "memory, GB", "storage, GB"]
    rows = [
        [row.method, row.task, _two(row.UA), _two(row.IRA), _two(row.CRA), _two(row.average)]
        + [cells.NONE if v is None else f"{v:g}" for v in (row.FID, row.memory_gb, row.storage_gb)]
        for row in published.METHODS
    ]
    return Table(head, rows, set(), 2)


def _two(value: float | None) -> str:
    return cells.NONE if value is None else f"{value:.2f}"


def _better(kind: Mapping[str, Any], metric: str) -> str | None:
    best = cells.best([cells.mean_of(row, metric) for row in _compared(kind, metric)], metric)
    return None if best is None else ("steering", "per")[best]


def _compared(kind: Mapping[str, Any], metric: str) -> tuple[Mapping[str, Any] | None, ...]:
    return cells.stronger_steering(kind, metric), cells.main_row(kind, "per")
