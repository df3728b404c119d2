"""The CUDA C++ ops as machine code for three generations of GPUs, without one: registers, memory, instructions."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from lbdt import _build

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHITECTURES = ("8.0", "9.0", "10.0")
SHARED = {
    80: 163,
    90: 227,
    100: 227,
}  # KiB a block may have (CUDA C++ programming guide, table of capabilities)
RESERVED = 1024  # bytes of these that the system takes of each block from 9.0 on, counted in SHARED below
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The whole library with its CUDA part for `ARCHITECTURES`; what runs on the CPU is not optimised."""
    output = tmp_path_factory.mktemp("cuda") / _build.LIBRARY
    compiler = output.with_name("g++")
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++") or shutil.which("c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBDT_BUILD_CUDA", "1")
        patch.setenv("TORCH_CUDA_ARCH_LIST", ";".join(ARCHITECTURES))
        patch.setenv("CXX", str(compiler))
        _build.compile_extension(output)
    return output


def dump(library: Path, option: str) -> str:
    """cuobjdump's account; the toolkit's, or that of Triton's wheel, with its disassembler beside it."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="no cuobjdump: neither a toolkit's nor Triton's")
        found = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    path = f"{Path(found).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [found, option, str(library)], capture_output=True, text=True, env=os.environ | {"PATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def kernels_of(text: str, start: str):
    """(architecture, mangled name, lines about it) of each kernel in `dump`'s text."""
    for part in re.split(r"^arch = sm_", text, flags=re.MULTILINE)[1:]:
        architecture = int(re.match(r"\d+", part)[0])
        for kernel in re.split(start, part)[1:]:
            yield architecture, re.match(r"[\w$]+", kernel)[0], kernel


@needs_nvcc
def test_no_kernel_spills_and_all_fit(library):
    seen = defaultdict(list)
    for architecture, name, text in kernels_of(dump(library, "-res-usage"), r"Function "):
        use = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
        print(f"sm_{architecture} {name}: {use}")
        assert use["STACK"] == use["LOCAL"] == 0, f"{name} spills on sm_{architecture}: {use}"
        assert 0 < use["REG"] <= 255
        assert use["SHARED"] <= SHARED[architecture] << 10
        seen[architecture].append((name, use))
    assert set(seen) == set(SHARED) and len({len(names) for names in seen.values()}) == 1
    names = " ".join(name for name, _ in seen[90])
    for path in _build.sources():
        assert path.suffix != ".cu" or path.stem in names or "replace_planes_kernel" in names, path.name


@needs_nvcc
def test_replace_patches_leaves_the_shared_memory_that_python_counts_on(library):
    from lbdt.ops import replace_patches  # the function; its module is the next line's

    module = sys.modules[replace_patches.__module__]
    for architecture, name, text in kernels_of(dump(library, "-res-usage"), r"Function "):
        if re.search(r"replace_(planes|rows)_kernel", name):
            own = int(re.search(r"SHARED:(\d+)", text)[1]) - (RESERVED if architecture >= 90 else 0)
            assert own <= module._FIXED_BYTES, (name, own)
    assert module._ANY_GPU <= 48 << 10


@needs_nvcc
def test_the_vector_kernels_move_sixteen_bytes_at_once(library):
    wide = Counter()
    for architecture, name, text in kernels_of(dump(library, "-sass"), r"Function : "):
        found = re.search(r"replace_(planes|rows)_kernelI(\w+?)Li(\d+)ELi(\d)E", name)
        if found is None:
            continue
        loads, stores = (len(re.findall(rf"\b{op}\.E[\w.]*\.128\b", text)) for op in ("LDG", "STG"))
        if int(found[3]) > 1:
            assert loads and stores, (
                f"{name} on sm_{architecture}: {loads} loads and {stores} stores of 16 bytes"
            )
            wide[architecture] += 1
        else:
            assert not loads and not stores, f"{name} on sm_{architecture} assumes alignment"
    # Planes and rows, each for three element sizes that are copied and four dtypes that are averaged.
    assert wide == dict.fromkeys(SHARED, 14)


