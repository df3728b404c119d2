"""encode_topk against the whole encoder followed by torch.topk."""

import os
import subprocess
import sys

import pytest
import torch

from lbdt import ops
from lbdt.bench.hardware import allocated_peak
from lbdt.testing import DTYPES, assert_close, layouts
from tests.backends import DEVICE, HAS_CPP, every_backend
from tests.layouts import integers
from tests.repeats import repeats

backends = every_backend("cpp", "triton")
needs_cpp = pytest.mark.skipif(DEVICE.type != "cpu" or not HAS_CPP, reason="needs the C++ version")
NAN, INF = float("nan"), float("inf")


def inputs(seed=0, B=2, d=12, H=3, W=5, L=40, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    real = [torch.randn(shape, generator=g) for shape in ((B, d, H, W), (L, d), (L,))]
    return real[0].to(dtype), real[1].to(dtype), real[2]


def encoded(x, weight, bias):
    return x.double().flatten(2).transpose(1, 2) @ weight.double().t() + bias.double()


def needs_the_cpu(backend):
    if backend == "cpp" and DEVICE.type != "cpu":
        pytest.skip("the C++ version takes CPU tensors")


def encode(x, weight, bias, k, backend):
    """On the tested device, the answer on the CPU."""
    needs_the_cpu(backend)
    given = (tensor.to(DEVICE) for tensor in (x, weight, bias))
    return [tensor.cpu() for tensor in ops.encode_topk(*given, k, backend=backend)]


ROWS = [
    pytest.param({}, 4, id="plain"),
    pytest.param({}, 1, id="k-1"),
    pytest.param({}, 40, id="k-all"),  # negative pre-activations are kept as zeros
    pytest.param({"H": 1, "W": 1, "L": 1}, 1, id="one-by-one"),
    pytest.param({"d": 13, "H": 3, "W": 7, "L": 97}, 7, id="odd-sizes"),
    pytest.param({"d": 130, "L": 331, "B": 3}, 17, id="several-tiles"),
    pytest.param({"B": 0}, 3, id="no-image"),
]
LARGE_ROWS = [
    pytest.param({"d": 700, "L": 3001}, 17, id="several-dictionary-blocks"),
    pytest.param({"H": 41, "W": 31, "d": 3}, 5, id="several-row-blocks"),
]
CPP_ROWS = [
    pytest.param({"B": 1, "H": 1, "W": 1, "d": 5, "L": 391}, 9, id="one-patch"),  # fewer than a vector holds
    pytest.param({"B": 1, "H": 5, "W": 13, "d": 7, "L": 203}, 131, id="k-above-a-block"),  # of 96 latents
    pytest.param({"H": 11, "W": 13, "d": 37, "L": 4099}, 33, id="cut-back-often"),
    pytest.param({"H": 11, "W": 13, "d": 9, "L": 2003}, 65, id="cut-back-by-selection"),  # 2 k is above 128
    pytest.param({"H": 23, "W": 29, "d": 9, "L": 41}, 3, id="one-block-of-latents"),  # shared out by patches
    pytest.param({"d": 9, "L": 1009}, 1009, id="k-all-of-many"),
]


def check(sizes, k, dtype, backend):
    x, weight, bias = inputs(**sizes, dtype=dtype)
    values, indices = encode(x, weight, bias, k, backend)
    h = encoded(x, weight, bias)
    assert values.dtype == dtype and indices.dtype == torch.int64
    assert_close(values, h.topk(k).values.relu(), "encode_topk")
    assert_close(values, h.gather(-1, indices).relu().to(dtype), "encode_topk")
    assert all(row.unique().numel() == k for row in indices.flatten(0, 1)), "an index twice"


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "k"), ROWS)
def test_equals_encode_and_topk(sizes, k, dtype, backend, poisoned):
    if backend in ("cpp", "triton") and dtype == torch.float64:
        needs_the_cpu(backend)
        reason = {
            "cpp": "computes in float32, and x is float64",
            "triton": "needs float32, float16 or bfloat16, got float64",
        }[backend]
        with pytest.raises(ValueError, match=f"'{backend}' cannot serve this call: {reason}"):
            check(sizes, k, dtype, backend)
    else:
        check(sizes, k, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "k"), LARGE_ROWS)
def test_large_sizes(sizes, k, dtype, poisoned):
    """Beyond the reference's blocks; too much for Triton's interpreter, which "auto" passes over."""
    check(sizes, k, dtype, None)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(("sizes", "k"), [*LARGE_ROWS, *CPP_ROWS])
def test_cpp_sizes(sizes, k, dtype, poisoned):
    check(sizes, k, dtype, "cpp")


@backends
def test_ties_keep_the_k_largest_values(backend):
    g = torch.Generator().manual_seed(1)
    x, weight = integers((2, 3, 4, 4), g, torch.float32), integers((300, 3), g, torch.float32)
    bias = torch.zeros(300)
    values, indices = encode(x, weight, bias, 9, backend)
    h = encoded(x, weight, bias).float()
    assert torch.equal(values, h.topk(9).values.relu())
    assert torch.equal(h.gather(-1, indices).relu(), values)


@backends
def test_every_layout(backend):
    x, weight, bias = inputs(seed=2)
    expected = encode(x, weight, bias, 3, backend)
    for name, other in layouts(x.to(DEVICE)).items():
        values, indices = encode(other, weight, bias, 3, backend)
        assert_close(values, expected[0], "encode_topk")
        assert torch.equal(indices, expected[1]), name


