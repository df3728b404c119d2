"""Finds or builds the C++ ops: prebuilt `lbdt/_C.abi3.so`, else a user cache, else a build at first use.

Needs g++ and an importable torch; no Python headers, no pybind11: the file is LibTorch stable ABI (2.11 or
later). With nvcc and a CUDA build of torch the CUDA C++ ops go into the same file. setup.py loads this file by
path, so it imports nothing of lbdt.

Loading a library that is cut off or was changed can end the process (SIGBUS), so every build is sealed with its own
digest, and what is not whole is not loaded: a build of the cache is made again, a prebuilt one is an ImportError.

LBDT_BUILD_CUDA: "auto" (default: where nvcc is found and torch has CUDA), "1" (also with a CPU build of torch; a
missing nvcc is an error), "0" (never). TORCH_CUDA_ARCH_LIST names the architectures, as for torch's own
extensions; else 8.0, 9.0 and those of the visible GPUs.
"""

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch that the binary loads in
LIBRARY = "_C.abi3.so"

_PACKAGE = Path(__file__).resolve().parent
_SOURCES = _PACKAGE.parent / "csrc"
_SEAL = b"lbdt-sha256:"  # before the digest that ends the file: what loads a library reads past neither
_JOBS = 2  # compilers at once; one of a .cu takes about 1 GB


_VARIABLES = {
    "LBDT_BACKEND": ("auto", "triton", "cpp", "reference"),
    "LBDT_BUILD": ("auto", "0", "1"),
    "LBDT_BUILD_CUDA": ("auto", "0", "1"),
    "LBDT_JIT": ("0", "1"),
}


def check_variables() -> None:
    """ValueError for an environment variable of lbdt's with a value that it does not have; empty is as if absent."""
    for name, known in _VARIABLES.items():
        value = os.environ.get(name)
        if value and value not in known:
            raise ValueError(
                f"{name}: expected {', '.join(known)}, got {value!r}; correct or unset this environment variable"
            )


def sources() -> list[Path]:
    """The C++ and CUDA files of the checkout with their headers, empty in an installed wheel."""
    return sorted(path for path in _SOURCES.rglob("*") if path.suffix in (".cpp", ".cu", ".h", ".cuh"))


def compile_extension(output: Path) -> None:
    """Compiles `sources()` into the shared library `output`, moved there whole.

    Raises RuntimeError with the compiler's own words, or naming what is missing.
    """
    if not sources():
        raise RuntimeError(f"no C++ sources in {_SOURCES}")
    nvcc = cuda_compiler()
    try:
        _compile(output, nvcc)
    except RuntimeError as error:
        if nvcc is None or os.environ.get("LBDT_BUILD_CUDA") == "1":
            raise
        # A toolkit that does not fit this torch or compiler must not cost the CPU ops.
        warnings.warn(f"lbdt: the CUDA ops were left out, as their build failed: {error}", stacklevel=2)
        _compile(output, None)


