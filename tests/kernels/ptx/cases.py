"""What runs in the machine: small inputs of every op that has Triton kernels, and what they stress.

Numbers are small integers, so that every order of summation gives the same sums and ties are ties. Another kernel of an
op that is here needs no line; another op needs its rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from lbdt import reference
from lbdt.int8_screen import Screen
from tests.kernels.ptx import step_rows

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
NCHW, NHWC = torch.contiguous_format, torch.channels_last


class Case(NamedTuple):
    op: str
    inputs: Callable[[], dict]
    archs: tuple[int, ...] = (90, 80)
    twice: bool = False
    """Whether the tests run it for every one of `archs`, not for the first alone: of sm_80 one case for each way in
    which its matrix instructions come by their operands. The rest of the code is the same on both."""
    oldest: bool = False
    """Whether it also runs, for the first of `archs`, as compiled by the oldest Triton that is supported."""
    expected: Callable[[dict], object] | None = None
    """What the op returns, where the reference leaves a choice."""


def _integers(shape, generator, dtype, high: int = 3) -> torch.Tensor:
    return torch.randint(-high, high + 1, shape, generator=generator).to(dtype)


def detection(
    batch=2,
    channels=128,
    height=6,
    width=6,
    latents=150,
    union=3,
    k=3,
    dtype=HALF,
    layout=NCHW,
    update=False,
    threshold=1.0,
    spread=8,
    seed=0,
) -> dict:
    """Arguments of detect_patches. `spread`: of the biases; 0 makes ties of most."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, channels, height, width)
    latent = torch.randperm(latents, generator=g)[:union]
    weight = _integers((latents, channels), g, dtype)
    if spread == 0:  # few kinds of rows: what differs is the latent's index
        weight = weight[torch.arange(latents) % 3].contiguous()
    return {
        "x": _integers(shape, g, dtype).to(memory_format=layout),
        "weight": weight,
        "bias": _integers((latents,), g, FLOAT, spread),
        "latents": latent,
        "thresholds": torch.full((3, union), threshold),
        "timestep_bin": torch.randint(3, (batch,), generator=g),
        "enabled": torch.rand(batch, union, generator=g) < 0.9,
        "k": k,
        "minus": _integers(shape, g, dtype, 2).to(memory_format=layout) if update else None,
    }


def refuted(**about) -> dict:
    """As `detection`, with latents that are larger than any that is watched."""
    given = detection(**about)
    others = [latent for latent in range(len(given["bias"])) if latent not in given["latents"]]
    given["bias"][others[: given["k"]]] += 5000.0
    return given


def screened(centre=0.0, **about) -> dict:
    """As `detection`, with the int8 screen around a `centre`: far from patches its bounds decide nothing."""
    given = detection(**about)
    centre = torch.full_like(given["weight"][0], centre, dtype=FLOAT)
    return given | Screen.of(given["weight"], given["bias"], centre)._asdict()


def _detected(arguments: dict) -> torch.Tensor:
    return reference.detect_patches(**arguments)


def gated(concepts: int = 3, over_calls: bool = False, deciding: bool = True, **about) -> dict:
    """As `detection`, with the gate; the rows decide for each other."""
    given = detection(**about)
    g = torch.Generator().manual_seed(about.get("seed", 0) + 1)
    batch, union = given["enabled"].shape
    given |= {
        "owners": torch.randint(concepts, (union,), generator=g),
        "least": torch.randint(1, 8, (3, concepts), generator=g),
        "least_of": given["x"].shape[2:].numel(),
        "deciding": torch.arange(batch).flip(0) if deciding else None,
        "gated": torch.full((batch,), -7),
    }
    if over_calls:
        given["so_far"] = torch.randint(0, 5, (batch, concepts + 1), generator=g)
    return given


def encoding(batch=1, channels=64, side=4, latents=90, k=5, dtype=HALF, layout=NCHW, high=3) -> dict:
    g = torch.Generator().manual_seed(4)
    return {
        "x": _integers((batch, channels, side, side), g, dtype, high).to(memory_format=layout),
        "weight": _integers((latents, channels), g, dtype, high),
        "bias": _integers((latents,), g, FLOAT),
        "k": k,
    }


def bytes_to_multiply() -> dict:
    g = torch.Generator().manual_seed(6)
    return {name: _integers((64, 256), g, torch.int8, 127) for name in "ab"}


def halves_to_multiply() -> dict:
    g = torch.Generator().manual_seed(7)
    return {"a": _integers((70, 320), g, HALF), "b": _integers((50, 320), g, HALF)}


