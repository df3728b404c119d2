"""The table of `benchmarks/attack.sh`: `python -m benchmarks.attack WORK [--out FILE.json]`.

WORK holds a folder METHOD-SEARCH-SEED of `lbdt attack` for every run; what is there is counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from lbdt.attack import AttackOutcome, summarise
from lbdt.bench import hardware
from lbdt.runs.files import json_bytes, read_json, write_files


def rows(work: Path) -> list[dict[str, Any]]:
    """One row for each method, search, position and judged prompt, over all its seeds. ValueError where there is
    none."""
    found: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for folder in sorted(path.parent for path in work.glob("*/attack.json")):
        settings = read_json(folder / "attack.json")
        row = found.setdefault(
            (
                settings["method"],
                *(settings["attack"].get(name, "") for name in ("search", "position", "judged")),
            ),
            {"eraser": settings["eraser"], "attack": settings["attack"], "seeds": [], "outcomes": []},
        )
        row["seeds"].append(settings["seed"])
        row["outcomes"] += [
            AttackOutcome.from_dict(read_json(path)) for path in sorted(folder.glob("pairs/*.json"))
        ]
    if not found:
        raise ValueError(f"{work}: holds no run of lbdt attack; run benchmarks/attack.sh {work}")
    return [
        {
            "method": method,
            "search": search,
            **row,
            "outcomes": [outcome.to_dict() for outcome in row["outcomes"]],
        }
        | {"summary": summarise(row["outcomes"]).to_dict()}
        for (method, search, *_), row in sorted(found.items())
    ]


def lines(table: list[dict[str, Any]]) -> list[str]:
    """A Markdown table."""
    text = ["| method | search | pairs | UA before | UA after | difference |", "|---|---|---|---|---|---|"]
    for row in table:
        got = row["summary"]
        label = {"per": "PER", "steering": f"steering (strength {row['eraser'].get('strength', 0):g})"}[
            row["method"]
        ]
        kind = {"gradient": "learned prefix", "random": "random prefixes"}[row["search"]]
        # A run that names neither is of prefixes, judged by token ids.
        position = row["attack"].get("position", "prefix")
        kind = kind.replace("prefix", {"middle": "insert"}.get(position, position))
        kind += ", typed" * (row["attack"].get("judged") == "typed")
        figures = [f"{got[key]:.1f}" for key in ("before", "after", "effectiveness")]
        text.append(f"| {' | '.join([label, kind, str(got['pairs']), *figures])} |")
    return text


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    args = parser.parse_args()
    table = rows(args.work)
    print("\n".join(lines(table)))
    if args.out:
        about = {"command": f"benchmarks/attack.sh {args.work}", **hardware.describe(torch.device("cpu"))}
        write_files(args.out.parent, {args.out.name: json_bytes(about | {"runs": table})})


if __name__ == "__main__":
    main()