@needs_nvcc
def test_the_library_with_cuda_loads_without_a_gpu_and_serves_the_cpu(library):
    code = f"""
from pathlib import Path
import torch
from lbdt import _build, ops
_build._PACKAGE, _build._older_than_sources = Path({str(library.parent)!r}), lambda library: False
arguments = torch.randn(2, 16, 4, 4), torch.rand(2, 16) < 0.3, torch.rand(2, 16), 4, 4, 1
cpp, reference = (ops.replace_patches(*arguments, backend=name) for name in ("cpp", "reference"))
print(all(torch.equal(a, b) for a, b in zip(cpp, reference, strict=True)))
print([_build.missing(op, "cuda") for op in ("replace_patches_cpp", "replace_patches_cpp_", "patch_uniform_cpp")])
print({str(library)!r} in open("/proc/self/maps").read())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["True", "[None, None, None]", "True"]
    if shutil.which("readelf"):
        needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
        # libtorch.so leads to libtorch_cuda.so, where the weak symbols are.
        assert "[libtorch.so]" in needed and "libcudart" not in needed


def test_architectures():
    assert _build.gencode("9.0") == ["-gencode", "arch=compute_90,code=sm_90"]
    assert _build.gencode("8.0;9.0+PTX") == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_90,code=sm_90"),
        *("-gencode", "arch=compute_90,code=compute_90"),
    ]
    spaced = ["-gencode", "arch=compute_90a,code=sm_90a", "-gencode", "arch=compute_120,code=sm_120"]
    assert _build.gencode(" 9.0a  12.0 ") == _build.gencode("9.0a, 12.0") == spaced
    for bad in ("Hopper", "90", "9.0+ptx", "9.0;sm_80"):
        with pytest.raises(RuntimeError, match="TORCH_CUDA_ARCH_LIST: expected .*8.0;9.0.PTX"):
            _build.gencode(bad)


def test_whether_the_cuda_part_is_built(monkeypatch):
    import torch

    monkeypatch.setattr(shutil, "which", lambda name: f"/found/{name}" if name == "nvcc" else None)
    for cuda, mode, expected in (
        (None, "auto", None),
        (None, "", None),
        (None, "1", "/found/nvcc"),
        ("13.0", "auto", "/found/nvcc"),
        ("13.0", "0", None),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setenv("LBDT_BUILD_CUDA", mode)
        assert _build.cuda_compiler() == expected
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("LBDT_BUILD_CUDA", "auto")
    assert _build.cuda_compiler() is None
    monkeypatch.setenv("LBDT_BUILD_CUDA", "1")
    with pytest.raises(RuntimeError, match="no nvcc was found .*CUDA_HOME"):
        _build.cuda_compiler()
    monkeypatch.setenv("LBDT_BUILD_CUDA", "yes")
    with pytest.raises(RuntimeError, match="expected auto, 0 or 1, got 'yes'"):
        _build.cuda_compiler()


def test_the_architectures_serve_the_gpus_of_other_machines_too(monkeypatch):
    import torch

    def built() -> list[str]:
        return [flag for flag in _build.cuda_command("nvcc") if flag.startswith("arch=")]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    everywhere = ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90"]
    assert built() == [*everywhere, "arch=compute_90,code=compute_90"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (10, 0), (9, 0)][i])
    newest = ["arch=compute_100,code=sm_100", "arch=compute_100,code=compute_100"]
    assert built() == [*everywhere, *newest]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert built() == ["arch=compute_86,code=sm_86"]


def test_a_toolkit_that_fails_costs_the_cuda_ops_only(tmp_path, monkeypatch):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'unsupported GNU version' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    compiled = []
    monkeypatch.setattr(_build, "cuda_compiler", lambda: str(nvcc))
    original = _build._compile
    monkeypatch.setattr(
        _build, "_compile", lambda output, nvcc: compiled.append(nvcc) or original(output, nvcc)
    )

    def run(command):
        if command[0] == str(nvcc):
            _fail(command)
        Path(command[command.index("-o") + 1]).touch()

    monkeypatch.setattr(_build, "_run", run)
    monkeypatch.setattr(_build.os, "replace", lambda built, output: output.touch())
    monkeypatch.setenv("LBDT_BUILD_CUDA", "auto")
    with pytest.warns(UserWarning, match="(?s)CUDA ops were left out, .*unsupported GNU version"):
        _build.compile_extension(tmp_path / "_C.so")
    assert compiled == [str(nvcc), None] and (tmp_path / "_C.so").exists()
    monkeypatch.setenv("LBDT_BUILD_CUDA", "1")
    with pytest.raises(RuntimeError, match="unsupported GNU version"):
        _build.compile_extension(tmp_path / "_C.so")


def _fail(command: list[str]) -> None:
    raise RuntimeError(f"{' '.join(command)}\nunsupported GNU version")


def test_a_compiler_with_a_launcher_and_one_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("LBDT_BUILD_CUDA", "0")
    monkeypatch.setenv("CXX", "no-such-launcher g++")
    with pytest.raises(RuntimeError, match="no-such-launcher"):
        _build.compile_extension(tmp_path / "_C.so")
    assert "-ccbin g++" in " ".join(_build.cuda_command("nvcc"))
