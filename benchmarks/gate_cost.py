"""The eraser's hook with the gate and without, in turn, on one device: `python -m benchmarks.gate_cost`.

Both replace the same patches: the gate asks for two patches of a map twice the size, which is one, so it is counted and
compared and never shut. Milliseconds are those of a call of the hooked block without the block's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from lbdt.bench import hardware, hook, shapes, timing
from lbdt.bench.shapes import Place
from lbdt.dictionary.picture_counts import PictureCounts
from lbdt.runs.files import json_bytes, write_file

SHARES = (0.0, 0.01, 0.1)


def gate(shape: shapes.Shape, selection: dict) -> PictureCounts:
    """Two patches of a map twice as large as the shape's."""
    counts = torch.zeros(2, len(hook.TIMESTEPS), 4, dtype=torch.int64)
    counts[..., 1] = 10
    return PictureCounts(counts, counts, 2 * shape.patches // shape.batch, selection, 0.005)


def row(name: str, share: float, place: Place, rounds: int) -> dict:
    """Times of one shape and share of detected patches."""
    shape = shapes.SHAPES[name]
    arguments = shapes.detection(shape, share, place=place)
    given = arguments["x"] if arguments["minus"] is None else arguments["minus"]
    call = torch.full((shape.batch,), hook.TIMESTEP, device=place.device), given, arguments["x"]
    pipes = {version: hook.Pipe(shape, place) for version in ("gated", "published", "bare")}
    handles = []
    for version in ("published", "gated"):
        eraser = hook.eraser(shape, arguments, place.seed)
        if version == "gated":
            eraser.dictionary = eraser.dictionary.replaced(gate=gate(shape, eraser.selection))
        layout = pipes[version].layout
        handles.append(eraser.attach(pipes[version], [hook.CONCEPT], seed=place.seed, layout=layout))
    versions = {version: partial(pipe.unet, *call) for version, pipe in pipes.items()}
    with torch.inference_mode():
        outputs = {version: function() for version, function in versions.items()}
        if not torch.equal(outputs["gated"], outputs["published"]):
            raise AssertionError(f"{name}, {share:.0%}: the gate changed what is replaced")
        measured = timing.in_turn(versions, place.device, rounds, 60.0)
    for handle in handles:
        handle.remove()
    own = {v: measured[v]["ms"]["median"] - measured["bare"]["ms"]["median"] for v in ("gated", "published")}
    return {
        "shape": name,
        "share": share,
        "ms": {version: value["ms"] for version, value in measured.items()},
        "own_ms": own,
        "ratio": own["gated"] / own["published"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line a share of detected patches; `--out FILE` keeps the times as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", choices=list(shapes.SHAPES))
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
        for share in SHARES:
            rows.append(row(name, share, place, given.rounds))
            own = rows[-1]["own_ms"]
            print(
                f"{name}, {share:4.0%} of patches detected: {own['published']:.3f} ms without the gate, "
                f"{own['gated']:.3f} ms with: {rows[-1]['ratio'] - 1:+.1%}"
            )
    if given.out is not None:
        about = {"device": hardware.describe(device), "threads": given.threads, "rounds": given.rounds}
        write_file(given.out, json_bytes(about | {"rows": rows}))


if __name__ == "__main__":
    main()
