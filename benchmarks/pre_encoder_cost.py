"""The eraser's hook with a pre-encoder and without, in turn, on one device: `python -m benchmarks.pre_encoder_cost`.

SAEParate's map of every patch (METHOD.md, 6.7) has to be computed before it is known that nothing is detected, so it is
timed where nothing is: the call that costs a hook without one least. Milliseconds are those of a call of the hooked
block without the block's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lbdt.bench import hardware, hook, shapes, timing
from lbdt.bench.shapes import Place
from lbdt.editors import ConceptEraser
from lbdt.runs.files import json_bytes, write_file
from lbdt.sae import SparseAutoencoder

UNIONS = (2, 34)
"""Latents that are looked at: of one concept, and of the 17 that a dictionary of 20 may well erase at once."""
_NEVER = 1e6


def eraser(shape: shapes.Shape, arguments: dict, place: Place, pre_encoder: bool) -> ConceptEraser:
    """One that detects nothing."""
    made = hook.eraser(shape, arguments, place.seed)
    made.dictionary.mean[0, :, arguments["latents"].cpu()] = _NEVER
    if pre_encoder:
        width, g = shape.width, torch.Generator().manual_seed(place.seed)
        state = {
            "pre_encoder.0.weight": place.put(torch.randn(width, width, generator=g) / width**0.5),
            "pre_encoder.0.bias": place.put(torch.randn(width, generator=g)),
        }
        with torch.device("meta"):
            sae = SparseAutoencoder(replace(made.sae.config, pre_encoder=True))
        sae.load_state_dict(made.sae.state_dict() | state, assign=True)
        made.sae = sae.requires_grad_(False)
    return made


def row(name: str, union: int, place: Place, rounds: int) -> dict:
    """Times of one shape and number of latents that are looked at."""
    shape = (shapes.SHAPES | shapes.QUICK)[name]._replace(union=union)
    arguments = shapes.detection(shape, 0.0, place=place)
    given = arguments["x"] if arguments["minus"] is None else arguments["minus"]
    call = torch.full((shape.batch,), hook.TIMESTEP, device=place.device), given, arguments["x"]
    pipes = {version: hook.Pipe(shape, place) for version in ("with", "without", "bare")}
    handles = []
    for version in ("without", "with"):
        made = eraser(shape, arguments, place, version == "with")
        layout = pipes[version].layout
        handles.append(made.attach(pipes[version], [hook.CONCEPT], seed=place.seed, layout=layout))
    versions = {version: partial(pipe.unet, *call) for version, pipe in pipes.items()}
    with torch.inference_mode():
        for version, function in versions.items():
            if not torch.equal(function(), arguments["x"]):
                raise AssertionError(f"{name}, U {union}: {version} replaced a patch")
        measured = timing.in_turn(versions, place.device, rounds, 60.0)
    for handle in handles:
        handle.remove()
    own = {v: measured[v]["ms"]["median"] - measured["bare"]["ms"]["median"] for v in ("with", "without")}
    return {
        "shape": name,
        "latents": union,
        "ms": {version: value["ms"] for version, value in measured.items()},
        "own_ms": own,
        "ratio": own["with"] / own["without"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line a number of latents; `--out FILE` keeps the times as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", choices=[*shapes.SHAPES, *shapes.QUICK])
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
        for union in UNIONS:
            rows.append(row(name, union, place, given.rounds))
            own = rows[-1]["own_ms"]
            print(
                f"{name}, U {union:2}, nothing detected: {own['without']:.3f} ms without a pre-encoder, "
                f"{own['with']:.3f} ms with: {rows[-1]['ratio']:.1f} times"
            )
    if given.out is not None:
        about = {"device": hardware.describe(device), "threads": given.threads, "rounds": given.rounds}
        write_file(given.out, json_bytes(about | {"rows": rows}))


if __name__ == "__main__":
    main()
