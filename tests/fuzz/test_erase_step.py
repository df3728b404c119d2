"""Fuzz targets of erase_step, whose arguments are those of four ops: as in test_ops.py, and past the checks."""

import inspect

import hypothesis.strategies as st
import pytest
import torch

from lbdt import ops
from lbdt.donors import SOURCES
from lbdt.int8_screen import Screen
from tests.backends import DEVICE, HAS_CPP
from tests.fuzz.calls import (
    ODD,
    agree,
    bools,
    changed,
    equal,
    floats,
    integers,
    laid_out,
    memory,
    outcome,
    spoiled,
    with_screen,
)
from tests.fuzzing import fuzz

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="the arguments are made on the CPU"),
    pytest.mark.skipif(not HAS_CPP, reason="no C++ compiler"),
]
WRITTEN = ("rows", "cells", "written", "run_sums", "run_last", "run_count")
NAMES = [name for name in inspect.signature(ops.erase_step).parameters if name != "backend"]


def thresholds(random, bins, count):
    g = torch.Generator().manual_seed(random.getrandbits(31))
    drawn = torch.randint(-4, 9, (bins, count), generator=g).float()
    return torch.where(torch.rand(bins, count, generator=g) < 0.2, torch.inf, drawn)


def timesteps(random, count):
    dtype = random.choice(
        (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32)
    )
    values = [random.choice((999, 500, 1, 0, 250.5)) for _ in range(count)]
    # Of a NaN in half precision the wider bits are nobody's business.
    if count and dtype in (torch.float32, torch.float64) and random.random() < 0.2:
        values[0] = random.choice(ODD)
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def case(random):
    """Arguments that the op takes, by name."""
    dtype = random.choice((torch.float32, torch.float16, torch.bfloat16))
    images, branches = random.randint(1, 2), random.randint(1, 3)
    shape = (images * branches, random.randint(1, 9), random.randint(0, 5), random.randint(0, 5))
    batch, channels, height, width = shape
    latents, union, bins, concepts = random.randint(1, 40), random.randint(0, 5), random.randint(1, 3), 2
    known, gate = random.choice((None, None, random.randint(0, 4))), random.choice((None, "call", "run"))
    x = floats(random, shape, dtype)
    if random.random() < 0.4:
        x = x.flatten(2)
    given = {
        "x": x,
        "timesteps": timesteps(random, batch),
        "weight": floats(random, (latents, channels), dtype),
        "bias": floats(random, (latents,), torch.float32).nan_to_num(0, 0, 0),
        "latents": integers(random, union, latents),
        "thresholds": thresholds(random, bins, union),
        "times": torch.tensor([999.0, 500.0, 1.0])[:bins],
        "enabled": bools(random, (random.choice((1, images)), union)),
        "seeds": integers(random, random.choice((1, images)), 99),
        "minus": random.choice((None, floats(random, x.shape, dtype))),
        "bank": random.choice((None, floats(random, (bins, 2, channels), dtype))),
        "known_latents": None if known is None else integers(random, known, latents),
        "known_thresholds": None if known is None else thresholds(random, bins, known),
        "owners": None if gate is None else integers(random, union, concepts),
        "least": None if gate is None else integers(random, bins * concepts, 9).view(bins, concepts),
        "schedule": random.choice((None, timesteps(random, random.randint(1, 4)))),
    }
    for name in ("x", "minus", "weight"):
        given[name] = None if given[name] is None else laid_out(random, given[name])
    given |= {
        "k": random.randint(0, latents),
        "images": images,
        "height": height,
        "width": width,
        "sizes": 12345,
        "rows": torch.zeros(random.randint(1, 9), 5 + (gate is not None), dtype=torch.int64),
        "cells": torch.zeros(random.choice((0, 7, 200)), dtype=torch.uint8),
        "written": torch.tensor([random.choice((0, 7, -1, 2**63 - 1)) for _ in range(2)]),
        "padding": random.choice((0, 0, 1, 2, 2**40)),
        "source": random.choice(SOURCES),
        "least_of": random.choice((0, 0, 50)),
        "cond": random.randint(-1, branches - 1),
        "counted": random.choice((-1, -1, 0, 1, 2, 5)),
        "first": random.randint(0, 2),
        "last": random.randint(0, 4),
        "run_sums": None,
        "run_last": None,
        "run_count": None,
        "whole_calls": random.random() < 0.5,
        **dict.fromkeys((*Screen._fields, "order")),
    }
    if gate == "run":
        given["run_sums"] = integers(random, 18, 30).view(6, 3)
        given["run_last"] = torch.tensor([random.choice((-torch.inf, 500.0, 999.0)) for _ in range(6)])
        given["run_count"] = torch.tensor(random.choice((0, images, batch)))
    return {name: given[name] for name in NAMES}


@fuzz(random=st.randoms(use_true_random=False))
def test_erase_step(random):
    arguments = case(random)
    if random.random() < 0.4:
        arguments = spoiled(random, arguments)
    arguments |= with_screen(random, arguments)

    def same(got, expected, after, left):
        assert equal(got, expected)
        for name in WRITTEN:
            exact = torch.equal if name != "run_last" else equal
            assert after[name] is None or exact(after[name], left[name]), name

    agree("erase_step", arguments, random, same)


@fuzz(random=st.randoms(use_true_random=False))
def test_the_internal_op_takes_or_refuses_anything(random):
    ops.explain("erase_step", torch.ones(1, 1, 1))  # loads the library
    arguments = case(random)
    arguments["source"] = random.randint(0, 3)
    for _ in range(random.randrange(3)):
        arguments = spoiled(random, arguments)
    tensors = {n: v for n, v in arguments.items() if isinstance(v, torch.Tensor) and not v.is_sparse}
    if random.random() < 0.2:
        one, other = random.choice(list(tensors)), random.choice(list(tensors))
        arguments[one] = tensors[other]
    before = memory(arguments)
    _, after = outcome(torch.ops.lbdt.erase_step_cpp, arguments)
    written = [arguments[name] for name in WRITTEN if isinstance(arguments[name], torch.Tensor)]
    same = {
        name
        for name in before
        if not any(
            not (w.is_meta or w.is_sparse)
            and arguments[name].untyped_storage().data_ptr() == w.untyped_storage().data_ptr()
            for w in written
        )
    }
    assert not changed(after, before) & same
