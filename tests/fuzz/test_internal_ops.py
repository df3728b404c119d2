"""A fuzz target of the internal C++ ops, which are registered, and so can be called past the wrappers that check."""

import hypothesis.strategies as st
import pytest
import torch

from lbdt import ops
from lbdt.testing import DTYPES
from tests.backends import DEVICE, HAS_CPP
from tests.fuzz.calls import (
    NUMBERS,
    bools,
    changed,
    copied,
    feature_map,
    floats,
    integers,
    laid_out,
    memory,
    outcome,
    spoiled,
    with_screen,
)
from tests.fuzzing import fuzz

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the arguments are made on the CPU")


def internal_case(random):
    """An internal op and arguments that it takes."""
    dtype = random.choice(DTYPES)
    x = laid_out(random, feature_map(random, dtype, least=1))
    batch, channels, count = x.shape[0], x.shape[1], x.shape[2:].numel()
    latents, union = random.randint(1, 40), random.randint(0, 4)
    k = random.randint(1, latents)
    encoder = {"x": x, "weight": floats(random, (latents, channels), dtype), "bias": torch.zeros(latents)}
    mask, replaced, u = bools(random, (batch, count)), bools(random, (batch, count)), torch.rand(batch, count)
    bank = random.choice((None, floats(random, (batch, 2, channels), dtype)))
    moved = {
        "mask": mask,
        "u": u,
        "bank": bank,
        "avoid": random.choice((None, bools(random, (batch, count)))),
        "padding": random.randint(0, 3),
        "source": random.randint(0, 3),
    }
    return random.choice(
        (
            (
                "replace_patches_cpp",
                {"x": x, **moved, "out": torch.zeros(x.shape, dtype=dtype), "replaced": replaced},
            ),
            ("replace_patches_cpp_", {"x": x.clone(), **moved, "replaced": replaced}),
            (
                "detect_patches_cpp",
                {
                    **encoder,
                    "latents": integers(random, union, latents),
                    "thresholds": torch.zeros(2, union),
                    "timestep_bin": integers(random, batch, 2),
                    "enabled": bools(random, (batch, union)),
                    "k": k,
                    "minus": None,
                    "owners": random.choice((None, integers(random, union, 2))),
                    "least": random.choice((None, torch.ones(2, 2, dtype=torch.int64))),
                    "least_of": random.choice((0, 7)),
                    "deciding": random.choice((None, integers(random, batch, batch or 1))),
                    "gated": random.choice((None, torch.zeros(batch, dtype=torch.int64))),
                    "so_far": random.choice((None, integers(random, 3 * batch, 99).view(batch, 3))),
                    **with_screen(random, encoder),
                    "mask": mask,
                },
            ),
            (
                "encode_topk_cpp",
                {
                    **encoder,
                    "k": k,
                    "values": torch.zeros(batch, count, k, dtype=dtype),
                    "indices": torch.zeros(batch, count, k, dtype=torch.int64),
                },
            ),
            (
                "patch_uniform_cpp",
                {
                    "seeds": integers(random, batch, 99),
                    "timesteps": floats(random, (batch,), dtype),
                    "halves": integers(random, batch, 2),
                    "out": torch.zeros(batch, count),
                },
            ),
            (
                "record_patches_cpp",
                {
                    "mask": mask,
                    "replaced": replaced,
                    "timesteps": torch.zeros(batch),
                    "sizes": random.choice(NUMBERS[:-1]),
                    "rows": torch.zeros(3, random.choice((4, 5, 6)), dtype=torch.int64),
                    "cells": torch.zeros(random.choice((0, 50)), dtype=torch.uint8),
                    "written": integers(random, 2, 99),
                    "sums": random.choice((None, torch.zeros(batch, count))),
                    "gated": random.choice((None, torch.zeros(batch, dtype=torch.int64))),
                },
            ),
        )
    )


WRITTEN = ("out", "replaced", "values", "indices", "rows", "cells", "written")


@pytest.mark.skipif(not HAS_CPP, reason="no C++ compiler")
@fuzz(random=st.randoms(use_true_random=False))
def test_internal_ops_take_or_refuse_anything(random):
    ops.explain("patch_uniform", *(torch.zeros(1, dtype=torch.int64),) * 3, 1)  # loads the library
    name, arguments = internal_case(random)
    for _ in range(random.randrange(3)):
        arguments = spoiled(random, arguments)
    tensors = {n: v for n, v in arguments.items() if isinstance(v, torch.Tensor) and not v.is_sparse}
    kind = random.random()
    if kind < 0.2:
        one, other = random.choice(list(tensors)), random.choice(list(tensors))
        arguments[one] = tensors[other]
    elif kind < 0.3:
        freed = copied(arguments)[random.choice(list(tensors))]
        if not freed.is_meta:
            freed.untyped_storage().resize_(random.choice((0, freed.untyped_storage().nbytes() // 2)))
            arguments = copied(arguments) | {random.choice(list(tensors)): freed}
    written = {n for n in WRITTEN if n in arguments} | ({"x"} if name.endswith("_") else set())
    if name == "detect_patches_cpp":
        written |= {"mask", "gated", "so_far"}
    bounds = memory(arguments)
    _, after = outcome(getattr(torch.ops.lbdt, name), arguments)
    same = {n for n in bounds if not any(after[n] is after[w] or _together(arguments, n, w) for w in written)}
    assert not changed(after, bounds) & same


def _together(arguments, one, other):
    a, b = arguments[one], arguments[other]
    return a is b or (
        isinstance(b, torch.Tensor)
        and not (b.is_meta or b.is_sparse)
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    )
