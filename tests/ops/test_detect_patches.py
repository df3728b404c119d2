"""detect_patches against the literal version: encode everything, top-k, scatter, compare."""

import os
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lbdt import ops
from lbdt.bench.hardware import allocated_peak
from lbdt.reference.detect_patches import _detect
from lbdt.testing import DTYPES, layouts
from tests.backends import DEVICE, HAS_CPP, every_backend, on_device
from tests.layouts import integers

INF = float("inf")
backends = every_backend("cpp", "triton")
large_backends = every_backend("cpp")  # sizes that are too much for Triton's interpreter


def needs_the_cpu(backend):
    if backend == "cpp" and DEVICE.type != "cpu":
        pytest.skip("the C++ version takes CPU tensors")


def detect(backend, **arguments):
    """On the tested device, the answer on the CPU."""
    needs_the_cpu(backend)
    return ops.detect_patches(**on_device(arguments), backend=backend).cpu()


def pre_activations(x, weight, bias, minus=None):
    rows = x.flatten(2).transpose(1, 2)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = rows.to(dtype) if minus is None else rows.to(dtype) - minus.flatten(2).transpose(1, 2).to(dtype)
    return rows @ weight.to(dtype).t() + bias.to(dtype)


def literal(x, weight, bias, latents, thresholds, timestep_bin, enabled, k, minus=None):
    """What the published tools do, with the tie rule of METHOD.md, 2.3: all tied latents are kept."""
    h = pre_activations(x, weight, bias, minus)
    if k == 0:
        kept = torch.ones_like(h, dtype=torch.bool)
    else:
        values, indices = h.topk(k, dim=-1)
        kept = torch.zeros_like(h, dtype=torch.bool).scatter(-1, indices, True) | (h == values[..., -1:])
    z = torch.where(kept, h, -INF)[..., latents]
    floor = thresholds[timestep_bin].masked_fill(~enabled, INF).to(h.dtype)
    return (z > floor.unsqueeze(1)).any(dim=-1)


def inputs(seed=0, B=2, d=12, H=4, W=5, L=40, U=5, T=3, k=4, dtype=torch.float32, threshold=0.0, spread=1):
    """Integer-valued, so every backend and order gives the same sums and ties are frequent."""
    g = torch.Generator().manual_seed(seed)
    return {
        "x": integers((B, d, H, W), g, dtype),
        "weight": integers((L, d), g, dtype),
        "bias": integers((L,), g, torch.float32, high=spread),
        "latents": torch.randperm(L, generator=g)[:U].sort().values,
        "thresholds": torch.full((T, U), float(threshold)),
        "timestep_bin": torch.randint(T, (B,), generator=g),
        "enabled": torch.ones(B, U, dtype=torch.bool),
        "k": k,
    }


ROWS = [
    pytest.param({}, id="plain"),
    pytest.param({"H": 1, "W": 1}, id="one-patch"),
    pytest.param({"U": 1}, id="one-latent"),
    pytest.param({"L": 1, "U": 1, "k": 1}, id="dictionary-of-one"),
    pytest.param({"d": 13, "H": 3, "W": 7, "L": 97, "U": 7}, id="odd-sizes"),
    pytest.param({"H": 2, "W": 9}, id="non-square"),
    pytest.param({"k": 1}, id="k-1"),  # the owner must be the maximum
    pytest.param({"k": 40}, id="k-all"),  # the rank test always passes
    pytest.param({"k": 0}, id="no-rank-test"),
    pytest.param({"U": 40}, id="every-latent-watched"),
    pytest.param({"threshold": -1e9}, id="all-candidates"),
    pytest.param({"threshold": 1e9}, id="no-candidate"),
    pytest.param({"threshold": INF}, id="inf-everywhere"),
    pytest.param({"d": 2, "L": 200, "k": 9}, id="ties"),  # few distinct values
    pytest.param({"B": 0}, id="no-image"),
    pytest.param({"U": 0}, id="no-latent"),
]
LARGE_ROWS = [
    pytest.param({"L": 3000, "U": 30, "k": 16, "d": 700}, id="several-dictionary-blocks"),
    pytest.param({"H": 40, "W": 30, "threshold": -1e9}, id="several-row-blocks"),
    pytest.param(
        {"H": 13, "W": 11, "L": 2000, "U": 9, "k": 40, "threshold": -1e9}, id="refuted-at-every-stage"
    ),
    pytest.param(
        {"H": 9, "W": 11, "L": 500, "U": 250, "k": 30, "threshold": 20}, id="several-blocks-watched"
    ),
]


