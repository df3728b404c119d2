"""Triton's int8 screen in the interpreter: masks stay what they are without it, whichever way a patch is decided."""

import importlib
from typing import NamedTuple

import pytest
import torch

from lbdt import ops
from lbdt.int8_screen import Screen
from lbdt.ops import _triton
from tests.backends import DEVICE, HAS_TRITON
from tests.layouts import integers, misaligned
from tests.ops import test_detect_patches as detection
from tests.ops import test_erase_step as steps
from tests.test_int8_screen import arguments, normal

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU benchmarks.sanitize runs the compiled kernels"),
]
INF = float("inf")
PREFIX, FEW, MANY = 24, 16, 32


class Ways(NamedTuple):
    """How many survivors are decided by bounds, by pairs with single latents, and by tiles of all latents."""

    bounds: int
    pairs: int
    tiles: int


class Seen:
    """What `screen_survivors` was handed, and made of it."""

    def __init__(self, launch) -> None:
        self.launch, self.left = launch, None

    def __call__(self, left, screen, weight, bias, prefix, k, *others) -> None:
        self.left, self.k, self.prefix = left, k, prefix
        budget = importlib.import_module("lbdt.kernels._screen").BUDGET
        self.budget = int(budget * (weight.shape[0] - prefix))
        self.launch(left, screen, weight, bias, prefix, k, *others)

    @property
    def slots(self) -> int:
        return int(self.left.total[0])

    def exact(self) -> dict[int, int]:
        """What was counted exactly, by patch."""
        places, counts = self.left.places[1, : self.slots], self.left.states[2, : self.slots]
        return dict(zip(places.tolist(), counts.tolist(), strict=True))

    def ways(self) -> Ways | None:
        """None: too few survive to be screened. Asserts that what was to be counted exactly was, and nothing else."""
        if self.slots <= FEW:
            assert not self.left.states.any()
            return None
        certain, between, exact = self.left.states[:, : self.slots]
        ahead = self.left.places[2, : self.slots] + certain
        open = (ahead < self.k) & (ahead + between >= self.k)
        blocks = (between * open).split(MANY)
        dear = torch.cat([(block.sum() > self.budget).expand(len(block)) for block in blocks])
        assert not exact[~open].any()
        assert (exact[open & ~dear] <= between[open & ~dear]).all()
        return Ways(int((~open).sum()), int((open & ~dear).sum()), int((open & dear).sum()))


@pytest.fixture
def seen(monkeypatch) -> Seen:
    """Small tiles, and a prefix of 24 latents."""
    module = _triton.kernels("detect_patches")
    config = importlib.import_module("lbdt.kernels._common").Config
    count = importlib.import_module("lbdt.kernels._count").CountConfig
    screening = importlib.import_module("lbdt.kernels._screen")
    few = config(FEW, 64, 64, 4, 2)
    monkeypatch.setattr(module, "candidates_config", lambda *_: config(32, 32, 64, 4, 2))
    monkeypatch.setattr(module, "count_config", lambda *_: count(few._replace(block_p=MANY), few))
    monkeypatch.setattr(module, "prefix_rows", lambda *_: PREFIX)
    monkeypatch.setattr(screening, "LEAST_ROWS", 40)
    monkeypatch.setattr(screening, "unscreened", lambda rows: FEW)
    monkeypatch.setattr(screening, "screen_config", lambda *_: config(32, 64, 64, 4, 2))
    kept = Seen(module.screen_survivors)
    monkeypatch.setattr(module, "screen_survivors", kept)
    return kept


