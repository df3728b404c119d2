"""replace_patches, reference and C++, against one Python loop over the patches."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lbdt import _build, ops
from lbdt.testing import DTYPES, assert_close, layouts
from tests import backends
from tests.backends import DEVICE, HAS_CPP, on_device
from tests.layouts import bits, misaligned

SOURCES = ("random", "nearest", "mean", "row")
every_backend = backends.every_backend("cpp")


def dilated(mask, H, W, padding):
    """Positions within Chebyshev distance `padding` of a position of `mask`, for one image."""
    marked = [divmod(p, W) for p in range(H * W) if mask[p]]
    near = [any(max(abs(p // W - y), abs(p % W - x)) <= padding for y, x in marked) for p in range(H * W)]
    return torch.tensor(near, dtype=torch.bool)


def literal(x, mask, u, height, width, padding=0, source="random", bank=None, avoid=None):
    """METHOD.md, 4.1, 4.2 and 4.4, patch by patch, in float64 on the CPU."""
    x, mask, u, bank, avoid = (None if t is None else t.cpu() for t in (x, mask, u, bank, avoid))
    flat = x.flatten(2).double()
    out, replaced = flat.clone(), torch.zeros_like(mask)
    for b in range(x.shape[0]):
        grown = dilated(mask[b], height, width, padding)
        free = (~grown).nonzero().flatten().tolist()
        if avoid is not None:
            free = [q for q in free if not avoid[b, q]] or free
        for p in grown.nonzero().flatten().tolist():
            if not free and bank is None:
                continue
            replaced[b, p] = True
            if not free:
                out[b, :, p] = bank[b, int(u[b, p] * bank.shape[1])].to(x.dtype).double()
            elif source == "random":
                out[b, :, p] = flat[b, :, free[int(u[b, p] * len(free))]]
            else:
                y, z = divmod(p, width)
                near = [q for q in free if q // width == y] if source == "row" else []
                order = sorted(near or free, key=lambda q: ((q // width - y) ** 2 + (q % width - z) ** 2, q))
                out[b, :, p] = flat[b][:, order[: 5 if source == "mean" else 1]].mean(1)
    return out.to(x.dtype).view_as(x).to(DEVICE), replaced.to(DEVICE)


def referenced(arguments):
    """The reference's answer, computed on the CPU."""
    given = {n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    return tuple(t.to(DEVICE) for t in ops.replace_patches(**given, backend="reference"))


def inputs(
    seed=0, B=2, d=6, H=5, W=7, rate=0.3, dtype=torch.float32, bank=0, padding=0, source="random", avoid=None
):
    """`avoid`: the share of patches that are no donors; None: the argument is left out."""
    g = torch.Generator().manual_seed(seed)
    given = {
        "x": torch.randn(B, d, H, W, generator=g).to(dtype),
        "mask": torch.rand(B, H * W, generator=g) < rate,
        "u": torch.rand(B, H * W, generator=g),
        "height": H,
        "width": W,
        "padding": padding,
        "source": source,
        "bank": torch.randn(B, bank, d, generator=g).to(dtype) if bank else None,
    }
    if avoid is not None:
        given["avoid"] = torch.rand(B, H * W, generator=g) < avoid
    return on_device(given)


def check(arguments, backend):
    out, replaced = ops.replace_patches(**arguments, backend=backend)
    expected, where = literal(**arguments)
    x = arguments["x"]
    assert out.dtype == x.dtype and torch.equal(replaced, where)
    if arguments["source"] == "mean":
        assert_close(out, expected, "replace_mean")
    else:
        assert torch.equal(bits(out), bits(expected))
    kept = ~where.unsqueeze(1).expand(-1, x.shape[1], -1)
    assert torch.equal(bits(out.flatten(2))[kept], bits(x.flatten(2))[kept])
    return out, replaced


ROWS = [
    pytest.param({}, id="plain"),
    pytest.param({"H": 4, "W": 4, "padding": 1}, id="square-padding-1"),
    pytest.param({"H": 13, "W": 3, "rate": 0.05, "padding": 2}, id="tall-padding-2"),
    pytest.param({"H": 1, "W": 9, "padding": 1}, id="one-row"),
    pytest.param({"H": 1, "W": 1, "rate": 2}, id="one-patch"),
    pytest.param({"H": 3, "W": 5, "rate": 0.1, "padding": 9}, id="padding-beyond-the-grid"),
    pytest.param({"rate": 0.0, "padding": 2}, id="empty-mask"),
    pytest.param({"rate": 2.0}, id="full-mask-unchanged"),
    pytest.param({"rate": 2.0, "bank": 3}, id="full-mask-bank"),
    pytest.param({"rate": 0.2, "bank": 3, "padding": 1}, id="bank-not-needed-by-all"),
    pytest.param({"rate": 0.93}, id="few-donors"),  # fewer than 5 for the mean
    pytest.param({"d": 1, "B": 1}, id="one-channel"),
    pytest.param({"d": 700, "B": 3, "H": 16, "W": 16}, id="several-tasks"),
    pytest.param({"H": 11, "W": 33, "rate": 0.02, "padding": 1}, id="rows-across-words"),
    pytest.param({"B": 1, "d": 2, "H": 19, "W": 32, "rate": 0.97}, id="few-donors-far-away"),
    pytest.param({"B": 0}, id="no-image"),
]


@every_backend
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("sizes", ROWS)
def test_equals_the_patch_by_patch_version(sizes, source, backend, poisoned):
    check(inputs(**sizes, source=source), backend)


def test_the_rows_stress_what_they_say():
    full = inputs(rate=2.0)
    assert full["mask"].all() and not literal(**full)[1].any()
    mixed = inputs(rate=0.2, bank=3, padding=1)
    grown = [dilated(mask, 5, 7, 1) for mask in mixed["mask"].cpu()]
    assert any(bool(g.any()) and not bool(g.all()) for g in grown)
    few = (~inputs(rate=0.93)["mask"]).sum(1)
    assert ((few > 0) & (few < 5)).any()
    # Fewer free patches than an eighth of all: found by a walk over the mask, not by growing rings.
    far = (~inputs(B=1, d=2, H=19, W=32, rate=0.97)["mask"]).sum()
    assert 5 < far and 19 + far <= 19 * 32 / 8


@every_backend
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype, source, backend):
    check(inputs(seed=1, dtype=dtype, padding=1, rate=0.1, source=source), backend)
    check(inputs(seed=2, dtype=dtype, rate=2.0, bank=4, source=source), backend)
    check(inputs(seed=3, dtype=dtype, rate=0.3, avoid=0.4, source=source), backend)


