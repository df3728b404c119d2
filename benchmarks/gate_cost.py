"""The eraser's hook with the gate and without, in turn, on one device: `python -m benchmarks.gate_cost`.

Both replace the same patches: the gate asks for two patches of a map twice the size, which is one, so it is counted and
compared and never shut. Milliseconds are those of a call of the hooked block without the block's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import hook_pair
from lbdt.bench import hook, shapes
from lbdt.bench.shapes import Place
from lbdt.dictionary.picture_counts import PictureCounts

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
    published, gated = (hook.eraser(shape, arguments, place.seed) for _ in range(2))
    gated.dictionary = gated.dictionary.replaced(gate=gate(shape, gated.selection))

    def check(outputs: Mapping[str, Tensor]) -> None:
        if not torch.equal(outputs["gated"], outputs["published"]):
            raise AssertionError(f"{name}, {share:.0%}: the gate changed what is replaced")

    erasers = {"published": published, "gated": gated}
    times = hook_pair.timed(shape, arguments, erasers, check, place, rounds)
    return {"shape": name, "share": share, **times}


def line(row: dict) -> str:
    """What is printed of a row."""
    own = row["own_ms"]
    return (
        f"{row['shape']}, {row['share']:4.0%} of patches detected: {own['published']:.3f} ms without the gate, "
        f"{own['gated']:.3f} ms with: {row['ratio'] - 1:+.1%}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line a share of detected patches; `--out FILE` keeps the times as JSON."""
    hook_pair.run(__doc__, list(shapes.SHAPES), SHARES, row, line, arguments)


if __name__ == "__main__":
    main()
