"""The int8 screen's AMX code in an emulation of the tile instructions (emulate_amx.h), and on a processor's own tiles.

All sums are of integers, so whatever multiplies them gives the same bits: plain loops, VNNI, AMX. Tiles alone run
everywhere; the bounds after them are AVX-512, and are compared where the machine has it.
"""

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lbdt import _build

HERE = Path(__file__).parent
COMPILER = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "")
KINDS = ("plain", "avx512_vnni", "avx_vnni", "amx_int8")
LANES, BOUNDS, INF, NAN = 32, 6, float("inf"), float("nan")
pytestmark = pytest.mark.skipif(
    not COMPILER or platform.machine() != "x86_64" or platform.system() != "Linux",
    reason="needs a C++ compiler on x86-64 Linux",
)


class Blocks:
    """The functions of screen_blocks.cpp, on tensors; what they throw is a RuntimeError."""

    def __init__(self, library: Path):
        self.library, self._c = library, ctypes.CDLL(str(library))
        for name in ("compare", "products", "chosen", "set_config"):
            if hasattr(self._c, name):
                getattr(self._c, name).restype = ctypes.c_char_p
        if hasattr(self._c, "executed"):
            self._c.executed.restype = ctypes.c_int64
        self.kinds = [kind for kind in KINDS if self._c.runs(kind.encode())]

    def compare(self, kind, codes, panel, bounds, patches, first=0, gap=0):
        """Counts [3, LANES] and bits [count, 3] of codes [count, 4 w] int8 and panel [w, lanes] int32 (uint8 each)."""
        count, (words, lanes) = len(codes), panel.shape
        counts, bits = torch.zeros(3, LANES, dtype=torch.int32), torch.full((count, 3), -1, dtype=torch.int32)
        sizes = map(ctypes.c_int64, (gap, count))
        self._checked(
            *("compare", kind.encode(), at(codes), *sizes, at(panel), ctypes.c_int64(words)),
            *(ctypes.c_int64(lanes), at(bounds), at(patches), first, at(counts), at(bits)),
        )
        return counts, bits

    def products(self, codes, panel, gap=0):
        """Sums [count, lanes] of the tiles, and whether they say that nothing was lost."""
        count, (words, lanes) = len(codes), panel.shape
        sums, whole = torch.full((count, lanes), -1, dtype=torch.int32), ctypes.c_int(-1)
        sizes = map(ctypes.c_int64, (gap, count // 16))
        self._checked(
            *("products", at(codes), *sizes, at(panel), ctypes.c_int64(words), ctypes.c_int64(lanes)),
            *(at(sums), ctypes.byref(whole)),
        )
        return sums, bool(whole.value)

    def stacks(self, lanes):
        return (1, self._c.stacks_of(ctypes.c_int64(lanes)))

    def chosen(self):
        name = ctypes.c_char_p()
        self._checked("chosen", ctypes.byref(name))
        return name.value.decode()

    def emulate(self, permitted=True, adds_one=False, fails_after=-1, empties_after=-1):
        self._c.emulate(permitted, adds_one, ctypes.c_int64(fails_after), ctypes.c_int64(empties_after))

    def executed(self):
        return self._c.executed()

    def config(self):
        found = torch.full((128,), 7, dtype=torch.uint8)
        aligned = found[-found.data_ptr() % 64 :][:64]
        self._c.get_config(at(aligned))
        return bytes(aligned.tolist())

    def set_config(self, config: bytes):
        room = torch.zeros(128, dtype=torch.uint8)
        aligned = room[-room.data_ptr() % 64 :][:64]
        aligned.copy_(torch.tensor(list(config), dtype=torch.uint8))
        self._checked("set_config", at(aligned))

    def _checked(self, name, *arguments):
        words = getattr(self._c, name)(*arguments)
        if words is not None:
            raise RuntimeError(words.decode())


def at(tensor: torch.Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def built(folder: Path, *flags: str) -> Blocks:
    library = folder / "screen_blocks.so"
    options = "-shared -std=c++20 -O1 -fPIC -w -ffp-contract=off".split()
    include = (Path(torch.__file__).parent / "include", _build._SOURCES, HERE)
    done = subprocess.run(
        [*COMPILER, *options, *flags, *(f"-I{path}" for path in include), str(HERE / "screen_blocks.cpp")]
        + ["-o", str(library)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return Blocks(library)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return built(tmp_path_factory.mktemp("emulated"), "-DLBDT_EMULATED_AMX")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return built(tmp_path_factory.mktemp("own"))


@pytest.fixture(params=["emulated", "own"])
def tiles(request):
    """Blocks whose tiles run here: always emulated, and the processor's own where it has them."""
    blocks = request.getfixturevalue(request.param)
    if request.param == "own" and "amx_int8" not in blocks.kinds:
        pytest.skip("this processor has no AMX that a process may use")
    if request.param == "emulated":
        blocks.emulate()
    return blocks


def numbers(count, words, lanes, seed=0, extreme=None):
    """Codes and a panel: random ones, or of each the least or largest."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (count, 4 * words), dtype=torch.int8, generator=g)
    octets = torch.randint(0, 256, (words, lanes, 4), dtype=torch.uint8, generator=g)
    if extreme == "mixed":
        codes = torch.where(codes < 0, -127, 127).to(torch.int8)
        octets = torch.where(octets < 128, 0, 255).to(torch.uint8)
    elif extreme is not None:
        codes.fill_(extreme)
        octets.fill_(255)
    return codes, octets.view(torch.int32).squeeze(2)


def exact(codes, panel):
    """The sums [count, lanes] as int64."""
    words, lanes = panel.shape
    octets = (
        panel.unsqueeze(2).view(torch.uint8).view(words, lanes, 4).permute(0, 2, 1).reshape(4 * words, lanes)
    )
    return codes.long() @ octets.long()


def limits(codes, panel, seed=0, odd=True):
    """Bounds [6, count] and patches [5, LANES] near which the sums lie, owners among the latents; odd: with NaN too."""
    g = torch.Generator().manual_seed(seed + 1)
    sums = codes.sum(1).double()
    count, words = len(codes), panel.shape[0]
    size = 127 * 73 * (4 * words) ** 0.5
    bounds = torch.stack(
        (
            torch.rand(count, generator=g) / size,
            torch.randn(count, generator=g),
            torch.rand(count, generator=g),
            torch.rand(count, generator=g) * 0.1,
            torch.rand(count, generator=g) * 0.01,
            sums.float(),
        )
    )
    patches = torch.stack(
        (
            torch.rand(LANES, generator=g),
            torch.rand(LANES, generator=g) * 0.1,
            torch.rand(LANES, generator=g),
            torch.randn(LANES, generator=g),
            torch.zeros(LANES),
        )
    )
    if odd:
        for kind, row in enumerate(torch.randperm(count, generator=g)[:5].tolist()):
            bounds[kind, row] = (NAN, INF, -INF)[(kind + seed) % 3]
        patches[0, 3], patches[1, 5], patches[2, 7], patches[3, 9:12] = (
            NAN,
            INF,
            NAN,
            torch.tensor([NAN, INF, -INF]),
        )
    owners = torch.randint(-1, count, (LANES,), dtype=torch.int32, generator=g)
    patches[4] = owners.view(torch.float32)
    return bounds, patches


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


WORDS = [1, 2, 15, 16, 17, 31, 32, 33, 50]
COUNTS = [1, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 95, 96]


@pytest.mark.parametrize("lanes", [16, 32])
@pytest.mark.parametrize("extreme", [None, "mixed", -127, 127])
def test_tiles_multiply_as_integers_do(extreme, lanes, tiles):
    for words in WORDS:
        for stacks in tiles.stacks(lanes):
            for gap in (0, 4, 20):  # of channels that belong to nobody, between the rows
                codes, panel = numbers(16 * stacks, words, lanes, seed=words, extreme=extreme)
                sums, whole = tiles.products(codes, panel, gap)
                assert whole and torch.equal(sums.long(), exact(codes, panel)), (words, stacks, gap)


@pytest.mark.parametrize("code", [-127, 127])
def test_sums_reach_the_ends_of_their_range(code, tiles):
    """As many channels as a screen has at most."""
    codes, panel = numbers(16, 1 << 14, 16, extreme=code)
    sums, whole = tiles.products(codes, panel)
    assert whole and (sums == code * 255 << 16).all() and abs(int(sums[0, 0])) > 0.98 * 2**31


@pytest.mark.parametrize("lanes", [16, 32])
@pytest.mark.parametrize("words", WORDS)
def test_every_kind_of_block_gives_the_same_counts_and_bits(words, lanes, tiles):
    for count in COUNTS:
        for extreme in (None, "mixed", -127, 127):
            codes, panel = numbers(count, words, lanes, seed=count, extreme=extreme)
            for odd in (False, True):
                bounds, patches = limits(codes, panel, seed=count, odd=odd)
                expected = tiles.compare("plain", codes, panel, bounds, patches)
                for kind in tiles.kinds[1:]:
                    found = tiles.compare(kind, codes, panel, bounds, patches, gap=4)
                    assert same(found, expected), (kind, count, extreme, odd)


def test_the_blocks_have_something_to_tell_apart(emulated):
    codes, panel = numbers(96, 33, 32)
    counts, bits = emulated.compare("plain", codes, panel, *limits(codes, panel))
    certain, likely, may = counts.sum(1).tolist()
    assert 0 < certain < likely < may < 96 * 32
    assert [bin(int(row) & 0xFFFFFFFF).count("1") for row in bits.view(-1, 3)[0]] != [0, 0, 0]


def test_owners_are_counted_from_the_first_latent_on(tiles):
    codes, panel = numbers(49, 17, 32)
    bounds, patches = limits(codes, panel)
    patches[4] = (torch.arange(LANES, dtype=torch.int32) + 1000).view(torch.float32)
    expected = tiles.compare("plain", codes, panel, bounds, patches, first=1000)
    assert not same(expected, tiles.compare("plain", codes, panel, bounds, patches))
    for kind in tiles.kinds[1:]:
        assert same(tiles.compare(kind, codes, panel, bounds, patches, first=1000), expected), kind


def config(rows, columns, palette=1, start=0):
    """64 bytes as LDTILECFG reads them; rows and bytes a row of the tiles from 0 on."""
    columns = [*columns, *[0] * (16 - len(columns))]
    rows = [*rows, *[0] * (16 - len(rows))]
    return bytes([palette, start, *[0] * 14, *b"".join(c.to_bytes(2, "little") for c in columns), *rows])


NONE, ANOTHERS = bytes(64), config([3, 16, 5], [12, 64, 4])


@pytest.mark.parametrize("before", [NONE, ANOTHERS], ids=["none", "another's"])
@pytest.mark.parametrize("lanes", [16, 32])
def test_tiles_are_configured_afterwards_as_they_were_before(lanes, before, emulated):
    """After what throws as well, at whatever instruction."""
    emulated.emulate()
    emulated.set_config(before)
    codes, panel = numbers(16, 17, lanes)
    emulated.emulate()
    emulated.products(codes, panel)
    assert emulated.config() == before
    emulated.emulate()
    emulated.products(codes, panel)
    # The last one restores another's tiles, and must not fail.
    for instruction in range(emulated.executed() - (before != NONE)):
        emulated.emulate(fails_after=instruction)
        with pytest.raises(RuntimeError, match="told to fail"):
            emulated.products(codes, panel)
        assert emulated.config() == before, instruction
    emulated.set_config(NONE)


@pytest.mark.parametrize("lanes", [16, 32])
def test_blocks_leave_no_tiles_configured(lanes, tiles):
    if "amx_int8" not in tiles.kinds:  # of the emulation: the bounds need AVX-512
        codes, panel = numbers(16, 17, lanes)
        tiles.products(codes, panel)
    else:
        codes, panel = numbers(70, 17, lanes)
        tiles.compare("amx_int8", codes, panel, *limits(codes, panel))
    assert tiles.config() == NONE


@pytest.mark.parametrize("lanes", [16, 32])
def test_tiles_that_forget_what_is_in_them_are_noticed(lanes, emulated):
    for stacks in emulated.stacks(lanes):
        codes, panel = numbers(16 * stacks, 33, lanes)
        emulated.emulate()
        emulated.products(codes, panel)
        lost = 0
        for instruction in range(emulated.executed()):
            emulated.emulate(empties_after=instruction)
            sums, whole = emulated.products(codes, panel)
            assert not whole or torch.equal(sums.long(), exact(codes, panel)), instruction
            lost += not whole
        assert lost > 10


def test_blocks_of_tiles_that_forget_are_multiplied_again(emulated):
    emulated.emulate()
    if "amx_int8" not in emulated.kinds:
        pytest.skip("the bounds need AVX-512")
    codes, panel = numbers(50, 33, 32)
    given = codes, panel, *limits(codes, panel)
    expected = emulated.compare("plain", *given)
    emulated.emulate()
    emulated.compare("amx_int8", *given)
    for instruction in range(emulated.executed()):
        emulated.emulate(empties_after=instruction)
        assert same(emulated.compare("amx_int8", *given), expected), instruction


def test_amx_is_chosen_where_it_may_be_used_and_multiplies_right(emulated, monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    emulated.emulate()
    newest = "avx512_vnni" in emulated.kinds
    if newest:
        assert emulated.chosen() == "amx_int8"
    without = ("avx512_vnni",) if newest else ("avx_vnni", "")
    emulated.emulate(permitted=False, adds_one=True)
    assert emulated.chosen() in without
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512")  # what is named asks for no more
    emulated.emulate(adds_one=True)
    assert emulated.chosen() in without
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    if newest:
        with pytest.raises(RuntimeError, match="AMX.*ATEN_CPU_CAPABILITY=avx512"):
            emulated.chosen()
        assert emulated.config() == NONE
        emulated.emulate(empties_after=30)  # once, which is no error
        assert emulated.chosen() == "amx_int8"


def tdpbsud(sums, signed, unsigned):
    """The instruction's bytes: VEX.128.F3.0F38.W0 5E /r with the sums in reg, signed bytes in rm, unsigned in vvvv."""
    return bytes([0xC4, 0xE2, (~unsigned & 15) << 3 | 2, 0x5E, 0xC0 | sums << 3 | signed])


def test_the_compiled_products_are_of_signed_latents_and_unsigned_patches(own):
    if not hasattr(own._c, "products"):
        pytest.skip("this compiler does not know AMX")
    code = own.library.read_bytes()
    # One panel's tile: three stacks of sums; two: two stacks, each with both.
    expected = [(0, 5), (1, 5), (2, 5), (1, 6), (2, 5), (3, 6)]
    assert all(tdpbsud(sums, 4, unsigned) in code for sums, unsigned in expected)
    swapped = [tdpbsud(sums, unsigned, 4) for sums, unsigned in expected]
    assert not any(instruction in code for instruction in swapped)


FAULTS = [
    pytest.param(config([17], [64]), "too large", id="rows"),
    pytest.param(config([16], [65]), "too large", id="bytes-a-row"),
    pytest.param(config([16], [0]), "no bytes", id="no-bytes"),
    pytest.param(config([0], [4]), "no rows", id="no-rows"),
    pytest.param(config([16] * 9, [64] * 9), "eight tiles", id="nine-tiles"),
    pytest.param(config([16], [64], palette=2), "palette", id="palette"),
    pytest.param(config([16], [64], start=16), "start_row", id="start-row"),
    pytest.param(b"\x01\x00\x07" + bytes(61), "reserved", id="reserved"),
]


@pytest.mark.parametrize(("wrong", "said"), FAULTS)
def test_the_emulation_refuses_what_the_processor_does(wrong, said, emulated):
    emulated.emulate()
    with pytest.raises(RuntimeError, match=said):
        emulated.set_config(wrong)
    assert emulated.config() == NONE
