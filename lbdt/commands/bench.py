"""`lbdt bench`: kernels and the hook, timed on this machine against the baselines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lbdt.bench import hardware, timing_table
from lbdt.bench.cases import Spec
from lbdt.bench.runner import BenchOptions
from lbdt.bench.runner import run as run_cases
from lbdt.runs.files import write_file
from lbdt.runs.out import check_out
from lbdt.runs.processes import usable_device

AUTO = "auto"


def options_of(*, device: str, **settings: Any) -> BenchOptions:
    """The options of a command line; `device` may be "auto". ValueError where it is not usable here."""
    return BenchOptions(device=usable_device(device), **settings)


def run(options: BenchOptions, *, threads: int | None, out: str | None) -> tuple[dict[str, Any], list[str]]:
    """The result and its table; written to `out` too.

    Raises Mismatch, a RuntimeError, where a version disagrees with another, before any of its times is shown.
    """
    path = None if out is None else _path(out, options)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        result = run_cases(options, _bar)
    finally:
        torch.set_num_threads(before)
    lines = timing_table.lines(result)
    if path is not None:
        write_file(path, (json.dumps(result, indent=1) + "\n").encode())
        lines.append(f"written: {path}")
    return result, lines


def _bar(specs: list[Spec]) -> Iterator[Spec]:
    with tqdm(specs, desc="bench", unit="case", file=sys.stderr) as bar:
        for spec in bar:
            bar.set_postfix_str(str(spec), refresh=False)
            yield spec


def _path(out: str, options: BenchOptions) -> Path:
    """Where the result goes, refused before anything is measured if it cannot be written."""
    if out == AUTO:
        folder = hardware.ROOT / "benchmarks" / "results"
        if not folder.parent.is_dir():
            raise ValueError(
                "--out auto: means benchmarks/results of a checkout, but this is an installation"
            )
        if options.quick:
            raise ValueError("--out auto: results of --quick are not kept there; name a file")
        about = hardware.cuda(options.device) if options.device.type == "cuda" else hardware.cpu()
        path = folder / f"{hardware.slug(about)}.json"
    else:
        path = Path(out)
    check_out(path, "result")
    return path
