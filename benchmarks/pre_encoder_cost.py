"""The eraser's hook with a pre-encoder and without, in turn, on one device: `python -m benchmarks.pre_encoder_cost`.

SAEParate's map of every patch (METHOD.md, 6.7) has to be computed before it is known that nothing is detected, so it is
timed where nothing is: the call that costs a hook without one least. Milliseconds are those of a call of the hooked
block without the block's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import hook_pair
from lbdt.bench import hook, shapes
from lbdt.bench.shapes import Place
from lbdt.editors import ConceptEraser
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

    def check(outputs: Mapping[str, Tensor]) -> None:
        for version, output in outputs.items():
            if not torch.equal(output, arguments["x"]):
                raise AssertionError(f"{name}, U {union}: {version} replaced a patch")

    erasers = {v: eraser(shape, arguments, place, v == "with") for v in ("without", "with")}
    times = hook_pair.timed(shape, arguments, erasers, check, place, rounds)
    return {"shape": name, "latents": union, **times}


def line(row: dict) -> str:
    """What is printed of a row."""
    own = row["own_ms"]
    return (
        f"{row['shape']}, U {row['latents']:2}, nothing detected: {own['without']:.3f} ms without a pre-encoder, "
        f"{own['with']:.3f} ms with: {row['ratio']:.1f} times"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line a number of latents; `--out FILE` keeps the times as JSON."""
    hook_pair.run(__doc__, [*shapes.SHAPES, *shapes.QUICK], UNIONS, row, line, arguments)


if __name__ == "__main__":
    main()