def _compile(output: Path, nvcc: str | None) -> None:
    import torch

    compiler = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "")
    if not compiler:
        raise RuntimeError("no C++ compiler: install g++ or set CXX")
    root = Path(torch.__file__).parent
    shared = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-I{root / 'include'}", f"-I{_SOURCES}"]
    host = [*compiler, "-std=c++20", "-O3", "-fPIC", "-Wall", "-ffp-contract=off", *shared]
    link = [*compiler, "-shared", "-o"]
    libraries = [f"-L{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.") as folder:
        commands, objects = [], []
        for path in sources():
            unit = str(Path(folder) / f"{path.parent.name}-{path.stem}.o")
            if path.suffix == ".cpp":
                commands.append([*host, "-c", str(path), "-o", unit])
            elif path.suffix == ".cu" and nvcc is not None:
                commands.append([*cuda_command(nvcc), *shared, "-c", str(path), "-o", unit])
            else:
                continue
            objects.append(unit)
        with ThreadPoolExecutor(_JOBS) as pool:
            list(pool.map(_run, reversed(commands)))  # "cuda" sorts last and takes longest
        if nvcc is not None:
            # Static: no libcudart to find at run time, and it loads on a machine without a driver.
            libraries += [f"-L{_cuda_libraries(nvcc)}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        built = Path(folder) / LIBRARY
        _run([*link, str(built), *objects, *libraries])
        with built.open("r+b") as file:
            file.write(_SEAL + hashlib.sha256(file.read()).digest())
        os.replace(built, output)


def damage(library: Path) -> str | None:
    """What is wrong with the file of a built library; None if it is whole. Raises OSError if it cannot be read.

    Without a seal, which tools that rewrite libraries take away (strip, patchelf), all its parts must be inside.
    """
    data = library.read_bytes()
    if not data:
        return "it is empty"
    body = data[: -len(_SEAL) - hashlib.sha256().digest_size]
    if data[len(body) :].startswith(_SEAL):
        sealed = data[-hashlib.sha256().digest_size :] == hashlib.sha256(body).digest()
        return None if sealed else "its content is not what was built: its digest differs"
    if data[:4] != b"\x7fELF":
        return "it is not a shared library"
    if data[4:6] != b"\x02\x01":
        return None  # of another kind of machine: loading it says so
    try:
        sections, _, _, _, size, count, names = struct.unpack_from("<Q4x6H", data, 40)
        found = [struct.unpack_from("<4xI16xQQ", data, sections + size * i) for i in range(count)]
        strings = found[names]
    except (struct.error, IndexError):
        return "it is cut off"
    if strings[0] != 3 or any(kind != 8 and start + length > len(data) for kind, start, length in found):
        return "it is cut off or overwritten"  # the table of names has type 3, and type 8 takes no room in the file
    return None


def cuda_compiler() -> str | None:
    """The nvcc to build the CUDA ops with; None where they are not to be built.

    Raises RuntimeError for LBDT_BUILD_CUDA=1 without an nvcc, and for an unknown value of it.
    """
    mode = os.environ.get("LBDT_BUILD_CUDA") or "auto"
    if mode not in ("auto", "0", "1"):
        raise RuntimeError(f"LBDT_BUILD_CUDA: expected auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return None
    if mode == "auto":
        import torch

        if torch.version.cuda is None:
            return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    tried = [f"{home}/bin/nvcc" for home in homes if home] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, tried)), None)
    if nvcc is None and mode == "1":
        raise RuntimeError(
            f"LBDT_BUILD_CUDA=1, but no nvcc was found (tried {', '.join(tried)}): install the CUDA toolkit, set "
            "CUDA_HOME to it, or set LBDT_BUILD_CUDA=auto to build the CPU ops alone"
        )
    return nvcc


def cuda_command(nvcc: str) -> list[str]:
    """nvcc with the flags of every CUDA file, architectures included."""
    flags = [nvcc, "-std=c++20", "-O3", "-DUSE_CUDA", "-Xcompiler", "-fPIC,-Wall", "--threads", "2"]
    if os.environ.get("CXX"):  # the last word: before it a launcher such as ccache may stand
        flags += ["-ccbin", shlex.split(os.environ["CXX"])[-1]]
    return flags + gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or _visible_architectures())


def gencode(architectures: str) -> list[str]:
    """nvcc's flags for a list such as "8.0;9.0+PTX" or "9.0a 10.0"; RuntimeError for anything else."""
    flags = []
    for name in filter(None, re.split(r"[;,\s]+", architectures)):
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if found is None:
            raise RuntimeError(
                f"TORCH_CUDA_ARCH_LIST: expected architectures such as '8.0;9.0+PTX', got {name!r} in "
                f"{architectures!r}"
            )
        number = found[1] + found[2]
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if found[3]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def _visible_architectures() -> str:
    import torch

    # 8.0 serves all of 8.x, and PTX what is newer than the newest: the file runs beside other GPUs too.
    found = {(8, 0), (9, 0)}
    if torch.cuda.is_available():
        found |= {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found)) + "+PTX"