@every_backend
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("bank", "avoid"), [(0, None), (3, None), (0, 0.3)], ids=["no-bank", "bank", "avoid"]
)
def test_every_layout_in_place_and_functional(source, bank, avoid, backend):
    arguments = inputs(seed=4, H=5, W=6, rate=0.15, padding=1, source=source, bank=bank, avoid=avoid)
    arguments["mask"][1] = True
    expected, where = referenced(arguments)
    assert where.any() and not where.all()
    for name, x in layouts(arguments["x"]).items():
        before = bits(x).clone()
        out, replaced = ops.replace_patches(**{**arguments, "x": x}, backend=backend)
        assert torch.equal(bits(x), before), f"{name}: the functional op wrote to x"
        pointer = x.data_ptr()
        in_place = ops.replace_patches_(**{**arguments, "x": x}, backend=backend)
        assert x.data_ptr() == pointer
        assert torch.equal(replaced, where) and torch.equal(in_place, where), name
        for got in (out, x):
            assert torch.equal(bits(got.flatten(2)), bits(expected.flatten(2))), name
        if name == "sliced":
            around = x._base.clone()
            around[:, 1:-1, 1:, 2:-1] = float("nan")
            assert around.isnan().all(), "written outside of the slice"


@every_backend
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("bank", [0, 3], ids=["no-bank", "bank"])
def test_misaligned_layouts(bank, source, backend):
    arguments = inputs(seed=9, d=16, H=4, W=8, rate=0.2, source=source, bank=bank)
    arguments["mask"][1] = bool(bank)
    expected, where = referenced(arguments)
    for name, x in misaligned(arguments["x"]).items():
        out, replaced = ops.replace_patches(**{**arguments, "x": x}, backend=backend)
        in_place = ops.replace_patches_(**{**arguments, "x": x}, backend=backend)
        assert torch.equal(replaced, where) and torch.equal(in_place, where), name
        assert torch.equal(bits(out.flatten(2)), bits(expected.flatten(2))), name
        assert torch.equal(bits(x.flatten(2)), bits(expected.flatten(2))), name


