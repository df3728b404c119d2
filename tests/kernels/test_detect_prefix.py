"""Triton's detect_patches in the interpreter: what its first launch refutes and packs, and where the second goes on."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lbdt import ops
from lbdt.ops import _triton
from lbdt.testing import layouts
from tests.backends import DEVICE, HAS_TRITON
from tests.layouts import bits, integers, misaligned
from tests.ops import test_detect_patches as detection

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the ops' own tests run the compiled kernels"),
]
ROOT = Path(__file__).resolve().parents[2]
PREFIX = 24  # more than a tile of 16, less than two
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class First:
    """Stands for the second launch: keeps what the first left for it."""

    def __getitem__(self, grid):
        return self.keep

    def keep(self, packed, weight, bias, mask, total, value, survivors, *others, **constants) -> None:
        self.slots = int(total[0])
        self.packed, self.value = packed[: self.slots], value[: self.slots]
        self.owner, self.place, self.count = survivors[:3, : self.slots]


@pytest.fixture
def tiles(monkeypatch):
    """Tiles of 16, a prefix of 24 latents, and as many programs a block of patches as there are tiles of it."""
    module = _triton.kernels("detect_patches")
    common = importlib.import_module("lbdt.kernels._common")
    small = common.Config(16, 16, 16, 4, 2)
    count = importlib.import_module("lbdt.kernels._count").CountConfig(common.Config(32, 16, 16, 4, 2), small)
    monkeypatch.setattr(module, "candidates_config", lambda *_: small)
    monkeypatch.setattr(module, "count_config", lambda *_: count)
    monkeypatch.setattr(module, "prefix_rows", lambda *_: PREFIX)
    monkeypatch.setattr(module, "programs", lambda *_: 64)
    return module


def after_the_first(module, monkeypatch, arguments) -> tuple[First, torch.Tensor]:
    """What the first launch leaves, and its mask."""
    first = First()
    with monkeypatch.context() as patch:
        patch.setattr(module, "detect_patches_count_kernel", first)
        return first, ops.detect_patches(**arguments, backend="triton")


def larger(arguments, latents: slice) -> torch.Tensor:
    """#{ j != owner : h_j > m } of each patch among some latents, [B, N], and m."""
    h = detection.pre_activations(*(arguments.get(name) for name in ("x", "weight", "bias", "minus")))
    watched = h[..., arguments["latents"]]
    floor = arguments["thresholds"][arguments["timestep_bin"]].masked_fill(
        ~arguments["enabled"], detection.INF
    )
    largest, _ = watched.masked_fill(watched <= floor.unsqueeze(1), -detection.INF).max(dim=-1, keepdim=True)
    return (h[..., latents] > largest).sum(-1), largest.squeeze(-1)


def ranked(ahead, behind, tied, owner, total) -> dict:
    """Two kinds of patches. Of one kind `ahead` latents of the prefix and `behind` of the others exceed the watched
    latent `owner`, of the other kind the other way round; `tied` of each are as large as it."""
    weight = torch.zeros(total, 7)
    for channel, (early, late) in enumerate(((ahead, behind), (behind, ahead))):
        others = torch.tensor([j for j in range(total) if j != owner])
        inside, outside = others[others < PREFIX], others[others >= PREFIX]
        weight[:, channel], weight[owner, channel] = -1.0, 2.0
        weight[inside[:early], channel], weight[outside[:late], channel] = 3.0, 3.0
        weight[inside[early : early + tied], channel], weight[outside[late : late + tied], channel] = 2.0, 2.0
    kind = torch.arange(15) % 2
    x = torch.zeros(1, 7, 3, 5)
    x.view(7, 15)[kind, torch.arange(15)] = 1.0
    return {
        "x": x,
        "weight": weight,
        "bias": torch.zeros(total),
        "latents": torch.tensor([owner]),
        "thresholds": torch.zeros(1, 1),
        "timestep_bin": torch.zeros(1, dtype=torch.int64),
        "enabled": torch.ones(1, 1, dtype=torch.bool),
    }


RANKS = [
    pytest.param(4, 0, 0, 5, 70, id="all-in-the-prefix"),
    pytest.param(3, 1, 0, 5, 70, id="across-the-border"),
    pytest.param(2, 2, 3, 30, 70, id="owner-behind-the-prefix"),
    pytest.param(0, 4, 9, 23, 70, id="owner-last-of-the-prefix"),
    pytest.param(0, 4, 9, 24, 70, id="owner-first-behind-the-prefix"),
    pytest.param(3, 1, 2, 0, 25, id="one-latent-behind-the-prefix"),
    pytest.param(1, 3, 2, 40, 41, id="owner-last-of-the-dictionary"),
]