def _cuda_libraries(nvcc: str) -> Path:
    """The toolkit's library folder, from nvcc's own account: nvcc on the PATH can be a script elsewhere."""
    done = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True
    )
    found = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{nvcc} --dryrun names no toolkit (TOP=):\n{done.stdout}{done.stderr}")
    top = Path(found[1].strip())
    folders = [*sorted(top.glob("targets/*/lib")), top / "lib64", top / "lib"]
    for folder in folders:
        if (folder / "libcudart_static.a").exists():
            return folder
    raise RuntimeError(
        f"no libcudart_static.a in {', '.join(map(str, folders))}: install the CUDA toolkit's development files, or "
        "set LBDT_BUILD_CUDA=0 to build the CPU ops alone"
    )


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{' '.join(command)}\n{error}") from error
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


@functools.cache
def load() -> str | None:
    """Loads the C++ ops once; None when they are there, else the reason why not.

    Raises ImportError if a prebuilt library is present and damaged, or does not load: broken is not absent;
    ValueError as `check_variables` does.
    """
    import torch

    check_variables()
    prebuilt = _PACKAGE / LIBRARY
    if prebuilt.exists() and not _older_than_sources(prebuilt):
        try:
            reason = damage(prebuilt)
            if reason is not None:
                raise ImportError(
                    f"{prebuilt} is damaged: {reason}; delete it, or reinstall lbdt with LBDT_BUILD=1"
                )
            torch.ops.load_library(str(prebuilt))
        except OSError as error:
            raise ImportError(
                f"{prebuilt} does not load with torch {torch.__version__}, as one built for another torch does not: "
                f"{error}; delete it, or reinstall lbdt with LBDT_BUILD=1"
            ) from error
        return None
    if not sources():
        return "this installation has no C++ library (it was installed without a compiler, or LBDT_BUILD=0)"
    if os.environ.get("LBDT_JIT") == "0":
        return "the C++ library is not built, and LBDT_JIT=0 forbids building it at first use"
    try:
        output = _cached()
        try:
            torch.ops.load_library(str(output))
        except OSError:  # built by another machine that shares this folder, say
            torch.ops.load_library(str(_cached(again=True)))
    except (RuntimeError, OSError) as error:
        reason = f"building the C++ library failed: {error}"
        warnings.warn(f"lbdt: {reason}\nThe ops run in PyTorch instead.", stacklevel=2)
        return reason
    return None


def missing(op: str, device_type: str) -> str | None:
    """Why the library cannot serve the internal `op`, such as "replace_patches_cpp", there; None if it can.

    Loads the library at the first question. Raises as `load` does.
    """
    if device_type not in ("cpu", "cuda"):
        return f"needs a CPU tensor, got one on {device_type}"
    reason = load()
    if reason is None and device_type == "cuda" and not _has_cuda(op):
        return "the C++ library was built without CUDA: install nvcc and rebuild with LBDT_BUILD=1"
    return reason


@functools.cache
def _has_cuda(op: str) -> bool:
    import torch

    return torch._C._dispatch_has_kernel_for_dispatch_key(f"lbdt::{op}", "CUDA")


def _older_than_sources(library: Path) -> bool:
    return any(path.stat().st_mtime > library.stat().st_mtime for path in sources())


def _cached(again: bool = False) -> Path:
    """The library in the user's cache, built if it is not there, or not whole, or `again`."""
    import torch
    from filelock import FileLock

    facts = [torch.__version__, TORCH_TARGET, os.environ.get("CXX"), platform.machine()]
    nvcc = cuda_compiler()
    if nvcc is not None:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        facts += [cuda_command(nvcc), version]
    digest = hashlib.sha256(repr(facts).encode())
    for path in (*sources(), Path(__file__)):
        digest.update(path.read_bytes())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lbdt"
    output = base / f"{digest.hexdigest()[:16]}.so"
    if again or not _whole(output):
        base.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{output}.lock"):
            if again or not _whole(output):
                for left in base.glob(
                    f"{output.name}.*/"
                ):  # by a build that was killed: ours would wait for another
                    shutil.rmtree(left, ignore_errors=True)
                compile_extension(output)
    return output


def _whole(library: Path) -> bool:
    return library.exists() and damage(library) is None
