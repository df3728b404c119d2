"""The CUDA C++ kernels' own source on the CPU, against the reference, bit for bit (emulate_cuda.h).

It shows what index arithmetic, barriers and alignment do; not what a GPU's memory model or its compiler does.
"""

import ctypes
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lbdt import _build, ops
from lbdt.testing import DTYPES, layouts
from tests.kernels.cuda_inputs import numbering, replacement
from tests.layouts import bits, misaligned

replace = importlib.import_module("lbdt.ops.replace_patches")
HERE = Path(__file__).parent
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
EDITS = [  # pattern, replacement, how often in replace_patches.cu and patch_uniform.cu
    (r"extern __shared__ uint32_t shared\[\];", "uint32_t* shared = emulation::dynamic_shared();", (2, 0)),
    (r"__shared__ ", "static ", (3, 0)),
    (r"([\w<>]+)<<<(.+), (\w+), (\w+), (.+)>>>\(", r"emulation::launch(\2, \3, \4, \1, ", (1, 1)),
    (r"torch::stable::accelerator::DeviceGuard", "emulation::NoGuard", (1, 1)),
    (r'#include "cuda_launch.h"', '#include "emulate_cuda.h"', (1, 1)),
    (r"IMPL\(lbdt, CUDA, m\)", "IMPL(lbdt_emulated, CPU, m)", (1, 1)),
]
pytestmark = pytest.mark.skipif(
    NVCC is None or not shutil.which("g++"), reason="needs g++ and the CUDA toolkit's headers"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The emulated ops as torch.ops.lbdt_emulated, and the knobs of the emulation."""
    folder = tmp_path_factory.mktemp("emulated")
    torch_root = Path(torch.__file__).parent
    include = [_build._cuda_libraries(NVCC).parent / "include", torch_root / "include", _build._SOURCES, HERE]
    # Misaligned vectors and positions outside of a block's tables end the process.
    flags = "-std=c++20 -O1 -fPIC -w -ffp-contract=off -fsanitize=bounds,alignment -fsanitize-undefined-trap-on-error"
    flags += f" -DUSE_CUDA -DTORCH_TARGET_VERSION={_build.TORCH_TARGET}"
    units = []
    for index, stem in enumerate(("replace_patches", "patch_uniform")):
        text = (_build._SOURCES / f"cuda/{stem}.cu").read_text()
        for pattern, put, times in EDITS:
            text, made = re.subn(pattern, put, text)
            assert made == times[index], f"{stem}.cu: {pattern} found {made} times: change EDITS with it"
        units.append(folder / f"{stem}.cpp")
        units[-1].write_text(text)
    output = folder / "emulated.so"
    command = ["g++", "-shared", *flags.split(), *(f"-I{path}" for path in include), *map(str, units)]
    command += [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    definitions = torch.library.Library("lbdt_emulated", "FRAGMENT")
    for name in ("replace_patches_cpp", "replace_patches_cpp_", "patch_uniform_cpp"):
        definitions.define(str(getattr(torch.ops.lbdt, name).default._schema).removeprefix("lbdt::"))
    torch.ops.load_library(str(output))
    yield ctypes.CDLL(str(output))
    definitions._destroy()


def check(library, arguments, units=1, backward=0):
    """Both emulated ops on `arguments` give the reference's bits, in one launch each."""
    library.emulation_set(units, backward)
    expected, where = ops.replace_patches(**arguments, backend="reference")
    height, width = arguments["height"], arguments["width"]
    given = replace._cpp_arguments(*arguments.values())
    out = torch.full_like(arguments["x"], float("nan"))
    before = library.emulation_launches()
    for in_place in (False, True):
        replaced = ~where
        if in_place:
            out = arguments["x"]
            torch.ops.lbdt_emulated.replace_patches_cpp_(*given, replaced)
        else:
            to = out if out.dim() == 4 else out.unflatten(2, (height, width))
            torch.ops.lbdt_emulated.replace_patches_cpp(*given, to, replaced)
        assert torch.equal(replaced, where)
        assert torch.equal(bits(out.flatten(2)), bits(expected.flatten(2))), (
            "in place" if in_place else "functional"
        )
    assert library.emulation_launches() == before + 2


ROWS = [
    pytest.param({}, 1, id="plain"),
    pytest.param({"d": 1, "B": 1, "H": 3, "W": 5}, 1, id="one-channel-odd"),
    pytest.param({"d": 7, "H": 13, "W": 3, "rate": 0.05, "padding": 2}, 1, id="tall-odd-padding-2"),
    pytest.param({"H": 1, "W": 1, "rate": 2, "bank": 2}, 1, id="one-patch-bank"),
    pytest.param({"B": 1, "H": 1, "W": 9, "rate": 0.3, "padding": 0}, 1, id="one-row"),
    pytest.param({"B": 1, "d": 8, "H": 9, "W": 1, "rate": 0.3, "padding": 0}, 1, id="one-column"),
    pytest.param({"H": 4, "W": 6, "rate": 0.1, "padding": 9}, 1, id="padding-beyond-the-grid"),
    pytest.param({"rate": 0.0}, 1, id="empty-mask"),
    pytest.param({"rate": 2.0}, 1, id="full-mask-unchanged"),
    pytest.param({"bank": 3}, 3, id="bank-of-one-image"),
    pytest.param({"rate": 0.95, "padding": 0}, 1, id="few-donors"),
    pytest.param({"d": 24, "H": 16, "W": 16, "rate": 0.1}, 2, id="one-tile-many-chunks"),
    pytest.param({"B": 1, "d": 5, "H": 20, "W": 28, "rate": 0.1}, 2, id="tiles-split-between-blocks"),
    pytest.param({"B": 1, "d": 4, "H": 23, "W": 31, "rate": 0.9, "padding": 0}, 1, id="odd-tiles-few-donors"),
    pytest.param({"avoid": 0.3}, 1, id="avoid-some"),
    pytest.param({"avoid": 2.0}, 1, id="avoid-all"),
    pytest.param({"avoid": 0.0, "bank": 3}, 1, id="avoid-none-bank-of-one-image"),
    pytest.param(
        {"avoid": 0.8, "rate": 0.6, "B": 5, "H": 3, "W": 5, "padding": 0}, 2, id="avoid-all-in-some"
    ),
    pytest.param({"avoid": 0.9, "B": 1, "d": 4, "H": 23, "W": 31, "padding": 0}, 2, id="avoid-odd-tiles"),
]


@pytest.mark.parametrize("source", replace.SOURCES)
@pytest.mark.parametrize(("sizes", "units"), ROWS)
def test_replace_patches_equals_the_reference(sizes, units, source, library):
    for channels_last in (False, True):
        for backward in (0, 1):
            arguments = replacement(**sizes, source=source)
            if channels_last:
                arguments["x"] = arguments["x"].to(memory_format=torch.channels_last)
            check(library, arguments, units, backward)


@pytest.mark.parametrize("source", replace.SOURCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replace_patches_every_dtype_and_layout(dtype, source, library):
    for bank in (0, 3):
        arguments = replacement(dtype=dtype, source=source, bank=bank, H=4, W=10)
        for x in layouts(arguments["x"]).values():
            check(library, {**arguments, "x": x}, units=2)
            if x.dim() == 4 and x.storage_offset() > 0:  # the slice: its surroundings are as they were
                around = x._base.clone()
                around[:, 1:-1, 1:, 2:-1] = float("nan")
                assert around.isnan().all()


@pytest.mark.parametrize("source", replace.SOURCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replace_patches_misaligned(dtype, source, library):
    arguments = replacement(dtype=dtype, source=source, bank=2, avoid=0.3)
    for x in misaligned(arguments["x"]).values():
        check(library, {**arguments, "x": x}, units=2)


def test_replace_patches_expanded_input(library):
    arguments = replacement(B=3, source="nearest")
    for x in (arguments["x"][:1].expand(3, -1, -1, -1), arguments["x"][:, :1].expand(-1, 16, -1, -1)):
        expected, where = ops.replace_patches(**{**arguments, "x": x}, backend="reference")
        out, replaced = torch.empty_like(x), ~where
        given = replace._cpp_arguments(*{**arguments, "x": x}.values())
        torch.ops.lbdt_emulated.replace_patches_cpp(*given, out, replaced)
        assert torch.equal(bits(out), bits(expected)) and torch.equal(replaced, where)


def test_replace_patches_numbers_outside_of_their_range(library):
    arguments = replacement(bank=3)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.5, 1.0, 1e9, -0.0])
    arguments["u"] = odd[torch.arange(64) % 7].expand(2, -1).contiguous()
    check(library, arguments)


def test_replace_patches_bank_in_x(library):
    arguments = replacement(bank=3)
    arguments["bank"] = arguments["x"].flatten(2)[:, :3, :16]
    expected, where = ops.replace_patches(**arguments, backend="reference")
    replaced = ~where
    torch.ops.lbdt_emulated.replace_patches_cpp_(*replace._cpp_arguments(*arguments.values()), replaced)
    assert torch.equal(replaced, where) and torch.equal(bits(arguments["x"]), bits(expected))


def test_bad_arguments_are_refused(library):
    given, replaced = (
        replace._cpp_arguments(*replacement(bank=3).values()),
        torch.zeros(2, 64, dtype=torch.bool),
    )
    bad = {
        0: given[0].int(),
        1: given[1][:, :9],
        2: given[2].double(),
        3: given[3].half(),
        4: given[1][:1],
        5: -1,
        6: 4,
    }
    for place, value in bad.items():
        with pytest.raises(RuntimeError, match="expected"):
            changed = (*given[:place], value, *given[place + 1 :])
            torch.ops.lbdt_emulated.replace_patches_cpp_(*changed, replaced)
        assert not replaced.any()
    one = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="halves: expected"):
        torch.ops.lbdt_emulated.patch_uniform_cpp(one, one, one[:1], torch.zeros(2, 3))


def test_replace_patches_a_mask_of_more_words_than_threads(library):
    check(library, replacement(B=1, d=2, H=92, W=94, rate=0.005, padding=3), units=2)
    check(library, replacement(B=1, d=2, H=92, W=94, rate=0.005, source="row", avoid=0.5), units=2)


DTYPES_OF_TIME = [*DTYPES, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES_OF_TIME, ids=str)
def test_patch_uniform_equals_the_reference(dtype, library):
    for patches in (1, 35, 256):
        given, out = numbering(dtype, patches), torch.full((5, patches), float("nan"))
        torch.ops.lbdt_emulated.patch_uniform_cpp(given["seeds"], given["timesteps"], given["halves"], out)
        assert torch.equal(out, ops.patch_uniform(**given, backend="reference"))
