"""Two erasers' hooks, in turn on one device: what the benchmarks of a part of the hook have in common. Milliseconds are
those of a call of the hooked block without the block's own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbdt.bench import hardware, hook, shapes, timing
from lbdt.bench.shapes import Place
from lbdt.editors import ConceptEraser
from lbdt.runs.files import json_bytes, write_file


def timed(
    shape: shapes.Shape,
    arguments: Mapping[str, Any],  # of `shapes.detection`
    erasers: Mapping[str, ConceptEraser],  # two; the ratio is of the second's time to the first's
    check: Callable[[Mapping[str, Tensor]], None],  # given what each version and the "bare" block return
    place: Place,
    rounds: int,
) -> dict[str, Any]:
    """The times of both and of the bare block, after `check` has passed."""
    given = arguments["x"] if arguments["minus"] is None else arguments["minus"]
    call = torch.full((shape.batch,), hook.TIMESTEP, device=place.device), given, arguments["x"]
    first, second = erasers
    pipes = {version: hook.Pipe(shape, place) for version in (second, first, "bare")}
    handles = [
        made.attach(pipes[version], [hook.CONCEPT], seed=place.seed, layout=pipes[version].layout)
        for version, made in erasers.items()
    ]
    versions = {version: partial(pipe.unet, *call) for version, pipe in pipes.items()}
    with torch.inference_mode():
        check({version: function() for version, function in versions.items()})
        measured = timing.in_turn(versions, place.device, rounds, 60.0)
    for handle in handles:
        handle.remove()
    own = {v: measured[v]["ms"]["median"] - measured["bare"]["ms"]["median"] for v in (second, first)}
    return {
        "ms": {version: value["ms"] for version, value in measured.items()},
        "own_ms": own,
        "ratio": own[second] / own[first],
    }


def run(
    about: str,
    names: Sequence[str],
    cases: Sequence[Any],
    row: Callable[[str, Any, Place, int], dict],
    line: Callable[[dict], str],
    arguments: Sequence[str] | None,
) -> None:
    """The command line: a row and a printed line for each shape (of `names`) and case; `--out FILE` keeps the rows as
    JSON."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=names)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    place = Place(device, torch.float32 if device.type == "cpu" else torch.float16, 0)
    rows = []
    for name in given.shape or ["sd15-b1"]:
        for case in cases:
            rows.append(row(name, case, place, given.rounds))
            print(line(rows[-1]))
    if given.out is not None:
        described = {"device": hardware.describe(device), "threads": given.threads, "rounds": given.rounds}
        write_file(given.out, json_bytes(described | {"rows": rows}))
