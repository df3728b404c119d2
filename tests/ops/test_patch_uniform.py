"""patch_uniform: Random123's own vectors, and independence of the batch."""

import pytest
import torch

from lbdt import ops
from lbdt.reference.patch_uniform import philox4x32

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


def test_the_words_go_where_the_docstring_says():
    u = ops.patch_uniform(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), 1)
    assert u.item() == (0x6627E8D5 >> 8) * 2.0**-24
    seed, time, half, patch = (5 << 32) | 7, 981, 1, 3
    word = philox4x32(
        tuple(torch.tensor([c]) for c in (patch, time, half, 0)), (torch.tensor([7]), torch.tensor([5]))
    )
    u = ops.patch_uniform(torch.tensor([seed]), torch.tensor([time]), torch.tensor([half]), 4)
    assert u[0, 3].item() == (int(word[0]) >> 8) * 2.0**-24


def test_same_in_any_batch():
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345678901])
    times, halves = torch.tensor([999, 0, 1, 500, 999, 7]), torch.tensor([0, 1, 0, 1, 1, 0])
    together = ops.patch_uniform(seeds, times, halves, 64)
    for row in range(6):
        part = slice(row, row + 1)
        assert torch.equal(ops.patch_uniform(seeds[part], times[part], halves[part], 64)[0], together[row])
    order = torch.tensor([3, 1, 0])
    assert torch.equal(ops.patch_uniform(seeds[order], times[order], halves[order], 64), together[order])
    assert torch.equal(ops.patch_uniform(seeds, times, halves, 9), together[:, :9])
    assert together.unique().numel() > 0.99 * together.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64], ids=str)
def test_timesteps_are_floored(dtype):
    one = torch.tensor([1])
    expected = ops.patch_uniform(one, torch.tensor([981]), one, 8)
    given = torch.tensor([981.75]).to(dtype)
    assert torch.equal(ops.patch_uniform(one, given, one, 8), expected)


def test_range_and_mean():
    u = ops.patch_uniform(torch.arange(64), torch.arange(64), torch.zeros(64, dtype=torch.int64), 1024)
    assert u.dtype == torch.float32 and u.shape == (64, 1024)
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


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change, error, message):
    one = torch.tensor([1])
    with pytest.raises(error, match=message):
        ops.patch_uniform(**({"seeds": one, "timesteps": one, "halves": one, "patches": 4} | change))


def test_opcheck_and_fullgraph():
    arguments = (torch.tensor([3, 4]), torch.tensor([900.5, 1.0]), torch.tensor([0, 1]), 6)
    torch.library.opcheck(torch.ops.lbdt.patch_uniform.default, arguments)
    compiled = torch.compile(
        lambda s: ops.patch_uniform(s, *arguments[1:]), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(arguments[0]), ops.patch_uniform(*arguments))