def check_equals_the_literal_version(backend, sizes):
    arguments = inputs(**sizes)
    mask = detect(backend, **arguments)
    assert mask.dtype == torch.bool
    assert mask.shape == (arguments["x"].shape[0], arguments["x"].shape[2] * arguments["x"].shape[3])
    if sizes.get("U") == 0:
        assert not mask.any()
    else:
        assert torch.equal(mask, literal(**arguments))


@backends
@pytest.mark.parametrize("sizes", ROWS)
def test_equals_the_literal_version(sizes, backend, poisoned):
    check_equals_the_literal_version(backend, sizes)


@large_backends
@pytest.mark.parametrize("sizes", LARGE_ROWS)
def test_large_sizes(sizes, backend, poisoned):
    check_equals_the_literal_version(backend, sizes)


def test_the_rows_contain_both_answers():
    for sizes in [{}, *(row.values[0] for row in LARGE_ROWS)]:
        mask = literal(**inputs(**sizes))
        assert mask.any() and not mask.all(), sizes
    tied = inputs(d=2, L=200, k=9)
    h = pre_activations(tied["x"], tied["weight"], tied["bias"]).sort(-1, descending=True).values
    assert (h[..., 8] == h[..., 9]).any(), "no tie at the k-th place"


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_minus", [False, True], ids=["output", "update"])
def test_every_dtype(dtype, with_minus, backend):
    arguments = inputs(seed=1, dtype=dtype)
    if with_minus:
        arguments["minus"] = integers(tuple(arguments["x"].shape), torch.Generator().manual_seed(5), dtype)
    if dtype == torch.float64 and backend != "reference":
        with pytest.raises(ValueError, match=f"'{backend}' cannot serve .*float"):
            detect(backend, **arguments)
    else:
        assert torch.equal(detect(backend, **arguments), literal(**arguments))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [(3, 5), (8, 9)], ids=["15-patches", "72-patches"])
def test_every_layout(grid, dtype, backend):
    arguments = inputs(seed=2, H=grid[0], W=grid[1], dtype=dtype)
    minus = integers(tuple(arguments["x"].shape), torch.Generator().manual_seed(5), dtype)
    plain, updated = literal(**arguments), literal(**arguments, minus=minus)
    assert plain.any() and updated.any() and not torch.equal(plain, updated)
    others = layouts(minus)
    for name, x in layouts(arguments["x"]).items():
        arguments["x"] = x
        assert torch.equal(detect(backend, **arguments), plain), name
        for other in (name, "channels_last" if x.dim() == 4 else "patches"):
            assert torch.equal(detect(backend, **arguments, minus=others[other]), updated), (name, other)


@backends
def test_one_image_expanded_to_a_batch(backend):
    arguments = inputs(seed=2)
    arguments["x"] = arguments["x"][:1].expand(2, -1, -1, -1)
    mask = detect(backend, **arguments)
    assert torch.equal(mask, literal(**arguments))
    assert mask.any() and torch.equal(mask[0], mask[1])


@backends
def test_other_strides_and_dtypes_of_the_encoder(backend):
    arguments = inputs(seed=3)
    expected = literal(**arguments)
    arguments["weight"] = torch.cat([arguments["weight"]] * 2, dim=1)[:, :12]
    arguments["thresholds"] = torch.cat([arguments["thresholds"]] * 2, dim=1)[:, :5]
    arguments["enabled"] = torch.cat([arguments["enabled"]] * 2, dim=1)[:, :5]
    assert torch.equal(detect(backend, **arguments), expected)
    arguments["weight"] = arguments["weight"].t().contiguous().t()
    arguments |= {"bias": arguments["bias"].double(), "thresholds": arguments["thresholds"].double()}
    assert torch.equal(detect(backend, **arguments), expected)
    half = {"x": arguments["x"].half(), "weight": arguments["weight"].half()}
    assert torch.equal(detect(backend, **{**arguments, **half}), expected)


@backends
def test_three_images_with_their_own_bins_and_sets(backend):
    arguments = inputs(seed=4, B=3, T=4, k=6)
    arguments["timestep_bin"] = torch.tensor([3, 0, 2])
    arguments["thresholds"] = torch.arange(20.0).view(4, 5).flip(0) - 4
    arguments["thresholds"][0] = INF
    arguments["enabled"] = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], dtype=torch.bool)
    mask = detect(backend, **arguments)
    assert torch.equal(mask, literal(**arguments))
    assert mask[0].any() and not mask[1].any()
    for image in range(3):
        alone = {**arguments}
        for name in ("x", "timestep_bin", "enabled"):
            alone[name] = arguments[name][image : image + 1]
        assert torch.equal(detect(backend, **alone)[0], mask[image])