@backends
def test_sliced_weight_and_bias(backend):
    needs_the_cpu(backend)
    x, weight, bias = (tensor.to(DEVICE) for tensor in inputs(seed=3))
    expected = ops.encode_topk(x, weight, bias, 3, backend=backend)
    weight, bias = torch.cat([weight] * 2, dim=1)[:, :12], torch.stack([bias] * 2, dim=1)[:, 0]
    for got, wanted in zip(ops.encode_topk(x, weight, bias, 3, backend=backend), expected, strict=True):
        assert repeats(got, wanted)


def in_order(h, k):
    """The k largest by (value, smaller latent first)."""
    order = h.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return h.gather(-1, order), order


# Of (d, L, k), with values so few that most are tied.
TIED = [
    pytest.param(3, 300, 9, id="across-blocks"),
    pytest.param(1, 2000, 40, id="most-are-equal"),
    pytest.param(2, 1500, 300, id="k-of-many"),
]


@needs_cpp
@pytest.mark.parametrize(("d", "L", "k"), TIED)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_cpp_takes_the_smaller_of_tied_latents(d, L, k, threads):
    g = torch.Generator().manual_seed(4)
    x, weight = integers((2, d, 9, 11), g, torch.float32), integers((L, d), g, torch.float32)
    x[0, :, 0, 0] = 0  # a patch whose latents are all tied
    bias = torch.zeros(L)
    bias[::7] = -0.0
    h = encoded(x, weight, bias).float()
    values, order = in_order(h, k)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = encode(x, weight, bias, k, "cpp")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got[0], values.relu()) and torch.equal(got[1], order)
    assert (h[..., :1] == h).all(dim=-1).any(), "no patch with equal latents only"


@needs_cpp
def test_cpp_answers_the_same_bits_for_any_threads_and_company():
    """A patch's answer does not depend on the patches beside it, the layout or the number of threads."""
    x, weight, bias = inputs(seed=6, H=9, W=11, d=130, L=1531)
    values, indices = encode(x, weight, bias, 17, "cpp")
    before = torch.get_num_threads()
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        try:
            others = {
                "all": encode(x, weight, bias, 17, "cpp"),
                "channels_last": encode(layouts(x)["channels_last"], weight, bias, 17, "cpp"),
            }
            alone = encode(x[1:, :, 4:5, 3:4], weight, bias, 17, "cpp")
        finally:
            torch.set_num_threads(before)
        for name, other in others.items():
            assert torch.equal(other[0], values) and torch.equal(other[1], indices), (name, threads)
        for got, wanted in zip(alone, (values, indices), strict=True):
            assert torch.equal(got[0, 0], wanted[1, 4 * 11 + 3]), threads


@needs_cpp
@pytest.mark.parametrize("k", [1, 4, 40, 150, 401])
def test_cpp_takes_nan_before_all_others(k):
    """As torch.topk does; infinities are ordinary values."""
    x, weight, bias = inputs(seed=7, H=5, W=7, L=401)
    x[0, 3, 2, 2] = NAN  # all latents of a patch
    bias[[5, 100, 399]] = NAN
    bias[[7, 300]] = INF
    bias[8:60] = -INF
    values, indices = encode(x, weight, bias, k, "cpp")
    h = encoded(x, weight, bias).float()
    expected = h.topk(k).values.relu()
    assert torch.equal(values.isnan(), expected.isnan()) and torch.equal(values.isinf(), expected.isinf())
    assert_close(*(v.nan_to_num(0, 0, 0) for v in (values, expected)), "encode_topk")
    assert torch.equal(indices[..., :5], in_order(h, k)[1][..., :5])
    assert torch.equal(indices[0, 2 * 7 + 2], torch.arange(k))
    if k == 401:
        assert (indices[1, :, -52:] == torch.arange(8, 60)).all()


@needs_cpp
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_older_processors(capability):
    """The same rows in a process that is held to an older instruction set."""
    chosen = "test_cpp_ or (cpp and (layout or ties or sliced))"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


@every_backend("cpp")
def test_nothing_of_size_n_by_l_is_held(backend):
    if DEVICE.type != "cpu":
        pytest.skip("counts the CPU allocator's memory")
    given = inputs(d=16, H=16, W=16, L=65536)
    peak = allocated_peak(lambda: ops.encode_topk(*given, 16, backend=backend))
    assert 0 < peak < 512 * 65536  # bytes: one byte for each of N x L would already be more


def test_no_channel():
    with pytest.raises(ValueError, match="x: expected d >= 1 channels, got 0"):
        ops.encode_topk(torch.zeros(1, 0, 2, 2), torch.zeros(4, 0), torch.zeros(4), 1)


@pytest.mark.parametrize("k", [0, 41])
def test_bad_k(k):
    with pytest.raises(ValueError, match=f"k: expected 1 <= k <= L = 40, got {k}"):
        ops.encode_topk(*inputs(), k)


def test_gradient_is_refused_not_dropped():
    x, weight, bias = inputs()
    with pytest.raises(RuntimeError, match="has no gradient"):
        ops.encode_topk(x, weight.requires_grad_(), bias, 2)


@backends
def test_opcheck_and_fullgraph(backend):
    needs_the_cpu(backend)
    arguments = (*(tensor.to(DEVICE) for tensor in inputs()), 3)
    with torch.inference_mode():
        torch.library.opcheck(torch.ops.lbdt.encode_topk.default, arguments, {"backend": backend})
        if backend == "cpp":
            out = torch.zeros(2, 15, 3), torch.zeros(2, 15, 3, dtype=torch.int64)
            torch.library.opcheck(torch.ops.lbdt.encode_topk_cpp.default, (*arguments, *out))
    compiled = torch.compile(
        lambda x: ops.encode_topk(x, *arguments[1:], backend=backend), fullgraph=True, backend="aot_eager"
    )
    expected = ops.encode_topk(*arguments, backend=backend)
    for got, wanted in zip(compiled(arguments[0]), expected, strict=True):
        assert torch.equal(got, wanted)