def masks(given, centre=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Without and with a screen."""
    if centre is None:
        centre = given["x"].float().flatten(2).mean((0, 2)).nan_to_num()
    screen = Screen.of(given["weight"], given["bias"], centre)._asdict()
    plain = ops.detect_patches(**given, backend="triton")
    return plain, ops.detect_patches(**given, **screen, backend="triton")


def far(given) -> torch.Tensor:
    """A centre from which the bounds decide nothing."""
    return torch.full((given["x"].shape[1],), 1e4)


ROWS = [
    pytest.param({"H": 5, "W": 9, "d": 37, "L": 301, "U": 40, "k": 60}, id="odd-d-and-L"),
    pytest.param({"B": 1, "H": 1, "W": 41, "L": 90, "U": 9, "k": 30}, id="one-row"),
    pytest.param({"B": 3, "H": 10, "W": 10, "d": 16, "L": 140, "U": 5, "k": 50}, id="300-patches"),
    pytest.param({"B": 4, "H": 5, "W": 7, "d": 130, "L": 190, "U": 1, "k": 25}, id="one-watched"),
    pytest.param({"H": 5, "W": 5, "d": 1, "L": 100, "k": 40}, id="d-1"),
    pytest.param({"H": 5, "W": 5, "L": 64, "U": 20, "k": 64}, id="k-all"),
]


KINDS = pytest.mark.parametrize(
    ("dtype", "update"),
    [(torch.float16, False), (torch.bfloat16, True)],
    ids=["half-output", "bfloat16-update"],
)


@KINDS
@pytest.mark.parametrize("sizes", ROWS)
def test_masks_are_those_without_a_screen(sizes, dtype, update, seen):
    given = arguments(dtype=dtype, update=update, threshold=-9.0, **sizes)
    plain, screened = masks(given)
    assert torch.equal(plain, screened) and seen.slots > FEW
    assert seen.ways().bounds > seen.slots / 2
    plain, screened = masks(given, far(given))
    assert torch.equal(plain, screened)


@KINDS
def test_a_survivor_is_decided_by_bounds_by_pairs_or_by_tiles(dtype, update, seen):
    """Small integers, so that sums are exact, ties are ties, and the reference is the truth."""
    given = detection.inputs(seed=3, dtype=dtype, B=1, H=8, W=9, L=400, U=3, d=64, k=90, threshold=-1e9)
    generator = torch.Generator().manual_seed(9)
    given["x"] = integers(given["x"].shape, generator, dtype)
    if update:
        given["minus"] = integers(given["x"].shape, generator, dtype)
    expected = ops.detect_patches(**given, backend="reference")
    assert expected.any() and not expected.all()
    _, screened = masks(given)
    near = seen.ways()
    assert torch.equal(screened, expected)
    assert near.bounds > 0 and near.pairs > 0 and near.tiles == 0
    assert seen.left.states[2].any(), "no pair was counted"
    _, screened = masks(given, far(given))
    away = seen.ways()
    assert torch.equal(screened, expected)
    assert away.tiles > seen.slots / 2 and away.pairs == 0
    assert seen.left.states[2].any(), "no tile was counted"
    # Few survive: what is not screened.
    given["k"] = 1
    given["bias"][given["latents"]] -= 50.0
    given["bias"][3] += 1e4 if 3 not in given["latents"] else 0.0
    plain, screened = masks(given)
    assert torch.equal(screened, ops.detect_patches(**given, backend="reference")) and seen.ways() is None
    assert torch.equal(plain, screened)


@KINDS
def test_rows_that_are_coded_in_several_parts(dtype, update, seen, monkeypatch):
    """As those of Flux are, of 3,072 channels."""
    monkeypatch.setattr(importlib.import_module("lbdt.kernels._screen"), "_CODED_D", 32)
    given = arguments(dtype=dtype, update=update, threshold=-9.0, H=5, W=9, L=301, U=20, k=60, d=67)
    plain, screened = masks(given)
    assert torch.equal(plain, screened) and seen.ways().bounds > seen.slots / 2


def test_one_block_of_survivors_takes_tiles_and_another_pairs(seen):
    """A channel that no latent reads leaves the codes of one image's patches no room for the others."""
    given = arguments(H=4, W=8, L=600, U=3, k=100, threshold=-INF, dtype=torch.float16)
    given["weight"][:, 0], given["x"][0, 0] = 0.0, 3e4
    plain, screened = masks(given, torch.zeros(130))
    found = seen.ways()
    assert torch.equal(plain, screened)
    assert found.tiles > 0 and found.pairs > 0 and found.bounds > 0


@pytest.mark.parametrize("programs", [1, 7, 64], ids=lambda n: f"{n}-programs")
def test_however_many_programs_share_a_block_each_pair_is_counted_once(programs, seen, monkeypatch):
    screening = importlib.import_module("lbdt.kernels._screen")
    monkeypatch.setattr(screening, "programs", lambda *_: programs)
    given = arguments(H=5, W=7, L=400, k=90, threshold=-9.0, dtype=torch.float16)
    plain, screened = masks(given)
    assert torch.equal(plain, screened) and seen.ways().pairs > 0
    counts = seen.exact()
    monkeypatch.setattr(screening, "programs", lambda *_: 2)
    masks(given)
    assert counts == seen.exact()


@pytest.mark.parametrize("update", [False, True], ids=["output", "update"])
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=str)
def test_what_is_certain_is_above_and_what_may_be_is_counted(scale, update, seen):
    """Against float64, of every survivor that bounds leave open or keep."""
    given = arguments(H=5, W=9, L=250, U=20, k=249, d=70, threshold=-INF, dtype=torch.float16, update=update)
    given["x"] *= scale
    _, screened = masks(given)
    assert screened.all() and seen.slots == screened.numel()
    owner, place, _ = seen.left.places[:3]
    rows = given["x"].double() - (given["minus"].double() if update else 0.0)
    rows = rows.flatten(2).transpose(1, 2).flatten(0, 1)[place]
    h = rows @ given["weight"].double().t() + given["bias"].double()
    above = (h > seen.left.value.double().unsqueeze(1)).scatter(1, owner.long().unsqueeze(1), False)
    above = above[:, PREFIX:].sum(1)
    certain, between, _ = seen.left.states
    assert (certain <= above).all() and (above <= certain + between).all()
    assert between.float().mean() < 0.1 * 250, "bounds that hold, as they tell nothing"