@backends
def test_disabled_everywhere_detects_nothing(backend):
    arguments = inputs(threshold=-1e9)
    arguments["enabled"] = torch.zeros_like(arguments["enabled"])
    assert not detect(backend, **arguments).any()


@backends
def test_rank_counts_strictly_greater_values(backend):
    """Five latents at 2.0 and one at 3.0, k = 2: all five are kept, as one value only is greater."""
    weight = torch.tensor([[2.0]] * 5 + [[3.0]])
    arguments = inputs()
    arguments |= {"x": torch.ones(1, 1, 1, 1), "weight": weight, "bias": torch.zeros(6), "k": 2}
    arguments |= {"thresholds": torch.zeros(1, 1), "timestep_bin": torch.zeros(1, dtype=torch.int64)}
    arguments |= {"enabled": torch.ones(1, 1, dtype=torch.bool)}
    for latent in range(6):
        arguments["latents"] = torch.tensor([latent])
        assert detect(backend, **arguments).all()
        assert detect(backend, **{**arguments, "k": 1}).all() == (latent == 5)


@backends
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 3),
    # On a GPU every width is another compilation.
    d=st.integers(1, 20) if DEVICE.type == "cpu" else st.sampled_from((1, 7, 20)),
    H=st.integers(1, 5),
    W=st.integers(1, 5),
    L=st.integers(1, 80),
    data=st.data(),
)
def test_property_exact_inputs(backend, seed, B, d, H, W, L, data):
    U = data.draw(st.integers(1, L), label="U")
    k = data.draw(st.integers(0, L), label="k")
    threshold = data.draw(st.sampled_from([-1e9, -3.0, 0.0, 2.0, 9.0, INF]), label="threshold")
    dtypes = DTYPES if backend == "reference" else [t for t in DTYPES if t != torch.float64]
    dtype = data.draw(st.sampled_from(dtypes), label="dtype")
    arguments = inputs(seed, B, d, H, W, L, U, 2, k, dtype, threshold)
    g = torch.Generator().manual_seed(seed)
    arguments["enabled"] = torch.rand(B, U, generator=g) < 0.7
    assert torch.equal(detect(backend, **arguments), literal(**arguments))


@backends
def test_not_a_number_is_never_detected_and_never_counted(backend):
    arguments = inputs(seed=6, threshold=-1e9, k=3)
    arguments["x"][0, 0, 0, 0] = float("nan")  # all of one patch's pre-activations
    arguments["weight"][arguments["latents"].max() - 1] = float("nan")  # one latent's, of every patch
    h = pre_activations(arguments["x"], arguments["weight"], arguments["bias"])
    h = torch.where(h.isnan(), -INF, h)
    largest = h[..., arguments["latents"]].amax(-1, keepdim=True)
    expected = ((h > largest).sum(-1) < 3) & (largest.squeeze(-1) > -1e9)
    assert expected.any() and not expected[0, 0]
    assert torch.equal(detect(backend, **arguments), expected)