def lowest_of_tied(arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """encode_topk with the lowest indices of tied latents."""
    rows = arguments["x"].flatten(2).transpose(1, 2).float()
    h = rows @ arguments["weight"].float().t() + arguments["bias"]
    values, indices = h.sort(dim=-1, descending=True, stable=True)
    return values[..., : arguments["k"]].relu().to(arguments["x"].dtype), indices[..., : arguments["k"]]


def recording(batch=3, patches=70, cells=150, rows=4, summed=True, gate=True) -> dict:
    g = torch.Generator().manual_seed(5)
    sums = torch.randn(batch, patches, generator=g)
    sums[0, 3], sums[1, 5] = float("nan"), float("inf")
    return {
        "mask": torch.rand(batch, patches, generator=g) < 0.4,
        "replaced": torch.rand(batch, patches, generator=g) < 0.5,
        "timesteps": torch.tensor([801.0, 601.5, 1.0])[:batch],
        "sizes": 2**45 + 3,
        "rows": torch.zeros(rows, 4 + summed + gate, dtype=torch.int64),
        "cells": torch.zeros(cells, dtype=torch.uint8),
        "written": torch.tensor([3, 140]),
        "sums": sums if summed else None,
        "gated": torch.arange(batch) if gate else None,
    }


def uniform(timesteps=(801.0, -3.5, float("nan")), patches=300) -> dict:
    return {
        "seeds": torch.tensor([7, -1, 2**62 + 5]),
        "timesteps": torch.tensor(timesteps),
        "halves": torch.tensor([0, 1, 1]),
        "patches": patches,
    }


NEWEST = (90,)
_MANY = {"batch": 1, "height": 9, "width": 8, "union": 4, "threshold": -99.0}
_SCREENED = "tests.kernels.ptx.screened_patches"
_STEP = "tests.kernels.ptx.step_rows"
CASES = {
    # Gathered by element, as neighbours in x are no neighbours in channels; and copied asynchronously.
    "half": Case("detect_patches", lambda: detection(k=6), oldest=True, twice=True),
    "half, channels last": Case(
        "detect_patches", lambda: detection(channels=512, layout=NHWC, k=6, seed=1), oldest=True, twice=True
    ),
    "bfloat16": Case("detect_patches", lambda: detection(dtype=BRAIN, seed=2), archs=NEWEST),
    "bfloat16, channels last": Case("detect_patches", lambda: detection(dtype=BRAIN, layout=NHWC, seed=3)),
    "float32": Case("detect_patches", lambda: detection(dtype=FLOAT, channels=48, seed=4), archs=NEWEST),
    "float32, channels last": Case(
        "detect_patches", lambda: detection(dtype=FLOAT, channels=40, layout=NHWC, seed=5), oldest=True
    ),
    "float32, update": Case(
        "detect_patches", lambda: detection(dtype=FLOAT, channels=32, update=True, seed=6), archs=NEWEST
    ),
    "half, update": Case("detect_patches", lambda: detection(update=True, seed=7), archs=NEWEST),
    "half, update, channels last": Case(
        "detect_patches", lambda: detection(update=True, layout=NHWC, seed=8), oldest=True
    ),
    "ragged": Case(
        "detect_patches",
        lambda: detection(channels=90, height=3, width=7, latents=131, union=17, k=4, seed=9),
        twice=True,
    ),
    "ragged, channels last": Case(
        "detect_patches",
        lambda: detection(channels=72, height=5, width=5, latents=77, layout=NHWC, union=5, seed=10),
        archs=NEWEST,
    ),
    # The code of "half" with other numbers.
    "ties": Case("detect_patches", lambda: detection(spread=0, latents=60, k=20, seed=11)),
    "no candidate": Case("detect_patches", lambda: detection(threshold=1e9, seed=12), archs=NEWEST),
    "all candidates": Case("detect_patches", lambda: detection(threshold=-1e9, k=9, seed=13)),
    "all refuted": Case(
        "detect_patches",
        lambda: refuted(batch=1, threshold=-1e9, k=2, latents=300, seed=14),
        archs=NEWEST,
    ),
    # Several programs share a block of patches; the last to be done packs.
    "shared blocks": Case(
        "detect_patches",
        lambda: detection(batch=1, height=5, width=6, latents=600, union=5, k=12, threshold=-5.0, seed=21),
        oldest=True,
    ),
    "shared blocks, update": Case(
        "detect_patches",
        lambda: detection(
            batch=1,
            height=5,
            width=6,
            latents=600,
            union=20,
            k=12,
            threshold=-5.0,
            update=True,
            dtype=BRAIN,
            seed=22,
        ),
        twice=True,
    ),
    # More survivors than the smaller tile of the second launch has.
    "many survivors": Case(
        "detect_patches",
        lambda: detection(batch=3, height=8, width=8, latents=700, union=4, k=60, threshold=-99.0, seed=23),
        oldest=True,
        twice=True,
    ),
    "many survivors, update": Case(
        "detect_patches",
        lambda: detection(
            height=8, width=8, latents=400, union=4, k=60, layout=NHWC, update=True, threshold=-99.0, seed=24
        ),
        archs=NEWEST,
    ),
    "many survivors, float32": Case(
        "detect_patches",
        lambda: detection(channels=40, latents=300, union=4, k=40, threshold=-99.0, dtype=FLOAT, seed=25),
    ),
    # Some survivors are undecided, and their latents between the bounds counted one by one; few survive; so many
    # latents lie between the bounds that tiles of all are counted. These three have the same code.
    "screened": Case(
        _SCREENED,
        lambda: screened(latents=300, k=60, channels=64, seed=27, **_MANY),
        oldest=True,
        twice=True,
        expected=_detected,
    ),
    "screened, update": Case(
        _SCREENED,
        lambda: screened(channels=36, latents=290, k=40, update=True, dtype=BRAIN, seed=32, **_MANY),
        archs=NEWEST,
        expected=_detected,
    ),
    "screened, few": Case(
        _SCREENED,
        lambda: screened(batch=1, channels=64, height=9, width=8, latents=290, k=4, seed=29),
        archs=NEWEST,
        expected=_detected,
    ),
    "screened from afar": Case(
        _SCREENED,
        lambda: screened(centre=999.0, channels=64, latents=300, k=60, seed=27, **_MANY),
        archs=NEWEST,
        expected=_detected,
    ),
    "every latent watched": Case(
        "detect_patches",
        lambda: detection(channels=64, union=150, k=60, threshold=-99.0, seed=26),
        archs=NEWEST,
    ),
    "no rank test": Case("detect_patches", lambda: detection(k=0, threshold=9.0, seed=15), archs=NEWEST),
    "ones": Case(
        "detect_patches",
        lambda: detection(batch=1, channels=16, height=1, width=1, latents=1, union=1, k=1, threshold=-99.0),
        archs=NEWEST,
    ),
    "gated": Case("detect_patches", lambda: gated(union=8, k=9, seed=16), archs=NEWEST),
    "gated over calls": Case(
        "detect_patches",
        lambda: gated(union=8, over_calls=True, k=9, seed=17),
        oldest=True,
    ),
    "gated, two words": Case(
        "detect_patches",
        lambda: gated(40, union=20, height=3, width=3, latents=40, k=0, deciding=False, seed=18),
        archs=NEWEST,
    ),
    "topk": Case("encode_topk", encoding, oldest=True, expected=lowest_of_tied, twice=True),
    "topk, float32 with ties": Case(
        "encode_topk",
        lambda: encoding(dtype=FLOAT, latents=70, high=1),
        archs=NEWEST,
        expected=lowest_of_tied,
    ),
    "int8": Case(
        "tests.kernels.ptx.int8_product",
        bytes_to_multiply,
        oldest=True,
        expected=lambda arguments: arguments["a"].int() @ arguments["b"].int().t(),
        twice=True,
    ),
    "tensor maps": Case(
        "tests.kernels.ptx.described_product",
        halves_to_multiply,
        archs=NEWEST,
        oldest=True,
        expected=lambda arguments: arguments["a"].float() @ arguments["b"].float().t(),
    ),
    "record": Case("record_patches", recording, archs=NEWEST, oldest=True),
    "record, masks only": Case(
        "record_patches", lambda: recording(cells=0, summed=False, gate=False), archs=NEWEST
    ),
    "uniform": Case("patch_uniform", uniform, archs=NEWEST, oldest=True),
    "step": Case(_STEP, step_rows.inputs, archs=NEWEST, expected=step_rows.expected),
    "step of a run": Case(
        _STEP,
        lambda: step_rows.inputs(
            run=True,
            update=True,
            of=lambda x: x.bfloat16().to(memory_format=NHWC),
            timesteps=torch.tensor([600, 601, 600, 601]),
            times=torch.arange(700.0).flip(0),
            enabled=torch.eye(2, 150) > 0,
            seeds=torch.tensor([2**63 - 1, -4]),
            cond=1,
            counted=2,
            schedule=torch.tensor([800, 601, 600, 1]).half(),
            first=1,
            last=2,
        ),
        oldest=True,
        expected=step_rows.expected,
        twice=True,
    ),
}
