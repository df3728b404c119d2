"""Keeps the figures of a finished `lbdt evaluate`: `python -m benchmarks.evaluation FOLDER` copies values.json,
table.csv, the trade-off plot and a grid of pictures to `benchmarks/results/evaluation`, and prints the table of
README.md and those of benchmarks/README.md."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbdt.evaluation.report import cells, tables
from lbdt.evaluation.report.write import read_values
from lbdt.runs.files import write_files

RESULTS = Path(__file__).resolve().parent / "results/evaluation"
KEPT = ("values.json", "times.json", "table.csv", "plots/tradeoff.svg", "plots/grid-saeuron.png")
ABOUT = {
    "saeuron": "TopK SAE, the best latents by score",
    "saemnesia": "the same, fine-tuned: one latent a concept",
    "gsae": "sigmoid SAE, trained with labels: latent i for concept i",
    "sdxl": "TopK SAE, as for SDXL Turbo: 4 steps, no guidance",
    "saeparate": "TopK SAE behind a map and GELU, images of an object drawn together",
}
SHORT = {
    "UA": "object gone (UA)",
    "IRA": "others kept (IRA)",
    "CRA": "style kept (CRA)",
    "AR": "artifacts (AR)",
    "GA": "overall (GA)",
}
CHOICES = {
    "UA": "object gone (UA)",
    "clean": "scene clean",
    "kept": "other object of a pair kept",
    "pair gone": "and the erased one gone",
    "untouched": "other pictures untouched",
    "CRA": "style kept (CRA)",
}


def short_lines(values: Mapping[str, Any]) -> list[str]:
    """A row a pipeline, in Markdown: PER's means, and in brackets those of the steering with the larger GA."""
    rows = [_line(["pipeline", *SHORT.values()]), _line(["---"] * (len(SHORT) + 1))]
    for name, kind in cells.kinds_of(values).items():
        per, steering = cells.main_row(kind, "per"), cells.stronger_steering(kind, "GA")
        means = [
            [cells.number(cells.mean_of(row, metric), metric) for row in (per, steering)] for metric in SHORT
        ]
        figures = [f"{ours} ({theirs})" for ours, theirs in means]
        rows.append(_line([f"`{name}`: {ABOUT[name]}" if name in ABOUT else f"`{name}`", *figures]))
    return rows


def choices_lines(values: Mapping[str, Any]) -> list[str]:
    """What a user could pick: a row a pipeline and method, in Markdown; means of what is seen of the result."""
    rows = [_line(["pipeline", "method", *CHOICES.values()]), _line(["---"] * (len(CHOICES) + 2))]
    for name, kind in cells.kinds_of(values).items():
        for row in kind["rows"]:
            if row["method"] != "base":
                figures = [cells.number(cells.mean_of(row, metric), metric) for metric in CHOICES]
                figures = [""] * len(CHOICES) if row.get("note") else figures
                rows.append(_line([f"`{name}`", cells.method(row), *figures]))
    return rows


def others_line(values: Mapping[str, Any]) -> str:
    """The lowest and the highest artifact rate of PER among the pictures of other objects."""
    rates = [
        cells.mean_of(cells.main_row(kind, "per"), "AR others") for kind in cells.kinds_of(values).values()
    ]
    least, most = (f"{rate:.1f}" for rate in (min(rates), max(rates)))
    return f"{least} to {most} %"


def main_lines(values: Mapping[str, Any]) -> list[str]:
    """The table of the pipelines, in Markdown."""
    return tables.markdown(values)


def inside_lines(values: Mapping[str, Any]) -> list[str]:
    """What steering at the chosen strength and PER do to the activations, and what they cost."""
    rows = [
        "| pipeline | method | values outside, % | distance, std | log2 norms | seconds a picture |",
        "|---|---|---|---|---|---|",
    ]
    for name, kind in cells.kinds_of(values).items():
        for method in ("base", "steering", "per"):
            row = cells.main_row(kind, method)
            found = [
                each
                for each in kind["activations"]
                if each["method"] == method and each["settings"] == row["settings"]
            ]
            if not found:
                continue
            each = found[0]
            figures = [f"{each[key]:.2f}" for key in ("outside", "wasserstein", "norm wasserstein")]
            seconds = f"{values['cost'][name][method]:.3f}"
            rows.append(_line([name, cells.method(row), *figures, seconds]))
    return rows


