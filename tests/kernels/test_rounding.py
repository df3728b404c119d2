"""detect_patches on real numbers: every backend decides alike wherever rounding cannot (METHOD.md, 2.3)."""

import hypothesis.strategies as st
import torch
from hypothesis import given

from lbdt.testing import DTYPES, TOLERANCES
from tests.ops.test_detect_patches import INF, backends, detect, inputs, literal, pre_activations


@backends
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(0, 32),
    threshold=st.floats(0, 3),
    dtype=st.sampled_from(DTYPES[:3]),
    update=st.booleans(),
)
def test_property_real_inputs(backend, seed, k, threshold, dtype, update):
    """Same mask wherever the decision is not within float32's rounding of a threshold or of the k-th value."""
    arguments = inputs(seed, d=24, L=96, U=6, k=k, threshold=threshold)
    g = torch.Generator().manual_seed(seed)
    for name in ("x", "weight", "bias"):
        arguments[name] = torch.randn(arguments[name].shape, generator=g).to(
            torch.float32 if name == "bias" else dtype
        )
    arguments["minus"] = torch.randn(arguments["x"].shape, generator=g).to(dtype) if update else None
    exact = {
        name: v.double()
        for name, v in arguments.items()
        if name in ("x", "weight", "bias", "minus") and v is not None
    }
    h = pre_activations(**exact)
    watched = h[..., arguments["latents"]]
    margin = (watched - arguments["thresholds"][arguments["timestep_bin"]].unsqueeze(1)).abs()
    if k:
        ranked = h.sort(dim=-1, descending=True).values
        gap = (ranked[..., k - 1] - ranked[..., k]).unsqueeze(-1) if k < 96 else torch.tensor(INF)
        margin = margin.minimum(gap)
    sure = margin.amin(-1) > TOLERANCES[torch.float32, "detect_margin"][1] * h.abs().max()
    assert torch.equal(detect(backend, **arguments)[sure], literal(**arguments)[sure])