@pytest.mark.skipif(DEVICE.type != "cpu" or not HAS_CPP, reason="needs the C++ version")
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_older_processors(capability):
    """The same rows in a process that is held to an older instruction set."""
    chosen = [f"{__file__}::test_large_sizes", f"{__file__}::test_every_layout"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpp", *chosen],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout, done.stdout


@pytest.mark.parametrize("sizes", [*ROWS, *LARGE_ROWS])
@pytest.mark.parametrize("with_minus", [False, True], ids=["output", "update"])
def test_the_reference_with_and_without_selection(sizes, with_minus):
    arguments = inputs(**sizes)
    if sizes.get("U") == 0:
        return
    minus = integers(tuple(arguments["x"].shape), torch.Generator().manual_seed(5), torch.float32)
    arguments["minus"] = minus if with_minus else None
    expected = literal(**arguments)
    for select in (True, False):
        assert torch.equal(_detect(**arguments, select=select)[0], expected), select


@pytest.mark.parametrize("with_minus", [False, True], ids=["output", "update"])
def test_the_reference_never_waits_for_a_device(with_minus):
    """Tensors of the meta device have no data: reading them, or a shape that depends on them, raises."""
    arguments = inputs()
    arguments["minus"] = torch.ones_like(arguments["x"]) if with_minus else None
    given = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    mask = ops.detect_patches(**given, backend="reference")
    assert mask.device.type == "meta" and mask.shape == (2, 20) and mask.dtype == torch.bool
    with pytest.raises(NotImplementedError, match="nonzero"):
        _detect(**given, select=True)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")
def test_the_reference_never_waits_for_the_gpu():
    arguments = on_device(inputs())
    ops.detect_patches(**arguments, backend="reference")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.detect_patches(**arguments, backend="reference")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_backend("cpp")
def test_nothing_of_size_n_by_l_is_held(backend):
    """The peak of what the op itself allocates, from the profiler's record of the CPU allocator."""
    needs_the_cpu(backend)
    arguments = inputs(B=2, d=16, H=16, W=16, L=65536, U=4, k=16, threshold=-1e9)
    peak = allocated_peak(lambda: ops.detect_patches(**arguments, backend=backend))
    assert 0 < peak < 512 * 65536  # bytes: one byte for each of N x L would already be more


BAD = [
    pytest.param({"k": -1}, ValueError, "k: expected 0 <= k <= L = 40, got -1", id="k-negative"),
    pytest.param({"k": 41}, ValueError, "k: expected 0 <= k <= L = 40, got 41", id="k-above-L"),
    pytest.param({"x": torch.zeros(2, 12)}, ValueError, r"x: expected \[B, d, H, W\]", id="x-2d"),
    pytest.param({"x": torch.zeros(2, 12, 4, dtype=torch.int64)}, TypeError, "x: expected dtype", id="x-int"),
    pytest.param(
        {"x": torch.zeros(2, 9, 4, 5)}, ValueError, "weight: .* SAE of another block", id="other-width"
    ),
    pytest.param({"weight": torch.zeros(40, 12).half()}, TypeError, "weight: .*float32", id="weight-dtype"),
    pytest.param({"bias": torch.zeros(39)}, ValueError, "bias: ", id="bias-shape"),
    pytest.param({"latents": torch.arange(4)}, ValueError, "thresholds: ", id="thresholds-shape"),
    pytest.param(
        {"latents": torch.full((5,), 40)}, IndexError, r"latents: .*\[0, 40\)", id="latent-out-of-range"
    ),
    pytest.param({"latents": torch.zeros(5)}, TypeError, "latents: expected dtype int64", id="latents-dtype"),
    pytest.param({"timestep_bin": torch.tensor([0, 3])}, IndexError, "timestep_bin", id="bin-out-of-range"),
    pytest.param({"timestep_bin": torch.tensor([0])}, ValueError, "timestep_bin", id="bin-shape"),
    pytest.param({"enabled": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "enabled", id="enabled-shape"),
    pytest.param(
        {"enabled": torch.ones(2, 5)}, TypeError, "enabled: expected dtype bool", id="enabled-dtype"
    ),
    pytest.param({"minus": torch.zeros(2, 12, 5, 4)}, ValueError, "minus", id="minus-shape"),
    pytest.param({"minus": torch.zeros(2, 12, 4, 5, device="meta")}, ValueError, "minus", id="minus-device"),
]


@backends
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change, error, message, backend):
    with pytest.raises(error, match=message):  # on the CPU, the only place where values are read
        ops.detect_patches(**{**inputs(), **change}, backend=backend)


@backends
@pytest.mark.parametrize(
    "change", [{}, {"dtype": torch.bfloat16}, {"B": 0}, {"k": 0}, {"threshold": INF}], ids=str
)
def test_opcheck(change, backend):
    needs_the_cpu(backend)
    arguments = tuple(on_device(inputs(**change)).values())
    with torch.inference_mode():
        torch.library.opcheck(torch.ops.lbdt.detect_patches.default, arguments, {"backend": backend})
        if backend == "cpp":
            mask = torch.zeros(arguments[0].shape[0], 20, dtype=torch.bool)
            rest = (None, None, None, 0, *7 * (None,), mask)
            torch.library.opcheck(torch.ops.lbdt.detect_patches_cpp.default, (*arguments, *rest))


@backends
def test_fullgraph(backend):
    needs_the_cpu(backend)
    arguments = on_device(inputs(seed=8))
    minus = torch.ones_like(arguments["x"])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def detect(x, minus):
        return ~ops.detect_patches(**{**arguments, "x": x * 1, "minus": minus}, backend=backend)

    with torch.no_grad():
        assert torch.equal(~detect(arguments["x"], minus), literal(**arguments, minus=minus))