def settings_lines(values: Mapping[str, Any], part: str) -> list[str]:
    """PER with every padding, or with every source: UA / IRA / AR / GA."""
    kinds = cells.kinds_of(values)
    key = {"padding": "padding", "sources": "source"}[part]
    names = [row["settings"][key] for row in next(iter(kinds.values()))[part]]
    rows = [_line(["pipeline", *(f"{key} {name}" for name in names)]), _line(["---"] * (len(names) + 1))]
    for name, kind in kinds.items():
        rows.append(_line([name, *(_four(row) for row in kind[part])]))
    return rows


def together_lines(values: Mapping[str, Any]) -> list[str]:
    """Several concepts erased: UA of the erased / accuracy of the kept objects, by how many."""
    kinds = cells.kinds_of(values)
    columns = list(
        dict.fromkeys(
            (row["order"], len(row["erased"])) for kind in kinds.values() for row in kind["together"]
        )
    )
    heads = [f"{count} {order}" for order, count in columns]
    rows = [_line(["pipeline", "method", *heads]), _line(["---"] * (len(heads) + 2))]
    for name, kind in kinds.items():
        for method in ("steering", "per"):
            found = {(r["order"], len(r["erased"])): r for r in kind["together"] if r["method"] == method}
            if found:
                label = cells.method(cells.main_row(kind, method))
                rows.append(_line([name, label, *(_two(found[column]) for column in columns)]))
    return rows


def style_lines(values: Mapping[str, Any]) -> list[str]:
    """AR of steering and PER by the style of the prompt."""
    kinds = cells.kinds_of(values)
    styles = list(next(iter(kinds.values()))["AR per style"]["per"])
    rows = [_line(["pipeline", "method", *styles]), _line(["---"] * (len(styles) + 2))]
    for name, kind in kinds.items():
        for method, rates in kind["AR per style"].items():
            figures = ["-" if rate is None else f"{rate:.0f}" for rate in rates.values()]
            rows.append(_line([name, cells.method(cells.main_row(kind, method)), *figures]))
    return rows


def sweep_lines(values: Mapping[str, Any]) -> list[str]:
    """Every strength on the sweep's pictures, and PER on the same: UA / IRA / CRA / AR / GA."""
    rows = [
        "| pipeline | on the sweep's seeds, UA / IRA / CRA / AR / GA; chosen strength in bold |",
        "|---|---|",
    ]
    for name, kind in cells.kinds_of(values).items():
        texts = []
        for row in kind["sweep"]:
            label = "PER" if row["method"] == "per" else f"{row['settings']['strength']:g}"
            figures = " / ".join(_mean(row, metric) for metric in ("UA", "IRA", "CRA", "AR", "GA"))
            texts.append(f"**{label}: {figures}**" if row["chosen"] else f"{label}: {figures}")
        rows.append(_line([name, "; ".join(texts)]))
    return rows


def _four(row: Mapping[str, Any]) -> str:
    return " / ".join(_mean(row, metric) for metric in ("UA", "IRA", "AR", "GA"))


def _two(row: Mapping[str, Any]) -> str:
    return f"{_mean(row, 'UA')} / {_mean(row, 'RA')}"


def _mean(row: Mapping[str, Any], metric: str) -> str:
    value = cells.mean_of(row, metric)
    return "-" if value is None else f"{value:.0f}"


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    values = read_values(folder)
    write_files(RESULTS, {Path(name).name: (folder / name).read_bytes() for name in KEPT})
    parts = [
        short_lines(values),
        choices_lines(values),
        [others_line(values)],
        main_lines(values),
        style_lines(values),
        sweep_lines(values),
        inside_lines(values),
    ]
    parts += [settings_lines(values, "padding"), settings_lines(values, "sources"), together_lines(values)]
    print("\n\n".join("\n".join(part) for part in parts))


if __name__ == "__main__":
    main()