@every_backend
def test_strided_mask_numbers_and_bank(backend):
    arguments = inputs(seed=5, rate=0.4, bank=3, avoid=0.5)
    arguments["mask"][0] = True
    expected = ops.replace_patches(**arguments, backend=backend)
    for name in ("mask", "u", "avoid"):
        arguments[name] = torch.stack([arguments[name]] * 2, dim=2)[:, :, 0]
    arguments["bank"] = arguments["bank"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(arguments[name].is_contiguous() for name in ("mask", "u", "bank", "avoid"))
    for got, wanted in zip(ops.replace_patches(**arguments, backend=backend), expected, strict=True):
        assert torch.equal(got, wanted)


@every_backend
def test_a_bank_of_another_dtype_is_rounded_to_that_of_x(backend):
    arguments = inputs(rate=2.0, dtype=torch.float16)
    arguments["bank"] = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    out, _ = check(arguments, backend)
    rows = arguments["bank"].half()
    assert all((out[1, :, y, x] == rows[1]).all(1).any() for y in range(5) for x in range(7))


@every_backend
@pytest.mark.parametrize("source", SOURCES)
def test_an_image_does_not_depend_on_the_batch_around_it(source, backend):
    arguments = inputs(seed=6, B=4, rate=0.2, padding=1, source=source, bank=2, avoid=0.4)
    arguments["mask"][2] = True
    arguments["avoid"][3] = True
    seeds = torch.tensor([11, 12, 13, 14], device=DEVICE)
    zero = torch.zeros_like(seeds)
    arguments["u"] = ops.patch_uniform(seeds, zero + 981, zero, 35)
    out, replaced = ops.replace_patches(**arguments, backend=backend)
    for order in ([0], [2], [3, 1], [2, 0, 3]):
        part = {**arguments, **{name: arguments[name][order] for name in ("x", "mask", "bank", "avoid")}}
        part["u"] = ops.patch_uniform(seeds[order], zero[order] + 981, zero[order], 35)
        got, where = ops.replace_patches(**part, backend=backend)
        assert torch.equal(bits(got), bits(out[order])) and torch.equal(where, replaced[order])


@every_backend
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 3),
    d=st.integers(1, 9),
    H=st.integers(1, 8),
    W=st.integers(1, 8),
    rate=st.floats(0, 1),
    padding=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    source=st.sampled_from(SOURCES),
    channels_last=st.booleans(),
)
def test_property_donors_lie_outside_the_mask_and_the_rest_is_untouched(
    backend, seed, B, d, H, W, rate, padding, dtype, source, channels_last
):
    """The masked patches are NaN in the input, so one that is read as donor would show."""
    arguments = inputs(seed, B, d, H, W, rate, dtype, padding=padding, source=source)
    x = arguments["x"]
    x[0, 0, 0, 0] = -0.0
    grown = torch.stack([dilated(mask, H, W, padding) for mask in arguments["mask"].cpu()]).to(DEVICE)
    x = x.flatten(2).masked_fill(grown.unsqueeze(1), float("nan")).view_as(x)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    out, replaced = ops.replace_patches(**{**arguments, "x": x}, backend=backend)
    served = grown & ~grown.all(1, keepdim=True)
    assert torch.equal(replaced, served)
    before, after = bits(x.flatten(2)), bits(out.flatten(2))
    for b in range(B):
        assert torch.equal(after[b][:, ~served[b]], before[b][:, ~served[b]])
        donors = {tuple(column.tolist()) for column in before[b][:, ~grown[b]].t()}
        for column, values in zip(
            after[b][:, served[b]].t(), out.flatten(2)[b][:, served[b]].t(), strict=True
        ):
            assert values.isfinite().all()
            assert source == "mean" or tuple(column.tolist()) in donors


