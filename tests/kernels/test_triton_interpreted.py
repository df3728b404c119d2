"""What only the Triton kernels can get wrong, in the interpreter: tiles, lists, keys, memory around the outputs."""

import importlib

import pytest
import torch

from lbdt import ops
from lbdt.ops import _triton
from tests.backends import DEVICE, HAS_TRITON
from tests.ops import test_detect_patches as detection
from tests.ops import test_encode_topk as encoding

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the ops' own tests run the compiled kernels"),
]
CANARY = 77

if HAS_TRITON:
    import triton
    import triton.language as tl

    from lbdt.kernels.encode_topk import key_latent, key_value, to_key

    @triton.jit
    def keys_there_and_back(values, keys, again, latents, SIZE: tl.constexpr):
        place = tl.arange(0, SIZE)
        key = to_key(tl.load(values + place), place)
        tl.store(keys + place, key)
        tl.store(again + place, key_value(key))
        tl.store(latents + place, key_latent(key))

    @triton.jit
    def _either(a, b):
        return a | b

    @triton.jit
    def _larger(a, a_place, b, b_place):
        return tl.where(a < b, b, a), tl.where(a < b, b_place, a_place)

    @triton.jit
    def folds(values, either, largest, places, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr):
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        value = tl.load(values + row * COLUMNS + column)
        left = tl.arange(0, COLUMNS if AXIS == 0 else ROWS)
        tl.store(either + left, tl.reduce(value, AXIS, _either))
        most, place = tl.reduce((value, row * COLUMNS + column), AXIS, _larger)
        tl.store(largest + left, most)
        tl.store(places + left, place)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 everywhere, so that small inputs make many of them."""
    common = importlib.import_module("lbdt.kernels._common")
    small = common.Config(16, 16, 16, 4, 2)
    detection = _triton.kernels("detect_patches")
    few = importlib.import_module("lbdt.kernels._count").CountConfig(common.Config(32, 16, 16, 4, 2), small)
    monkeypatch.setattr(detection, "candidates_config", lambda *arguments: small)
    monkeypatch.setattr(detection, "count_config", lambda *arguments: few)
    monkeypatch.setattr(detection, "prefix_rows", lambda *arguments: 24)  # more than a tile, less than two
    monkeypatch.setattr(_triton.kernels("encode_topk"), "part_config", lambda *arguments: small)


@pytest.fixture
def fenced(monkeypatch):
    """Every tensor that a launcher makes lies between canaries; the list of the buffers."""
    buffers = []

    def fence(original):
        def make(*shape, dtype, device):
            tensor = original(*shape, dtype=dtype, device=device)
            size, pad = tensor.numel(), 64
            buffer = torch.full((size + 2 * pad,), CANARY, device=device).to(dtype)
            buffers.append((buffer, pad))
            inner = buffer[pad : pad + size].view(tensor.shape)
            inner.copy_(tensor)
            return inner

        return make

    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, fence(getattr(torch, name)))
    return buffers


def intact(buffers) -> bool:
    canary = [torch.full((1,), CANARY).to(buffer.dtype) for buffer, _ in buffers]
    edges = [torch.cat([buffer[:pad], buffer[-pad:]]) for buffer, pad in buffers]
    return bool(buffers) and all(bool((e == c).all()) for e, c in zip(edges, canary, strict=True))


SIZES = [
    pytest.param({"H": 7, "W": 9, "L": 90, "U": 20, "d": 40, "k": 5}, id="many-tiles"),
    pytest.param({"H": 7, "W": 9, "L": 90, "U": 20, "d": 40, "k": 5, "threshold": -1e9}, id="all-candidates"),
    pytest.param({"H": 5, "W": 9, "L": 70, "U": 3, "k": 60, "threshold": -1e9}, id="late-refusals"),
    pytest.param({"H": 9, "W": 7, "L": 33, "U": 17, "k": 0}, id="no-rank-test"),
    pytest.param({"B": 3, "H": 3, "W": 3, "L": 17, "U": 1, "d": 5, "k": 1}, id="last-tile-of-one"),
]


@pytest.mark.parametrize("update", [False, True], ids=["output", "update"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_many_tiles_detect_what_the_literal_version_does(sizes, dtype, update, small_tiles, fenced):
    arguments = detection.inputs(seed=3, dtype=dtype, **sizes)
    if update:
        generator = torch.Generator().manual_seed(9)
        arguments["minus"] = detection.integers(tuple(arguments["x"].shape), generator, dtype)
    expected = detection.literal(**arguments)
    fenced.clear()
    mask = ops.detect_patches(**arguments, backend="triton")
    assert torch.equal(mask, expected) and intact(fenced)
    scratch = sum(b.numel() * b.element_size() for b, _ in fenced)
    copies = 2 if update and dtype != torch.float32 else 1
    room = -(-arguments["x"].shape[1] // 16) * 16 * dtype.itemsize * copies
    # Behind the columns 16 bytes a patch, its byte of the mask, and 4 a program that counts on it; fences around each.
    assert scratch <= (room + 16 + 1 + 8) * mask.numel() + 4 * (1 + mask.numel()) + 8 * 6 * 128, "scratch"


def test_channels_last_and_gathered_loads_agree(small_tiles):
    arguments = detection.inputs(seed=4, H=5, W=7, L=90, d=40, threshold=-1e9)
    x = arguments["x"]
    last = x.to(memory_format=torch.channels_last)
    mixed = torch.randn_like(x).round().to(memory_format=torch.channels_last)
    for minus in (None, mixed):
        expected = detection.literal(**arguments, minus=minus)
        for given in (x, last):
            got = ops.detect_patches(**{**arguments, "x": given}, minus=minus, backend="triton")
            assert torch.equal(got, expected)


def test_tiles_whose_candidates_are_refuted_are_not_computed(small_tiles, monkeypatch):
    """All patches are candidates and none is among the first k: the first tile of latents refutes them."""
    arguments = detection.inputs(seed=5, H=4, W=4, L=160, U=1, k=2, threshold=-1e9)
    arguments["latents"] = torch.tensor([159])
    arguments["bias"][:16] += 1000.0
    module = _triton.kernels("detect_patches")
    monkeypatch.setattr(module, "prefix_rows", lambda *_: 0)
    monkeypatch.setattr(module, "programs", lambda *_: 1)  # one after the other, as in waves on a GPU
    assert not ops.detect_patches(**arguments, backend="triton").any()
    # Past the first tile the encoder is not read: what stands there cannot change the answer.
    arguments["weight"][16:159] = float("nan")
    counted = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: counted.append(empty(*a, **k)) or counted[-1])
    assert not ops.detect_patches(**arguments, backend="triton").any()
    count = next(tensor for tensor in counted if tensor.dtype == torch.int32)[2]
    assert (count == 16).all(), "a later tile was counted too"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "k"),
    [
        pytest.param({"L": 90, "d": 40, "H": 7, "W": 9}, 5, id="many-tiles"),
        pytest.param({"L": 45, "d": 5, "H": 1, "W": 17}, 20, id="k-beyond-a-tile"),
        pytest.param({"L": 17, "d": 16, "H": 3, "W": 5}, 17, id="k-all"),
    ],
)
def test_many_tiles_encode_what_the_reference_does(sizes, k, dtype, small_tiles, fenced):
    arguments = encoding.inputs(seed=6, **sizes, dtype=dtype)
    expected, where = ops.encode_topk(*arguments, k, backend="reference")
    fenced.clear()
    values, indices = ops.encode_topk(*arguments, k, backend="triton")
    encoding.assert_close(values, expected, "encode_topk")
    assert torch.equal(indices, where) and intact(fenced)


def test_slices_of_fewer_latents_than_are_kept(small_tiles):
    """One tile of patches, so the dictionary is cut into slices: of 32 latents each, and 60 are kept."""
    arguments = encoding.inputs(seed=8, B=1, H=1, W=2, L=90)
    expected, where = ops.encode_topk(*arguments, 60, backend="reference")
    values, indices = ops.encode_topk(*arguments, 60, backend="triton")
    encoding.assert_close(values, expected, "encode_topk")
    assert torch.equal(indices, where)


def test_no_number_is_the_largest_of_either_sign(small_tiles):
    x, weight, bias = encoding.inputs(seed=9, B=1, H=1, W=3)
    bias[5], bias[20] = float("nan"), -torch.tensor(float("nan"))
    expected, where = ops.encode_topk(x, weight, bias, 4, backend="reference")
    values, indices = ops.encode_topk(x, weight, bias, 4, backend="triton")
    assert torch.equal(values.isnan(), expected.isnan()) and values[..., :2].isnan().all()
    encoding.assert_close(values[..., 2:], expected[..., 2:], "encode_topk")
    assert torch.equal(indices[..., 2:], where[..., 2:])
    assert (indices[..., :2].sort(dim=-1).values == torch.tensor([5, 20])).all()


def test_a_strided_bias_of_double_precision():
    x, weight, bias = encoding.inputs(seed=10)
    expected = ops.encode_topk(x, weight, bias, 3, backend="triton")
    strided = torch.stack([bias.double()] * 2, dim=1)[:, 0]
    for got, wanted in zip(ops.encode_topk(x, weight, strided, 3, backend="triton"), expected, strict=True):
        assert torch.equal(got, wanted)


def test_tied_latents_go_by_index():
    weight = torch.ones(50, 4)
    _, indices = ops.encode_topk(torch.ones(1, 4, 2, 2), weight, torch.zeros(50), 7, backend="triton")
    assert torch.equal(indices, torch.arange(7).expand(1, 4, 7))


def test_keys_order_like_their_values():
    inf, tiny = float("inf"), 1e-45
    values = torch.tensor(
        [-inf, -3e38, -2.5, -1e-38, -tiny, -0.0, 0.0, tiny, 1e-38, 1.0, 1.5, 3e38, inf, inf, inf, inf]
    )
    keys, latents = torch.empty(16, dtype=torch.int64), torch.empty(16, dtype=torch.int64)
    again = torch.empty(16)
    keys_there_and_back[(1,)](values, keys, again, latents, SIZE=16)
    assert torch.equal(again, values) and torch.equal(latents, torch.arange(16))
    assert (keys[1:13] > keys[:12]).all(), "larger value, larger key"
    assert (keys[13:] < keys[12:-1]).all(), "of tied ones the first is the largest"


def test_positions_outside_of_the_dictionary_or_the_bins_count_as_not_selected(small_tiles):
    """On a GPU nothing looks at them first: called as there, past the wrapper."""
    given = detection.inputs(B=3, L=40, U=4, threshold=-1e9, k=0)
    run = _triton.kernels("detect_patches").detect_patches
    given["latents"][:2] = torch.tensor([-1, 40])
    given["timestep_bin"] = torch.tensor([0, 10**9, -(10**9)])
    found = run(**given)
    given["latents"][:2], given["enabled"][:, :2] = 0, False
    given["timestep_bin"], given["enabled"][1:] = torch.zeros(3, dtype=torch.int64), False
    assert torch.equal(found, ops.detect_patches(**given, backend="reference"))
    assert found[0].any() and not found[1:].any()


def test_more_latents_than_fit_are_refused():
    x, weight, bias = encoding.inputs(L=300)
    with pytest.raises(ValueError, match="keeps at most 256 latents a patch, got k = 257"):
        ops.encode_topk(x, weight, bias, 257, backend="triton")
    assert ops.explain("encode_topk", x, weight, bias, 3).backend != "triton"


def test_tf32_is_used_only_where_torch_allows_it():
    common = importlib.import_module("lbdt.kernels._common")
    assert common.precision(torch.float32) == "ieee"
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert common.precision(torch.float32) == "tf32" and common.precision(torch.float16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert common.precision(torch.float32) == "ieee"


@pytest.mark.parametrize("quick", [True, False], ids=["by-slices", "by-elements"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_reduction_by_a_function_folds_in_order(monkeypatch, axis, quick):
    """What `tests.interpreter` puts in the place of Triton's own does the same."""
    from triton.runtime.interpreter import ReduceOps

    if not quick:
        monkeypatch.setattr(ReduceOps, "generic_reduce", ReduceOps.generic_reduce.__wrapped__)
    values = torch.randint(9, (8, 4), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    either, largest, places = (torch.empty(values.shape[1 - axis], dtype=torch.int32) for _ in range(3))
    folds[(1,)](values, either, largest, places, ROWS=8, COLUMNS=4, AXIS=axis)
    expected = values.select(axis, 0)
    for place in range(1, values.shape[axis]):
        expected = expected | values.select(axis, place)
    assert torch.equal(either, expected) and torch.equal(largest, values.amax(axis))
    assert torch.equal(places % 4 if axis else places // 4, values.argmax(axis).int())
