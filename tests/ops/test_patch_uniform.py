"""patch_uniform: Random123's own vectors, and independence of the batch."""

import math

import pytest
import torch

from lbdt import ops
from lbdt.reference.patch_uniform import philox4x32
from lbdt.testing import DTYPES
from tests import backends
from tests.backends import DEVICE, on_device

every_backend = backends.every_backend("cpp", "triton")

F = 0xFFFFFFFF
# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN = [
    pytest.param((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), id="zeros"),
    pytest.param((F,) * 4, (F, F), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD), id="ones"),
    pytest.param(
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        id="pi",
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(word) for word in words) == answer


def uniform(seeds, timesteps, halves, patches, backend):
    """The op on DEVICE, its answer on the CPU."""
    given = on_device({"seeds": seeds, "timesteps": timesteps, "halves": halves, "patches": patches})
    u = ops.patch_uniform(**given, backend=backend)
    assert u.device.type == DEVICE.type and u.dtype == torch.float32 and u.shape == (len(seeds), patches)
    return u.cpu()


@every_backend
def test_the_words_go_where_the_docstring_says(backend):
    u = uniform(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), 1, backend)
    assert u.item() == (0x6627E8D5 >> 8) * 2.0**-24
    seed, time, half, patch = (5 << 32) | 7, 981, 1, 3
    word = philox4x32(
        tuple(torch.tensor([c]) for c in (patch, time, half, 0)), (torch.tensor([7]), torch.tensor([5]))
    )
    u = uniform(torch.tensor([seed]), torch.tensor([time]), torch.tensor([half]), 4, backend)
    assert u[0, 3].item() == (int(word[0]) >> 8) * 2.0**-24


@every_backend
def test_same_in_any_batch(backend):
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345678901])
    times, halves = torch.tensor([999, 0, 1, 500, 999, 7]), torch.tensor([0, 1, 0, 1, 1, 0])
    together = uniform(seeds, times, halves, 64, backend)
    for row in range(6):
        part = slice(row, row + 1)
        assert torch.equal(uniform(seeds[part], times[part], halves[part], 64, backend)[0], together[row])
    order = torch.tensor([3, 1, 0])
    assert torch.equal(uniform(seeds[order], times[order], halves[order], 64, backend), together[order])
    assert torch.equal(uniform(seeds, times, halves, 9, backend), together[:, :9])
    assert together.unique().numel() > 0.99 * together.numel()


# Expected from the reference on the CPU, which test_known_answers ties to Random123.
ROWS = [
    pytest.param([0, 1], [999, 0], [0, 1], 256, id="plain"),
    pytest.param([2**63 - 1, -(2**63), -1, 1 << 32], [5, 6, 7, 8], [0, 1, 0, 1], 33, id="huge-seeds-odd"),
    pytest.param([3, 3, 3], [-1, -981, -(2**31)], [0, 0, 0], 5, id="negative-timesteps"),
    pytest.param([4, 4, 4, 4], [0.25, 981.999, -0.5, -3.0], [1, 1, 1, 1], 7, id="fractions"),
    pytest.param([5, 6], [1, 2], [0, 1], 0, id="no-patch"),
    pytest.param([], [], [], 4, id="no-image"),
    pytest.param([7] * 8, list(range(8)), [0, 1] * 4, 1025, id="several-tasks"),
]


@every_backend
@pytest.mark.parametrize(("seeds", "timesteps", "halves", "patches"), ROWS)
def test_equals_the_reference(seeds, timesteps, halves, patches, backend, poisoned):
    seeds, halves = (torch.tensor(values, dtype=torch.int64) for values in (seeds, halves))
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    if all(time == int(time) for time in timesteps):
        kinds += [torch.int64, torch.int32]
    for dtype in kinds:
        times = torch.tensor(timesteps, dtype=torch.float64).to(dtype)
        expected = ops.patch_uniform(seeds, times, halves, patches, backend="reference")
        if not times.is_floating_point() or times.isfinite().all():  # -(2**31) is no float16
            assert torch.equal(uniform(seeds, times, halves, patches, backend), expected), dtype


@every_backend
def test_strided_and_expanded_arguments(backend):
    seeds, times = torch.arange(12).view(6, 2)[:, 1], torch.tensor([981.5]).expand(6)
    halves = torch.arange(12).view(6, 2)[:, 0]
    assert not seeds.is_contiguous() and not halves.is_contiguous() and times.stride() == (0,)
    dense = (t.clone(memory_format=torch.contiguous_format) for t in (seeds, times, halves))
    expected = ops.patch_uniform(*dense, 9, backend="reference")
    assert torch.equal(uniform(seeds, times, halves, 9, backend), expected)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64], ids=str)
def test_timesteps_are_floored(dtype, backend):
    one = torch.tensor([1])
    expected = uniform(one, torch.tensor([981]), one, 8, backend)
    assert torch.equal(uniform(one, torch.tensor([981.75]).to(dtype), one, 8, backend), expected)


@every_backend
def test_range_and_mean(backend):
    u = uniform(torch.arange(64), torch.arange(64), torch.zeros(64, dtype=torch.int64), 1024, backend)
    assert 0 <= u.min() and u.max() < 1
    deviation = (1 / 12 / u.numel()) ** 0.5
    assert abs(u.mean().item() - 0.5) < 4 * deviation
    neighbours = torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1]
    assert abs(neighbours.item()) < 4 * u.numel() ** -0.5


BAD = [
    pytest.param({"seeds": torch.tensor([1.0])}, TypeError, "seeds: expected dtype int64", id="float-seeds"),
    pytest.param({"seeds": torch.tensor(1)}, ValueError, r"seeds: expected \[B\]", id="scalar-seed"),
    pytest.param({"halves": torch.tensor([0, 1])}, ValueError, "halves", id="two-halves-for-one-seed"),
    pytest.param({"patches": -1}, ValueError, "patches", id="negative-patches"),
]


@every_backend
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change, error, message, backend):
    one = torch.tensor([1])
    with pytest.raises(error, match=message):
        given = {"seeds": one, "timesteps": one, "halves": one, "patches": 4} | change
        ops.patch_uniform(**on_device(given), backend=backend)


@every_backend
def test_opcheck_and_fullgraph(backend):
    seeds, times, halves = torch.tensor([3, 4]), torch.tensor([900.5, 1.0]), torch.tensor([0, 1])
    arguments = (seeds.to(DEVICE), times.to(DEVICE), halves.to(DEVICE), 6)
    torch.library.opcheck(torch.ops.lbdt.patch_uniform.default, arguments, {"backend": backend})
    compiled = torch.compile(
        lambda s: ops.patch_uniform(s, *arguments[1:], backend=backend), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(arguments[0]), ops.patch_uniform(*arguments, backend=backend))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_timestep_that_is_no_int64_counts_as_0(dtype, backend):
    odd = torch.tensor(
        [math.nan, math.inf, -math.inf, 2.0**63, -(2.0**63), 1e300, -1e300], dtype=torch.float64
    )
    times = odd.to(dtype).to(DEVICE)
    seeds, halves = torch.full((7,), 5, device=DEVICE), torch.zeros(7, dtype=torch.int64, device=DEVICE)
    out = ops.patch_uniform(seeds, times, halves, 35, backend=backend)
    assert torch.equal(
        out, ops.patch_uniform(seeds, torch.zeros_like(times), halves, 35, backend="reference")
    )
