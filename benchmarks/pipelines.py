"""The table of `benchmarks/pipelines.sh`: `python -m benchmarks.pipelines WORK [--out FILE.json] [--release]`.

Every figure but the rate on the training pictures is of activations of other seeds than the SAE was trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from lbdt.bench import hardware
from lbdt.canvas import KINDS, WEIGHTS
from lbdt.runs.files import json_bytes, write_files
from lbdt.runs.folder import replaced


def row(work: Path, kind: str) -> dict[str, Any]:
    """One pipeline's figures from its files. ValueError where the pipeline is not finished."""
    folder = work / kind
    try:
        report = json.loads((folder / "sae/report.json").read_text())
        score = json.loads((folder / "score.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: not finished ({error}); run benchmarks/pipelines.sh {work}") from error
    ranks = [r["assigned_rank"] for r in score["concepts"] if r["assigned_rank"] is not None]
    return {
        "kind": kind,
        "fvu": report["fvu"],
        "l0": report["l0"],
        "dead": report["dead"],
        "latents": report["latents"],
        "dead_share": report["dead"] / report["latents"],
        "steps": report["steps"],
        "heldout_prompts": report["prompts"],
        "detected_with": score["heldout"]["on"],
        "detected_without": score["heldout"]["off"],
        "assigned_top": ranks.count(0) if ranks else None,
        "concepts": len(score["concepts"]),
        "eraser_bytes": sum(f.stat().st_size for f in (folder / "eraser").rglob("*") if f.is_file()),
    }


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table."""
    table = [
        "| pipeline | FVU | L0 | dead latents | patches detected with / without the concept, % "
        "| assigned latent scores best |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        top = "-" if r["assigned_top"] is None else f"{r['assigned_top']} of {r['concepts']}"
        table.append(
            f"| {r['kind']} | {r['fvu']:.3f} | {r['l0']:.1f} | {r['dead']} of {r['latents']} ({r['dead_share']:.1%}) | "
            f"{100 * r['detected_with']:.1f} / {100 * r['detected_without']:.2f} | {top} |"
        )
    return table


def release(work: Path) -> None:
    """Copies the erasers to where `lbdt.canvas.load_eraser` looks."""
    for kind in KINDS:
        eraser = work / kind / "eraser"
        with replaced(WEIGHTS / f"eraser-{kind}", os.listdir(eraser)) as new:
            shutil.copytree(eraser, new, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    parser.add_argument("--release", action="store_true", help="make these the embedded erasers")
    args = parser.parse_args()
    rows = [row(args.work, kind) for kind in KINDS]
    print("\n".join(lines(rows)))
    if args.out:
        command = f"benchmarks/pipelines.sh {args.work}"
        about = hardware.describe(torch.device("cpu")) | {"command": command}
        write_files(args.out.parent, {args.out.name: json_bytes(about | {"pipelines": rows})})
    if args.release:
        release(args.work)


if __name__ == "__main__":
    main()
