"""Every compiled op once on small tensors, for compute-sanitizer: `compute-sanitizer python -m
benchmarks.sanitize`. For the CPU's ops `python -m benchmarks.sanitize --asan`: the same calls, then the ops' fuzz
targets (`--fuzz-cases N` of each), with a library that g++ built with AddressSanitizer and UndefinedBehaviorSanitizer.

That build goes into the cache of builds (minutes, once). A finding ends the run with its report and exit code 1 or
that of the signal. `--device cpu` (no sanitizer) shows that the script itself works. Ragged sizes, every source, layout
and dtype; answers are compared with the reference's, as a kernel that reads too far may still answer.
"""

import argparse
import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from lbdt import _build, ops
from lbdt.donors import SOURCES
from lbdt.int8_screen import Screen
from lbdt.testing import DTYPES, assert_close, layouts

BATCH, WIDTH, HEIGHT, GRID_WIDTH, LATENTS, K = 3, 40, 5, 7, 130, 4


def backends(op: str, *arguments) -> list[str]:
    """The compiled backends that can serve the call."""
    choice = ops.explain(op, *arguments)
    usable = {choice.backend, *(name for name, why in choice.reasons.items() if why.startswith("usable"))}
    return sorted(usable - {"reference"})


def put(device: torch.device, *arguments) -> tuple:
    """The arguments with their tensors on the device."""
    return tuple(value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments)


# Answers come from the reference on the CPU, so that a sanitizer on a GPU has only the kernels in question
# to watch. Every function returns how many calls it compared.


def replace_patches(device: torch.device, g: torch.Generator) -> int:
    calls = 0
    patches = HEIGHT * GRID_WIDTH
    mask = torch.rand(BATCH, patches, generator=g) < 0.2
    mask[1] = False
    mask[2] = True  # no free patch: the bank's turn
    avoid = torch.rand(BATCH, patches, generator=g) < 0.3
    for dtype, source, padding, banked in itertools.product(DTYPES, SOURCES, (0, 2), (False, True)):
        values = torch.randn(BATCH, WIDTH, HEIGHT, GRID_WIDTH, generator=g).to(dtype)
        u = torch.rand(BATCH, patches, generator=g)
        bank = torch.randn(BATCH, 2, WIDTH, generator=g).to(dtype) if banked else None
        rest = (mask, u, HEIGHT, GRID_WIDTH, padding, source, bank, avoid if padding else None)
        for x in layouts(values).values():
            expected, where = ops.replace_patches(x, *rest, backend="reference")
            there = put(device, *rest)
            for backend in backends("replace_patches_", x.to(device), *there):
                # A view again: a plain copy to the device could come out dense.
                out = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x)
                replaced = ops.replace_patches_(out, *there, backend=backend)
                assert torch.equal(replaced.cpu(), where), (backend, dtype, source)
                assert_close(out.cpu(), expected, "replace_mean")
                calls += 1
    return calls


def detect_patches(device: torch.device, g: torch.Generator) -> int:
    calls = 0
    size = (BATCH, WIDTH, HEIGHT, GRID_WIDTH)
    for dtype, k, update, gated in itertools.product(DTYPES[:3], (0, K), (False, True), (False, True)):
        # Integers, so that every order of summation gives the same.
        x, minus = (torch.randint(-3, 4, size, generator=g).to(dtype) for _ in range(2))
        arguments = (
            x,
            torch.randint(-1, 2, (LATENTS, WIDTH), generator=g).to(dtype),
            torch.zeros(LATENTS),
            torch.tensor([1, 64, LATENTS - 1]),
            torch.full((2, 3), 4.5),
            torch.tensor([0, 1, 0]),
            torch.ones(BATCH, 3, dtype=torch.bool),
            k,
            minus if update else None,
        )
        if gated:
            least = torch.randint(1, 20, (2, 2), generator=g)
            arguments += (torch.tensor([0, 1, 1]), least, 100, torch.arange(BATCH).flip(0))
        expected, there = ops.detect_patches(*arguments, backend="reference"), put(device, *arguments)
        for backend in backends("detect_patches", *there):
            found = ops.detect_patches(*there, backend=backend)
            assert torch.equal(found.cpu(), expected), (backend, dtype, k, update)
            calls += 1
    return calls


def screened_patches(device: torch.device, g: torch.Generator) -> int:
    """`detect_patches` with an int8 screen, of so many patches that survive that Triton makes use of it; from the last
    centre bounds tell nothing, and all is counted exactly."""
    calls = 0
    latents, side = 700, 28
    for dtype, update, far in itertools.product(DTYPES[:3], (False, True), (0.0, 1e4)):
        x, minus = (torch.randint(-3, 4, (2, WIDTH, side, side), generator=g).to(dtype) for _ in range(2))
        weight, bias = torch.randint(-1, 2, (latents, WIDTH), generator=g).to(dtype), torch.zeros(latents)
        arguments = (
            x,
            weight,
            bias,
            torch.tensor([1, 300, latents - 1]),
            torch.full((1, 3), -99.0),
            torch.tensor([0, 0]),
            torch.ones(2, 3, dtype=torch.bool),
            150,
            minus if update else None,
        )
        expected, there = ops.detect_patches(*arguments, backend="reference"), put(device, *arguments)
        assert expected.any() and not expected.all()
        screen = Screen.of(there[1], there[2], torch.full((WIDTH,), far, device=device))._asdict()
        for backend in backends("detect_patches", *there):
            found = ops.detect_patches(*there, **screen, backend=backend)
            assert torch.equal(found.cpu(), expected), (backend, dtype, update, far)
            calls += 1
    return calls