@pytest.mark.parametrize("value", [float("nan"), INF, -INF, 6e4, 1e-7, 0.0])
def test_values_at_the_ends_of_the_numbers(value, seen):
    given = arguments(H=6, W=7, L=150, U=20, k=40, threshold=-9.0, dtype=torch.float16)
    given["x"][0, :, 1, 2] = value
    given["x"][1, 4, :, 0] = value
    plain, screened = masks(given)
    assert torch.equal(plain, screened)
    given["weight"][60] = value
    given["weight"][70, 3] = value
    given["bias"][80] = value
    for centre in (None, far(given), torch.zeros(130)):
        plain, screened = masks(given, centre)
        assert torch.equal(plain, screened) and seen.slots > FEW


@pytest.mark.parametrize("offset", [1e19, 1e25, 3e38])
def test_lengths_without_a_bound_are_counted(offset, seen):
    given = arguments(H=6, W=7, L=150, U=20, k=40, threshold=-9.0, dtype=torch.bfloat16)
    given["x"][0, :, 2:4] *= offset
    given["weight"][90:93] *= offset
    plain, screened = masks(given, torch.zeros(130))
    assert torch.equal(plain, screened)


def test_ties_of_a_whole_dictionary(seen):
    given = arguments(H=8, W=9, L=200, U=3, k=2, threshold=-INF, dtype=torch.float16)
    given["weight"] = given["weight"][:1].expand(200, -1).contiguous()
    given["bias"] = torch.zeros(200)
    given["x"] = integers(given["x"].shape, torch.Generator().manual_seed(1), torch.float16)
    given["weight"] = (given["weight"] * 64).round()
    plain, screened = masks(given)
    assert screened.all() and torch.equal(plain, screened)
    assert seen.ways().tiles == seen.slots
    given["bias"][[150, 160, 199]] = 1.0
    plain, screened = masks(given)
    assert torch.equal(plain, screened) and not screened.any()


@pytest.mark.parametrize("layout", ["channels_last", "tokens", *misaligned(torch.zeros(1, 1, 2, 2))])
def test_maps_of_every_layout(layout, seen):
    given = arguments(H=5, W=9, L=150, k=40, threshold=-9.0, dtype=torch.float16, update=True)
    expected, _ = masks(given)
    for name in ("x", "minus"):
        forms = {
            "channels_last": given[name].to(memory_format=torch.channels_last),
            "tokens": given[name].flatten(2).transpose(1, 2).contiguous().transpose(1, 2),
        }
        given[name] = (forms | misaligned(given[name]))[layout]
    given["weight"] = given["weight"].t().contiguous().t()
    _, screened = masks(given)
    assert torch.equal(screened, expected) and 0 < int(screened.sum()) < screened.numel()


def test_with_a_gate_over_a_run_sums_and_counts_stay(seen):
    given = arguments(H=8, W=9, U=40, k=100, threshold=1.0, dtype=torch.float16)
    gate = {
        "owners": torch.arange(40) % 3,
        "least": torch.full((2, 3), 300),
        "deciding": torch.tensor([1, 1]),
    }
    screen = Screen.of(given["weight"], given["bias"], normal(130, seed=1))._asdict()
    found = []
    for more in ({}, screen):
        gated, so_far = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
        written = {"gated": gated, "so_far": so_far}
        mask = ops.detect_patches(**given, **gate, **written, **more, backend="triton")
        found.append((mask, gated, so_far))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][1].any() and seen.slots > FEW


@pytest.mark.parametrize("known", [False, True], ids=["plain", "known-latents"])
def test_a_step_hands_the_screen_on(known, seen):
    given = steps.inputs(B=4, H=5, W=6, L=90, U=9, k=30, dtype=torch.float16, threshold=-50.0, C_kept=400)
    if known:
        given |= {"known_latents": torch.tensor([3, 4]), "known_thresholds": torch.full((3, 2), 5.0)}
    screen = Screen.of(given["weight"], given["bias"], torch.zeros(12))._asdict()
    found = []
    for more in ({}, screen):
        written = {name: given[name].clone() for name in ("rows", "cells", "written")}
        out = ops.erase_step(**given | written | more, backend="triton")
        found.append((out, *written.values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert seen.left is not None and not torch.equal(found[0][0], given["x"])


def test_from_which_rows_and_survivors_on_there_is_a_screen():
    screening = importlib.import_module("lbdt.kernels._screen")
    assert screening.LEAST_ROWS == 1024
    assert [screening.unscreened(rows) for rows in (1024, 2048, 4096, 4097)] == [256, 512, 1024, 1024]


UNSCREENED = [
    pytest.param({"dtype": torch.float32}, id="float32"),
    pytest.param({"k": 0}, id="no-rank-test"),
    pytest.param({"H": 2, "W": 4}, id="few-patches"),
    pytest.param({"L": 63}, id="less-than-a-tile-of-latents"),
]


@pytest.mark.parametrize("changes", UNSCREENED)
def test_what_a_screen_does_not_serve_goes_without(changes, seen):
    given = arguments(**{"H": 8, "W": 9, "L": 150, "dtype": torch.float16, "threshold": -9.0} | changes)
    plain, screened = masks(given)
    assert torch.equal(plain, screened) and seen.left is None
