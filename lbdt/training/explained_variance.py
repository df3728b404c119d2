"""How well an SAE explains activations: fraction of variance unexplained, active latents, dead latents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lbdt.activations import Site, Source
from lbdt.activations.source import shard_count
from lbdt.sae import SparseAutoencoder

_ROWS = 4096
_ITERATIONS = 100
_TOLERANCE = 1e-5


@torch.no_grad()
def explain_variance(
    sae: SparseAutoencoder,
    x: Tensor | Source,  # a tensor [..., d], or a source
    site: Site | None = None,
) -> dict[str, float]:
    """How well `sae` explains rows at inference: `fvu` (squared error over squared deviation from the mean row),
    `l0` (active latents a row), `dead` (latents that fire on no row).

    Of a source, all rows at `site`, a shard at a time; sums are float64.

    Raises:
        ValueError: no rows, a source without a site, NaN.
    """
    if not isinstance(x, Tensor) and site is None:
        raise ValueError("site: expected one of the source's; got None")
    device = sae.b_dec.device
    fired = torch.zeros(sae.config.num_latents, dtype=torch.bool, device=device)
    error = active = square = 0.0
    total, count = 0.0, 0
    origin = None
    for part in _parts(x, site):
        part = part.to(device).float()
        # Deviations from a nearby point: sums of raw squares would lose the variance of far-off data.
        origin = part.mean(0) if origin is None else origin
        code = sae.encode(part)
        on = code.values > 0
        error += float((sae.decode(code).float() - part).double().square().sum())
        active += int(on.sum())
        fired[code.indices[on]] = True
        shifted = (part - origin).double()
        total, square, count = (
            total + shifted.sum(0),
            square + float(shifted.square().sum()),
            count + len(part),
        )
    if not count:
        raise ValueError("x: expected one or more rows, got none")
    variance = square - float(torch.as_tensor(total).square().sum()) / count
    if not error == error:
        raise ValueError("x: expected finite values, got NaN or infinity; clean the activations")
    return {
        "fvu": error / variance if variance > 0 else float(error > 0),
        "l0": active / count,
        "dead": int((~fired).sum()),
    }


def geometric_median(x: Tensor) -> Tensor:
    """The point [d] with the least summed distance to the rows of `x` [n, d], by Weiszfeld's iteration."""
    guess = x.mean(0)
    for _ in range(_ITERATIONS):
        weights = 1 / (x - guess).norm(dim=1).clamp(min=1e-10)
        previous, guess = guess, (weights @ x) / weights.sum()
        if float((guess - previous).norm()) <= _TOLERANCE * float(guess.norm()):
            break
    return guess


def _parts(x: Tensor | Source, site: Site | None) -> Iterator[Tensor]:
    shards: Iterable[Tensor] = (
        [x] if isinstance(x, Tensor) else (x.shard(index, site).x for index in range(shard_count(x)))
    )
    for shard in shards:
        yield from shard.reshape(-1, shard.shape[-1]).split(_ROWS)
