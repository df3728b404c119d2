"""Everything that `lbdt evaluate` leaves behind, from its figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbdt.evaluation.report import grid, plots, tables, theme
from lbdt.evaluation.report.html import html
from lbdt.runs.files import json_bytes, read_json, write_files

_VALUES, _TIMES = "values.json", "times.json"
_MOMENT = ("date", "load_average_before")
"""What the figures' "about" says of when they were measured."""


def write(values: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Writes values.json, times.json, table.csv, report.html, plots/NAME.svg and plots/grid-KIND.png into `folder`,
    each atomically.

    times.json has what differs from run to run: "cost", "date" and "load_average_before". Of the others only the report
    shows it, so all but these two are the same bytes for the same figures.

    Without matplotlib the figures are left out, and the page says so; one that is installed and cannot be imported
    raises what it raises. The grids' pictures are read from `folder`.

    Returns name -> file: values, times, table, report, the figures' names, and `grid KIND`.

    Raises ValueError for NaN, infinity and a damaged picture; nothing was written then.
    """
    lasting, times = _parted(values)
    data = {_VALUES: json_bytes(lasting), _TIMES: json_bytes(times)}
    drawn = {
        name: (f"{name}.svg", svg)
        for name, svg in (plots.figures(values) if theme.installed() else {}).items()
    }
    for name, png in grid.draw(values, folder).items():
        drawn[f"grid {name}"] = (grid.file_name(name), png)
    write_files(folder / "plots", dict(drawn.values()))
    files = {name: Path("plots") / file for name, (file, _) in drawn.items()}
    written = {
        **data,
        "table.csv": tables.csv_text(values).encode(),
        "report.html": html(values, files, folder).encode(),
    }
    write_files(folder, written)
    return {Path(name).stem: folder / name for name in written} | {n: folder / p for n, p in files.items()}


def read_values(folder: Path) -> dict[str, Any]:
    """The figures that `write` was given; of a folder from before there was a times.json, those of its values.json.

    Raises ValueError for a file that is missing or damaged.
    """
    values = read_json(folder / _VALUES)
    if (folder / _TIMES).is_file():
        times = read_json(folder / _TIMES)
        moment = {name: times[name] for name in _MOMENT if name in times}
        values = {**values, "about": {**values["about"], **moment}, "cost": times["cost"]}
    return values


def _parted(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    about = values.get("about") or {}
    lasting = {name: value for name, value in values.items() if name != "cost"}
    lasting["about"] = {name: value for name, value in about.items() if name not in _MOMENT}
    times = {name: about[name] for name in _MOMENT if name in about}
    return lasting, times | {"cost": values.get("cost") or {}}