def encode_topk(device: torch.device, g: torch.Generator) -> int:
    calls = 0
    for dtype in DTYPES[:3]:
        x = torch.randn(BATCH, WIDTH, HEIGHT, GRID_WIDTH, generator=g).to(dtype)
        weight = torch.randn(LATENTS, WIDTH, generator=g).to(dtype)
        arguments = (x, weight, torch.zeros(LATENTS), K)
        expected, there = ops.encode_topk(*arguments, backend="reference")[0], put(device, *arguments)
        for backend in backends("encode_topk", *there):
            assert_close(ops.encode_topk(*there, backend=backend)[0].cpu(), expected, "encode_topk")
            calls += 1
    return calls


def patch_uniform(device: torch.device, g: torch.Generator) -> int:
    calls = 0
    for dtype in (torch.int64, torch.float32):
        seeds = torch.tensor([0, -1, 2**62])
        arguments = (seeds, torch.tensor([1, 500, 999]).to(dtype), seeds % 2, HEIGHT * GRID_WIDTH)
        expected, there = ops.patch_uniform(*arguments, backend="reference"), put(device, *arguments)
        for backend in backends("patch_uniform", *there):
            assert torch.equal(ops.patch_uniform(*there, backend=backend).cpu(), expected), backend
            calls += 1
    return calls


def record_patches(device: torch.device, g: torch.Generator) -> int:
    calls = 0
    for kept in (0, 50):
        mask, replaced = (torch.rand(BATCH, HEIGHT * GRID_WIDTH, generator=g) < 0.5 for _ in range(2))
        buffers = (
            torch.zeros(4, 4, dtype=torch.int64),
            torch.zeros(kept, dtype=torch.uint8),
            torch.tensor([3, 7]),
        )
        arguments = (mask, replaced, torch.rand(BATCH, generator=g), 9)
        expected, there = [b.clone() for b in buffers], put(device, *arguments)
        ops.record_patches(*arguments, *expected, backend="reference")
        for backend in backends("record_patches", *there, *put(device, *buffers)):
            got = put(device, *(b.clone() for b in buffers))
            ops.record_patches(*there, *got, backend=backend)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True)), backend
            calls += 1
    return calls


def under_asan(cases: int) -> int:
    """Runs `inside` in a process with the sanitizers' build of the library; its exit code."""
    plain = os.environ.get("CXX") or "g++"
    # With the C++ library, or the sanitizer would not find what throws exceptions.
    runtimes = [
        subprocess.run(
            [*shlex.split(plain), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    os.environ |= {"CXX": f"{plain} {_WATCHED}", "LBDT_BUILD_CUDA": "0"}
    print(f"built: {_build._cached()}", flush=True)
    # Leaks are not sought: Python keeps memory to its end.
    watched = {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    watched |= {"UBSAN_OPTIONS": "print_stacktrace=1", "PYTHONPATH": str(_ROOT), "LBDT_JIT": "1"}
    code = f"import sys; from benchmarks import sanitize; sys.exit(sanitize.inside({cases}))"
    return subprocess.run([sys.executable, "-c", code], cwd=_ROOT, env=os.environ | watched).returncode


def inside(cases: int) -> int:
    """The calls and the fuzz targets on the library of the cache; exit code 0 or 1."""
    import pytest

    _build._PACKAGE = _ROOT / "benchmarks"  # where no prebuilt library comes first
    assert _build.load() is None
    main(["--device", "cpu"])
    targets = [
        "-q",
        "-m",
        "fuzz",
        "-p",
        "no:cacheprovider",
        f"--fuzz-cases={cases}",
        "tests/fuzz/test_ops.py",
        "tests/fuzz/test_internal_ops.py",
        "tests/fuzz/test_erase_step.py",
    ]
    return int(pytest.main(targets) != 0)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; an AssertionError where an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--op", action="append", choices=list(_OPS), help="default: all")
    parser.add_argument("--asan", action="store_true", help="the C++ ops and their fuzz targets, see above")
    parser.add_argument("--fuzz-cases", type=int, default=300, help="of each target, with --asan")
    options = parser.parse_args(arguments)
    if options.asan:
        return under_asan(options.fuzz_cases)
    device = torch.device(options.device)
    for name in options.op or _OPS:
        calls = _OPS[name](device, torch.Generator().manual_seed(0))
        print(f"{name}: {calls} calls of compiled backends on {device} agree with the reference")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 0


_ROOT = Path(__file__).resolve().parents[1]
_WATCHED = (
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer "
    "-D_GLIBCXX_ASSERTIONS -g"
)
_OPS = {
    "replace_patches": replace_patches,
    "detect_patches": detect_patches,
    "screened_patches": screened_patches,
    "encode_topk": encode_topk,
    "patch_uniform": patch_uniform,
    "record_patches": record_patches,
}

if __name__ == "__main__":
    sys.exit(main())