@pytest.mark.parametrize("k", [3, 4, 5, 6], ids=lambda k: f"k-{k}")
@pytest.mark.parametrize(("ahead", "behind", "tied", "owner", "total"), RANKS)
def test_the_prefix_refutes_exactly_those_that_reach_k_in_it(
    ahead, behind, tied, owner, total, k, tiles, monkeypatch
):
    behind = min(behind, total - PREFIX - (owner >= PREFIX))
    arguments = ranked(ahead, behind, tied, owner, total) | {"k": k}
    counts = torch.tensor([[ahead, min(behind, PREFIX)][patch % 2] for patch in range(15)])
    # In the second kind of patch the larger ones beyond the prefix may be fewer than asked for.
    beyond = torch.tensor([behind, min(ahead, total - PREFIX - (owner >= PREFIX))])[torch.arange(15) % 2]
    first, mask = after_the_first(tiles, monkeypatch, arguments)
    assert torch.equal(mask[0], counts < k)
    assert sorted(first.place.tolist()) == (counts < k).nonzero().flatten().tolist()
    assert torch.equal(first.count.long(), counts[first.place]) and (first.owner == owner).all()
    found = ops.detect_patches(**arguments, backend="triton")
    assert torch.equal(found[0], counts + beyond < k)
    assert torch.equal(found, detection.literal(**arguments))


@pytest.mark.parametrize("prefix", [0, 1, 16, 24, 89, 90, 1000], ids=lambda p: f"P-{p}")
@pytest.mark.parametrize("total", [17, 90], ids=lambda total: f"L-{total}")
def test_no_prefix_changes_the_answer(total, prefix, tiles, monkeypatch):
    monkeypatch.setattr(tiles, "prefix_rows", lambda *_: prefix)
    arguments = detection.inputs(seed=prefix % 3, H=7, W=9, L=total, k=5, threshold=-1e9)
    expected = detection.literal(**arguments)
    first, mask = after_the_first(tiles, monkeypatch, arguments)
    if prefix >= total:
        assert torch.equal(mask, expected) and not hasattr(first, "slots"), "a second launch without work"
    assert torch.equal(ops.detect_patches(**arguments, backend="triton"), expected)
    assert expected.any() and not expected.all()


@pytest.mark.parametrize("programs", [1, 5, 6, 100], ids=lambda n: f"{n}-programs")
def test_programs_that_share_a_block_of_patches_count_each_latent_once(programs, tiles, monkeypatch):
    monkeypatch.setattr(tiles, "programs", lambda *_: programs)
    monkeypatch.setattr(tiles, "prefix_rows", lambda *_: 70)
    arguments = detection.inputs(seed=2, H=5, W=5, L=90, k=40, threshold=-1e9)
    first, mask = after_the_first(tiles, monkeypatch, arguments)
    count, _ = larger(arguments, slice(0, 70))
    assert torch.equal(first.count.long(), count.flatten()[first.place]) and torch.equal(mask, count < 40)


def test_the_count_goes_on_from_the_prefix(tiles, monkeypatch):
    """With a k that none reaches no tile is spared, so all of the dictionary is counted, once."""
    arguments = detection.inputs(seed=3, H=7, W=9, L=90, k=90, threshold=-1e9)
    first, _ = after_the_first(tiles, monkeypatch, arguments)
    ahead, largest = larger(arguments, slice(0, PREFIX))
    assert first.slots == 126 and torch.equal(first.value, largest.flatten()[first.place])
    assert torch.equal(first.count.long(), ahead.flatten()[first.place])
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(empty(*a, **k)) or made[-1])
    assert ops.detect_patches(**arguments, backend="triton").all()
    _, place, count = next(tensor for tensor in made if tensor.dtype == torch.int32)[:3]
    whole, _ = larger(arguments, slice(None))
    assert torch.equal(count.long(), whole.flatten()[place])


def test_a_map_whose_candidates_are_all_refuted_in_the_prefix_leaves_nothing(tiles, monkeypatch):
    arguments = detection.inputs(seed=5, H=4, W=4, L=160, U=1, k=2, threshold=-1e9)
    arguments["latents"] = torch.tensor([159])
    arguments["bias"][:16] += 1000.0
    first, mask = after_the_first(tiles, monkeypatch, arguments)
    assert first.slots == 0 and not mask.any()


