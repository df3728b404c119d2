"""Fuzz targets, one an op (that of erase_step is in test_erase_step.py): made-up arguments, good and bad, on every
backend that is here.

Good ones: all backends give the same. Bad ones: a documented exception, the same of all backends, and nothing changed.
Where memory is read or written outside of a tensor only a sanitizer may see it: `python -m benchmarks.sanitize --asan`.
"""

import hypothesis.strategies as st
import pytest
import torch

from lbdt import ops
from lbdt.donors import SOURCES
from lbdt.testing import DTYPES
from tests.backends import DEVICE
from tests.fuzz.calls import (
    ODD,
    agree,
    bools,
    equal,
    feature_map,
    floats,
    integers,
    laid_out,
    spoiled,
    with_screen,
)
from tests.fuzzing import fuzz

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the arguments are made on the CPU")


def replace_case(random):
    dtype = random.choice(DTYPES)
    x = feature_map(random, dtype)
    batch, channels, height, width = x.shape
    u = torch.rand(batch, height * width, generator=torch.Generator().manual_seed(random.getrandbits(31)))
    if u.numel() and random.random() < 0.3:
        u.view(-1)[random.randrange(u.numel())] = random.choice((*ODD, 1e-40, 1.0, -0.5, 3e38, 1e9))
    bank = random.choice((None, random.choice(DTYPES)))
    arguments = {
        "x": x if random.random() < 0.6 else x.flatten(2),
        "mask": bools(random, (batch, height * width)),
        "u": u,
        "height": height,
        "width": width,
        "padding": random.choice((0, 0, 1, 2, 9, 2**40)),
        "source": random.choice(SOURCES),
        "bank": bank and floats(random, (batch, random.randint(1, 3), channels), bank),
        "avoid": random.choice((None, bools(random, (batch, height * width)))),
    }
    return {n: laid_out(random, v) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


def shared(random, arguments):
    """The arguments with memory in common: places of x, or x with another one."""
    x, u, bank = arguments["x"], arguments["u"], arguments["bank"]
    if x.numel() == 0:
        return arguments
    own = x.contiguous()
    kind = random.randrange(4)
    if kind == 0:
        strides = [random.randint(0, 3) for _ in x.shape]
        room = floats(random, (1 + sum(3 * size for size in x.shape),), x.dtype)
        return {**arguments, "x": room.as_strided(x.shape, strides)}
    if kind == 1:
        room = torch.cat([own.flatten(), own.flatten()])
        return {**arguments, "x": room.as_strided(own.shape, own.stride(), random.randint(0, own.numel()))}
    if kind == 2 and bank is not None:
        rows = x.shape[2:].numel()
        view = own.flatten(2).transpose(1, 2)[:, : max(1, rows // 2)]
        return {**arguments, "x": own, "bank": view}
    if kind == 3 and x.dtype == torch.float32 and u.numel() <= own.numel():
        return {**arguments, "x": own, "u": own.view(-1)[: u.numel()].view(u.shape)}
    return {**arguments, "x": own}


@fuzz(random=st.randoms(use_true_random=False))
def test_replace_patches(random):
    arguments = replace_case(random)
    if random.random() < 0.5:
        arguments = spoiled(random, arguments)

    def same(got, expected, after, left):
        assert equal(got[0], expected[0]) and torch.equal(got[1], expected[1])

    agree("replace_patches", arguments, random, same)


@fuzz(random=st.randoms(use_true_random=False))
def test_replace_patches_in_place(random):
    arguments = replace_case(random)
    fault = random.random()
    if fault < 0.3:
        arguments = spoiled(random, arguments)
    elif fault < 0.7:
        arguments = shared(random, arguments)

    def same(got, expected, after, left):
        assert torch.equal(got, expected) and equal(after["x"], left["x"])

    got, left = agree("replace_patches_", arguments, random, same)
    if not isinstance(got, type):
        out, replaced = ops.replace_patches(**arguments, backend="reference")
        assert torch.equal(got, replaced) and equal(left["x"].detach(), out.detach())


def encoder_case(random, least):
    dtype = random.choice(DTYPES)
    x, latents = feature_map(random, dtype, least=1), random.randint(1, 40)
    return {
        "x": x if random.random() < 0.6 else x.flatten(2),
        "weight": floats(random, (latents, x.shape[1]), dtype),
        "bias": floats(random, (latents,), random.choice((torch.float32, torch.float64))),
        "k": random.randint(least, latents),
    }


def arranged(random, arguments):
    return {n: laid_out(random, v) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


@fuzz(random=st.randoms(use_true_random=False))
def test_detect_patches(random):
    arguments = encoder_case(random, 0)
    x, latents = arguments["x"], arguments["weight"].shape[0]
    union, bins, k = random.randint(0, 5), random.randint(1, 3), arguments.pop("k")
    thresholds = floats(random, (bins, union), random.choice((torch.float32, torch.float64))) + 0.5
    arguments |= {
        "latents": integers(random, union, latents),
        "thresholds": thresholds,
        "timestep_bin": integers(random, x.shape[0], bins),
        "enabled": bools(random, (x.shape[0], union)),
        "k": k,
        "minus": floats(random, x.shape, x.dtype) if random.random() < 0.3 else None,
    }
    if random.random() < 0.5:
        batch, concepts = x.shape[0], random.randint(1, 4)
        least = [[random.choice((0, 1, 3, 2**62, -5)) for _ in range(concepts)] for _ in range(bins)]
        arguments |= {
            "owners": integers(random, union, concepts),
            "least": torch.tensor(least),
            "least_of": random.choice((0, 1, 35, 2**30)),
            "deciding": integers(random, batch, batch) if batch and random.random() < 0.5 else None,
        }
    arguments = arranged(random, arguments)
    if random.random() < 0.5:
        arguments = spoiled(random, arguments)

    arguments |= with_screen(random, arguments)

    def same(got, expected, after, left):
        assert torch.equal(got, expected)

    agree("detect_patches", arguments, random, same)


@fuzz(random=st.randoms(use_true_random=False))
def test_encode_topk(random):
    arguments = arranged(random, encoder_case(random, 1))
    if random.random() < 0.5:
        arguments = spoiled(random, arguments)

    def same(got, expected, after, left):
        (values, indices), (wanted, _) = got, expected
        assert equal(values + 0.0, wanted + 0.0)
        ordered = indices.sort(dim=-1).values
        assert (ordered[..., 1:] > ordered[..., :-1]).all()
        h = torch.einsum("bdn,ld->bnl", after["x"].flatten(2).double(), after["weight"].double())
        kept = (h + after["bias"].double()).gather(2, indices).relu().to(values.dtype)
        assert equal(kept + 0.0, values + 0.0)

    agree("encode_topk", arguments, random, same)


@fuzz(random=st.randoms(use_true_random=False))
def test_patch_uniform(random):
    batch = random.randint(0, 4)
    times = torch.tensor([random.uniform(-5, 1000) for _ in range(batch)], dtype=torch.float64)
    if batch and random.random() < 0.3:
        times[0] = random.choice((*ODD, 2.0**63, -(2.0**63), 1e300, 2.0**40 + 0.5))
    dtype = random.choice((*DTYPES, torch.int64, torch.int32))
    arguments = {
        "seeds": torch.tensor([random.randint(-(2**63), 2**63 - 1) for _ in range(batch)], dtype=torch.int64),
        "timesteps": times.to(dtype) if dtype.is_floating_point else integers(random, batch, 1000).to(dtype),
        "halves": integers(random, batch, 2),
        "patches": random.choice((0, 1, 35, 300)),
    }
    arguments = arranged(random, arguments)
    if random.random() < 0.5:
        arguments = spoiled(random, arguments)
    if isinstance(arguments["patches"], int) and 1000 < arguments["patches"] <= 2**32:
        arguments["patches"] = 1000  # allowed, and too much memory

    def same(got, expected, after, left):
        assert torch.equal(got, expected) and ((got >= 0) & (got < 1)).all()

    agree("patch_uniform", arguments, random, same)


@fuzz(random=st.randoms(use_true_random=False))
def test_record_patches(random):
    shape, room = (random.randint(0, 4), random.randint(0, 40)), random.choice((0, 1, 50, 500))
    ends = [random.choice((0, 7, 2**40, 2**63 - 1, -1, -(2**63))) for _ in range(2)]
    free = {
        "mask": bools(random, shape),
        "replaced": bools(random, shape),
        "timesteps": floats(random, shape[:1], torch.float32),
        "sums": random.choice((None, floats(random, shape, torch.float32))),
        "gated": random.choice((None, integers(random, shape[0], 99))),
    }
    columns = 4 + (free["sums"] is not None) + (free["gated"] is not None)
    arguments = arranged(random, free) | {
        "sizes": random.choice((0, 12345, 2**62, 2**63 - 1)),
        "rows": torch.zeros(random.randint(1, 6), columns, dtype=torch.int64),
        "cells": torch.zeros(room, dtype=torch.uint8),
        "written": torch.tensor(ends),
    }
    fault = random.random()
    if fault < 0.4:
        arguments = spoiled(random, arguments)
    elif fault < 0.6:
        rows = arguments["rows"]
        arguments |= random.choice(
            (
                {"written": rows.view(-1)[:2]},
                {"cells": rows.view(-1).view(torch.uint8)[3:]},
                {"cells": arguments["written"].view(torch.uint8)},
                {"timesteps": rows.view(-1).view(torch.float32)[: shape[0]]},
            )
        )

    def same(got, expected, after, left):
        assert all(torch.equal(after[name], left[name]) for name in ("rows", "cells", "written"))

    agree("record_patches", arguments, random, same)
