"""Everything that `lbdt evaluate` leaves behind, from its figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbdt.evaluation.report import grid, plots, table, theme
from lbdt.evaluation.report.html import html
from lbdt.files import json_bytes, write_files


def write(values: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Writes values.json, table.csv, report.html, plots/NAME.svg and plots/grid-KIND.png into `folder`, each atomically.

    Without matplotlib the figures are left out, and the page says so; one that is installed and cannot be imported raises
    what it raises. The grids' pictures are read from `folder`.

    Returns name -> file: values, table, report, the figures' names, and `grid KIND`.

    Raises ValueError for NaN, infinity and a damaged picture; nothing was written then.
    """
    data = json_bytes(values)
    drawn = {
        name: (f"{name}.svg", svg)
        for name, svg in (plots.figures(values) if theme.installed() else {}).items()
    }
    for name, png in grid.draw(values, folder).items():
        drawn[f"grid {name}"] = (grid.file_name(name), png)
    write_files(folder / "plots", dict(drawn.values()))
    files = {name: folder / "plots" / file for name, (file, _) in drawn.items()}
    written = {
        "values.json": data,
        "table.csv": table.csv_text(values).encode(),
        "report.html": html(values, files, folder).encode(),
    }
    write_files(folder, written)
    return {Path(name).stem: folder / name for name in written} | files