@pytest.mark.parametrize(
    "update", [None, "alike", "another-layout"], ids=["output", "update", "update-mixed"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_survivors_are_packed_as_they_are(dtype, update, tiles, monkeypatch):
    """Pure movement, so equal in every bit: real numbers, odd sizes, every layout."""
    generator = torch.Generator().manual_seed(4)
    x, minus = torch.randn(2, 2, 21, 3, 5, generator=generator).to(dtype)
    views = layouts(x) | misaligned(x)
    changes = {} if update is None else (layouts(minus) | misaligned(minus))
    for name, given in views.items():
        arguments = detection.inputs(seed=6, d=21, H=3, W=5, L=90, k=3, dtype=dtype, threshold=1.0)
        # Refuted and kept ones alternate, so slots and patches differ.
        arguments["bias"][:9] += torch.linspace(5, 20, 9)
        arguments["x"] = given
        if update is not None:
            arguments["minus"] = (
                changes[name] if update == "alike" else minus.to(memory_format=torch.channels_last)
            )
            if arguments["minus"].dim() != given.dim():
                arguments["minus"] = arguments["minus"].flatten(2)
        first, mask = after_the_first(tiles, monkeypatch, arguments)
        assert 0 < first.slots < 30, name
        assert sorted(first.place.tolist()) == mask.flatten().nonzero().flatten().tolist(), name
        columns = x.flatten(2).transpose(1, 2).flatten(0, 1)[first.place]
        parts = [columns]
        if update is not None:
            less = minus.flatten(2).transpose(1, 2).flatten(0, 1)[first.place]
            parts = [columns - less] if dtype == torch.float32 else [columns, less]
        parts = [torch.nn.functional.pad(part, (0, 32 - 21)) for part in parts]
        expected = torch.cat(parts[:1] + [-part for part in parts[1:]], dim=1)
        assert torch.equal(bits(first.packed), bits(expected)), name


@pytest.mark.parametrize("union", [1, 40, 128, 129, 300])
def test_columns_that_cannot_pass_are_left_out(union, tiles):
    """A union over bins and concepts: for each image some columns are finite at its bin, others are switched off."""
    arguments = detection.inputs(seed=7, B=4, L=300, U=union, T=5, k=40, threshold=4)
    generator = torch.Generator().manual_seed(8)
    arguments["thresholds"][torch.rand(5, union, generator=generator) < 0.6] = detection.INF
    arguments["enabled"] = torch.rand(4, union, generator=generator) < 0.7
    arguments["enabled"][1] = False
    arguments["timestep_bin"] = torch.tensor([0, 1, 2, 3])
    arguments["thresholds"][3] = detection.INF
    found = ops.detect_patches(**arguments, backend="triton")
    assert torch.equal(found, detection.literal(**arguments))
    assert not found[1].any() and not found[3].any() and (union == 1 or found.any())
    gate = {
        "owners": torch.randint(70, (union,), generator=generator),
        "least": torch.randint(1, 4, (5, 70), generator=generator),
        "gated": torch.zeros(4, dtype=torch.int64),
    }
    expected = ops.detect_patches(**arguments, **gate, backend="reference")
    taken = gate["gated"].clone()
    assert torch.equal(ops.detect_patches(**arguments, **gate, backend="triton"), expected)
    assert torch.equal(gate["gated"], taken)


def test_the_prefix_is_a_small_part_of_the_dictionary_and_longer_than_k():
    rows = _triton.kernels("detect_patches").prefix_rows
    assert rows(20480, 32) == 512 and rows(1536, 16) == 384
    assert rows(40, 4) == 10 and rows(40, 10) == 0 and rows(3, 1) == 0
    assert rows(20480, 600) == 0


@pytest.mark.parametrize("integer", [True, False], ids=["exact", "real"])
def test_more_survivors_than_the_smaller_tile_has(integer, tiles):
    """More than 16 take the larger tile, of 32; both must agree with the reference."""
    for patches in (3, 16, 17, 33):
        arguments = detection.inputs(seed=9, B=1, H=1, W=patches, d=37, L=123, k=60, threshold=-1e9)
        if integer:
            arguments["x"] = integers((1, 37, 1, patches), torch.Generator().manual_seed(1), torch.float16)
            arguments["weight"] = arguments["weight"].half()
        expected = ops.detect_patches(**arguments, backend="reference")
        assert torch.equal(ops.detect_patches(**arguments, backend="triton"), expected)
        assert expected.any()


SMALL_TILE = """
from lbdt.kernels import detect_patches
from lbdt.kernels._common import Config
from lbdt.kernels._count import CountConfig
from tests.kernels import compile_triton, launches
tile = Config({patches}, 64, 64, 4, 3)
detect_patches.count_config = lambda *_: CountConfig(tile, tile)
_, count = launches.record("detect_patches", 90, **compile_triton.CASES["detect_patches ones"]())[0]
launches.compile_launch(count, 90)
"""


@pytest.mark.parametrize("patches", [32, 64])
def test_a_tile_that_each_warp_would_decide_on_alone_does_not_compile(patches, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SMALL_TILE.format(patches=patches)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    refused = "a tile of at most 32 survivors is decided on by each warp alone" in done.stderr
    assert (done.returncode != 0 and refused) == (patches == 32), done.stderr[-2000:]
