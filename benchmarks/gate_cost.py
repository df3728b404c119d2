"""The eraser's hook with the gate and without, in turn, on one device: `python -m benchmarks.gate_cost`.

Both replace the same patches: the gate asks for as many patches of a larger map as are one of this one, so it is
counted and compared and never shut. Milliseconds are those of a call of the hooked block without the block's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import hook_pair
from lbdt.bench import hook, shapes
from lbdt.bench.shapes import Place
from lbdt.dictionary.picture_counts import OVER, PictureCounts

CASES = tuple((share, over) for share in (0.0, 0.01, 0.1) for over in OVER)
"""Shares of detected patches, each with a gate that counts a call, and with one that counts a run."""


def gate(shape: shapes.Shape, selection: dict, over: str) -> PictureCounts:
    """Two patches, or half as many quarters as were counted, of a map so large that one patch here is enough."""
    counts = torch.zeros(2, len(hook.TIMESTEPS), 12, dtype=torch.int64)
    place, larger = {"call": (1, 2), "run": (8, 16)}[over]
    counts[..., place] = 10
    return PictureCounts(counts, counts, larger * shape.patches // shape.batch, selection, 0.005, over)


def row(name: str, case: tuple[float, str], place: Place, rounds: int) -> dict:
    """Times of one shape, share of detected patches and gate."""
    share, over = case
    shape = shapes.SHAPES[name]
    arguments = shapes.detection(shape, share, place=place)
    published, gated = (hook.eraser(shape, arguments, place.seed) for _ in range(2))
    gated.dictionary = gated.dictionary.replaced(gate=gate(shape, gated.selection, over))

    def check(outputs: Mapping[str, Tensor]) -> None:
        if not torch.equal(outputs["gated"], outputs["published"]):
            raise AssertionError(f"{name}, {share:.0%}, over a {over}: the gate changed what is replaced")

    erasers = {"published": published, "gated": gated}
    times = hook_pair.timed(shape, arguments, erasers, check, place, rounds)
    return {"shape": name, "share": share, "over": over, **times}


def line(row: dict) -> str:
    """What is printed of a row."""
    own = row["own_ms"]
    return (
        f"{row['shape']}, {row['share']:4.0%} of patches detected: {own['published']:.3f} ms without the gate, "
        f"over a {row['over']} {own['gated']:.3f} ms with: {row['ratio'] - 1:+.1%}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line a share of detected patches and gate; `--out FILE` keeps the times as JSON."""
    hook_pair.run(__doc__, list(shapes.SHAPES), CASES, row, line, arguments)


if __name__ == "__main__":
    main()
