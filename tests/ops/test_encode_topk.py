"""encode_topk against the whole encoder followed by torch.topk."""

import pytest
import torch

from lbdt import ops
from lbdt.testing import DTYPES, assert_close, integers, layouts
from tests.backends import DEVICE, every_backend

backends = every_backend("triton")


def inputs(seed=0, B=2, d=12, H=3, W=5, L=40, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    real = [torch.randn(shape, generator=g) for shape in ((B, d, H, W), (L, d), (L,))]
    return real[0].to(dtype), real[1].to(dtype), real[2]


def encoded(x, weight, bias):
    return x.double().flatten(2).transpose(1, 2) @ weight.double().t() + bias.double()


def encode(x, weight, bias, k, backend):
    """On the tested device, the answer on the CPU."""
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
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match="'triton' cannot serve .* needs float32, float16 or bfloat16"):
            check(sizes, k, dtype, backend)
    else:
        check(sizes, k, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "k"), LARGE_ROWS)
def test_large_sizes(sizes, k, dtype, poisoned):
    """Beyond the reference's blocks; too much for Triton's interpreter, which "auto" passes over."""
    check(sizes, k, dtype, None)


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
    x, weight, bias = (tensor.to(DEVICE) for tensor in inputs(seed=3))
    expected = ops.encode_topk(x, weight, bias, 3, backend=backend)
    weight, bias = torch.cat([weight] * 2, dim=1)[:, :12], torch.stack([bias] * 2, dim=1)[:, 0]
    for got, wanted in zip(ops.encode_topk(x, weight, bias, 3, backend=backend), expected, strict=True):
        assert torch.equal(got, wanted)


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
    arguments = (*(tensor.to(DEVICE) for tensor in inputs()), 3)
    with torch.inference_mode():
        torch.library.opcheck(torch.ops.lbdt.encode_topk.default, arguments, {"backend": backend})
    compiled = torch.compile(
        lambda x: ops.encode_topk(x, *arguments[1:], backend=backend), fullgraph=True, backend="aot_eager"
    )
    expected = ops.encode_topk(*arguments, backend=backend)
    for got, wanted in zip(compiled(arguments[0]), expected, strict=True):
        assert torch.equal(got, wanted)