@pytest.mark.skipif(not HAS_CPP, reason="no C++ compiler")
@given(
    seed=st.integers(0, 10**6),
    H=st.integers(1, 12),
    W=st.integers(1, 40),
    rate=st.floats(0, 1),
    padding=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    source=st.sampled_from(SOURCES),
    bank=st.integers(0, 3),
    avoid=st.none() | st.floats(0, 1),
)
def test_property_cpp_equals_the_reference_bit_for_bit(seed, H, W, rate, padding, dtype, source, bank, avoid):
    arguments = inputs(seed, 2, 5, H, W, rate, dtype, bank, padding, source, avoid)
    (out, replaced), (expected, where) = (
        ops.replace_patches(**arguments, backend="cpp"),
        referenced(arguments),
    )
    assert torch.equal(replaced, where) and torch.equal(bits(out), bits(expected))


BAD = [
    pytest.param({"x": torch.zeros(2, 6)}, ValueError, r"x: expected \[B, d, H, W\]", id="x-2d"),
    pytest.param({"x": torch.zeros(2, 6, 5, 7).int()}, TypeError, "x: expected dtype", id="x-int"),
    pytest.param({"height": 7, "width": 5}, ValueError, "height, width: .*7 x 5.*5, 7", id="transposed"),
    pytest.param({"height": 6}, ValueError, "height, width: .*got 6 x 7", id="grid"),
    pytest.param({"height": -5, "width": -7}, ValueError, "height, width", id="negative-grid"),
    pytest.param({"mask": torch.zeros(2, 34).bool()}, ValueError, "mask: ", id="mask-shape"),
    pytest.param({"mask": torch.zeros(2, 35)}, TypeError, "mask: expected dtype bool", id="mask-dtype"),
    pytest.param({"u": torch.zeros(1, 35)}, ValueError, "u: ", id="u-shape"),
    pytest.param({"u": torch.zeros(2, 35).double()}, TypeError, "u: expected dtype float32", id="u-dtype"),
    pytest.param(
        {"u": torch.zeros(2, 35, device="meta")}, ValueError, f"u: expected on {DEVICE.type}", id="u-device"
    ),
    pytest.param({"x": None}, TypeError, "x: expected a tensor, got None", id="x-none"),
    pytest.param({"mask": None}, TypeError, "mask: expected a tensor, got None", id="mask-none"),
    pytest.param({"u": torch.zeros(2, 35).to_sparse()}, TypeError, "u: expected a dense", id="u-sparse"),
    pytest.param({"bank": [1.0]}, RuntimeError, "bank", id="bank-list"),
    pytest.param({"padding": 2**63}, RuntimeError, "padding|Overflow", id="padding-beyond-int64"),
    pytest.param({"padding": -1}, ValueError, "padding: expected >= 0, got -1", id="padding"),
    pytest.param({"source": "far"}, ValueError, "source: expected one of random, nearest", id="source"),
    pytest.param({"bank": torch.zeros(2, 0, 6)}, ValueError, "bank: .*M >= 1", id="bank-empty"),
    pytest.param({"bank": torch.zeros(2, 3, 5)}, ValueError, "bank: ", id="bank-width"),
    pytest.param({"bank": torch.zeros(1, 3, 6)}, ValueError, "bank: ", id="bank-batch"),
    pytest.param({"bank": torch.zeros(2, 3, 6).int()}, TypeError, "bank: ", id="bank-dtype"),
    pytest.param(
        {"avoid": torch.zeros(1, 35).bool()}, ValueError, r"avoid: expected \[B, N\]", id="avoid-shape"
    ),
    pytest.param({"avoid": torch.zeros(2, 35)}, TypeError, "avoid: expected dtype bool", id="avoid-dtype"),
    pytest.param(
        {"avoid": torch.zeros(2, 35, device="meta").bool()},
        ValueError,
        "avoid: expected on",
        id="avoid-device",
    ),
]


