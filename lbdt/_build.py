"""Finds or builds the C++ ops: prebuilt `lbdt/_C.abi3.so`, else a user cache, else a build at first use.

Needs g++ and an importable torch; no Python headers, no pybind11: the file is LibTorch stable ABI (2.11 or
later). setup.py loads this file by path, so it imports nothing of lbdt.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch that the binary loads in
LIBRARY = "_C.abi3.so"

_PACKAGE = Path(__file__).resolve().parent
_SOURCES = _PACKAGE.parent / "csrc"


def sources() -> list[Path]:
    """The C++ files of the checkout, empty in an installed wheel."""
    return sorted(_SOURCES.glob("cpu/*.cpp"))


def compile_extension(output: Path) -> None:
    """Compile `sources()` into the shared library `output`, moved there whole.

    Raises RuntimeError with the compiler's own words, or naming what is missing.
    """
    import torch

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("no C++ compiler: install g++ or set CXX")
    if not sources():
        raise RuntimeError(f"no C++ sources in {_SOURCES}")
    root = Path(torch.__file__).parent
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        built = Path(folder) / LIBRARY
        command = [compiler, "-std=c++20", "-O3", "-fPIC", "-shared", "-Wall", "-ffp-contract=off"]
        command += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-I{root / 'include'}"]
        command += [str(path) for path in sources()]
        command += [f"-L{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        os.replace(built, output)


@functools.cache
def load() -> str | None:
    """Load the C++ ops once; None when they are there, else the reason why not.

    Raises ImportError if a prebuilt library is present and does not load: broken is not absent.
    """
    import torch

    prebuilt = _PACKAGE / LIBRARY
    if prebuilt.exists() and not _older_than_sources(prebuilt):
        try:
            torch.ops.load_library(str(prebuilt))
        except OSError as error:
            raise ImportError(
                f"{prebuilt} was built for another torch than {torch.__version__} and fails: {error}; "
                "delete it, or reinstall lbdt with LBDT_BUILD=1"
            ) from error
        return None
    if not sources():
        return "this installation has no C++ library (it was installed without a compiler, or LBDT_BUILD=0)"
    if os.environ.get("LBDT_JIT") == "0":
        return "the C++ library is not built, and LBDT_JIT=0 forbids building it at first use"
    try:
        torch.ops.load_library(str(_cached()))
    except (RuntimeError, OSError) as error:
        reason = f"building the C++ library failed: {error}"
        warnings.warn(f"lbdt: {reason}\nThe ops run in PyTorch instead.", stacklevel=2)
        return reason
    return None


def _older_than_sources(library: Path) -> bool:
    return any(path.stat().st_mtime > library.stat().st_mtime for path in sources())


def _cached() -> Path:
    import torch
    from filelock import FileLock

    digest = hashlib.sha256(f"{torch.__version__} {TORCH_TARGET} {os.environ.get('CXX')}".encode())
    for path in (*sources(), Path(__file__)):
        digest.update(path.read_bytes())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lbdt"
    output = base / f"{digest.hexdigest()[:16]}.so"
    if not output.exists():
        base.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{output}.lock"):
            if not output.exists():
                compile_extension(output)
    return output