@pytest.mark.parametrize("op", [ops.replace_patches, ops.replace_patches_], ids=["functional", "in-place"])
@every_backend
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change, error, message, backend, op):
    if "meta" not in {str(getattr(value, "device", None)) for value in change.values()}:
        change = on_device(change)
    with pytest.raises(error, match=message):
        op(**{**inputs(), **change}, backend=backend)


def test_memory_shared_by_elements_is_not_written_in_place():
    arguments = inputs(B=2)
    arguments["x"] = arguments["x"][:1].expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="x: elements share memory"):
        ops.replace_patches_(**arguments)
    check(arguments, "auto")


@pytest.mark.parametrize("name", ["x", "bank"])
def test_a_gradient_is_refused_in_place_not_dropped(name):
    arguments = inputs(bank=2)
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        ops.replace_patches_(**arguments)
    with torch.no_grad():
        ops.replace_patches_(**arguments)


@every_backend
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": torch.bfloat16, "source": "mean"},
        {"B": 0},
        {"bank": 2, "rate": 2.0, "padding": 1},
        {"source": "row", "avoid": 0.4},
    ],
    ids=str,
)
def test_opcheck(change, backend):
    arguments = tuple(inputs(**change).values())
    for op in (torch.ops.lbdt.replace_patches, torch.ops.lbdt.replace_patches_):
        torch.library.opcheck(op.default, arguments, {"backend": backend})


@every_backend
def test_fullgraph_in_place(backend):
    arguments = inputs(seed=8, padding=1, rate=0.1)
    expected, where = literal(**arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def replace(x):
        y = x * 1
        replaced = ops.replace_patches_(**{**arguments, "x": y}, backend=backend)
        return y, replaced

    out, replaced = replace(arguments["x"])
    assert torch.equal(out, expected) and torch.equal(replaced, where)


@pytest.mark.skipif(not HAS_CPP, reason="no C++ compiler")
def test_a_single_donor_keeps_its_bits_even_as_nan():
    for source, rate in (("random", 0.3), ("nearest", 0.3), ("mean", 2.0)):
        arguments = inputs(B=1, dtype=torch.float16, source=source, rate=rate)
        arguments["mask"][0, 17] = False
        odd = torch.tensor(
            [0x7E55, -0x8000, 0x7D01], dtype=torch.int16, device=DEVICE
        )  # NaNs with payloads, -0.0
        bits(arguments["x"])[0, :3] = odd[:, None, None]
        out, _ = ops.replace_patches(**arguments, backend="cpp")
        assert (bits(out)[0, :3] == odd[:, None, None]).all(), source


@pytest.mark.skipif(not HAS_CPP, reason="no C++ compiler")
def test_cpp_says_why_not():
    arguments = inputs()
    meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    reasons = ops.explain("replace_patches", **meta, backend="reference").reasons
    assert reasons["cpp"] == "needs a CPU tensor, got one on meta"
    missing = _build.missing("replace_patches_cpp", "cuda")
    assert missing is None or "built without CUDA: install nvcc and rebuild with LBDT_BUILD=1" in missing
    assert missing is None or DEVICE.type == "cpu"
