"""The CUDA C++ ops as nvcc's PTX in the machine: what their own host code launches, and with what.

nvcc compiles csrc/cuda with the build's own flags, but to PTX, and links the host code with a stand-in for the CUDA
runtime (recorded_launches.cpp). So kernels, grids, shared memory and the bytes of arguments are those of the ops.
"""

import atexit
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

import lbdt.ops  # noqa: F401 - defines the schemas
from lbdt import _build
from tests.kernels.ptx.memory import BadAccess, GlobalMemory
from tests.kernels.ptx.parsing import entries
from tests.kernels.ptx.running import Ready, Runnable, distinct, prepared
from tests.layouts import bits

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCH = 90
PLAIN_SHARED = 48 << 10
"""Bytes of shared memory that a kernel has without asking (CUDA C++ programming guide, table of capabilities)."""


class Launch(NamedTuple):
    """A launch as the CUDA runtime is told of it."""

    kernel: str
    """Mangled."""
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    """Bytes beside those of the kernel's own variables."""
    asked: int
    """As many of them as the kernel was allowed beyond `PLAIN_SHARED`; 0: it did not ask."""
    arguments: list[bytes]


_TELL = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p),
)


class Library:
    """The ops as torch.ops.lbdt_recorded, on CPU tensors, and their kernels: `entries`, PTX by mangled name."""

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, str] = {}
        library = _compile(folder)
        for module in sorted(folder.glob("*.ptx")):
            self.entries |= entries(module.read_text())
        done = subprocess.run(
            ["c++filt"], input="\n".join(self.entries), capture_output=True, text=True, check=True
        )
        self.names = {
            mangled: re.search(r"(\w+_kernel<.*?>)\(", name)[1]
            for mangled, name in zip(self.entries, done.stdout.splitlines(), strict=True)
        }
        """Such as "replace_rows_kernel<unsigned short, 8, 1>", by mangled name."""
        self._definitions = torch.library.Library("lbdt_recorded", "FRAGMENT")
        for path in _sources():
            for name in re.findall(r'\bm\.impl\("(\w+)"', path.read_text()):
                schema = str(getattr(torch.ops.lbdt, name).default._schema)
                self._definitions.define(schema.removeprefix("lbdt::"))
        torch.ops.load_library(str(library))
        self._host = ctypes.CDLL(str(library))
        self._launches: list[Launch] = []
        self._tell = _TELL(self._launched)

    def record(self, op: str, units: int, *arguments) -> list[Launch]:
        """What the internal `op` launches on a GPU of so many multiprocessors."""
        self._launches.clear()
        self._host.record_launches(self._tell, units)
        getattr(torch.ops.lbdt_recorded, op)(*arguments)
        return list(self._launches)

    def _launched(self, kernel, shape, shared, asked, arguments) -> None:
        name = kernel.decode()
        parameters = prepared(self.entries[name])[0].parameters.values()
        values = [ctypes.string_at(arguments[p.place], p.size) for p in parameters]
        self._launches.append(Launch(name, tuple(shape[:3]), tuple(shape[3:6]), shared, asked, values))


def _sources() -> list[Path]:
    return [path for path in _build.sources() if path.suffix == ".cu"]


def _compile(folder: Path) -> Path:
    """The ops for the machine in `folder`, with the PTX of each file beside them; raises RuntimeError."""
    if NVCC is None:
        raise RuntimeError("the CUDA kernels need nvcc: install the CUDA toolkit, or ask for Triton's alone")
    root = Path(torch.__file__).parent
    command = _build.cuda_command(NVCC)
    command = command[: command.index("-gencode")]  # to PTX alone: no machine code is wanted
    output = folder / "recorded.so"
    command += [
        *("-gencode", f"arch=compute_{ARCH},code=compute_{ARCH}", "--keep", "--keep-dir", str(folder)),
        *("-Xcompiler", "-O0", f"-DTORCH_TARGET_VERSION={_build.TORCH_TARGET}"),
        *(f"-I{root / 'include'}", f"-I{_build._SOURCES}"),
        *("--shared", "--cudart", "none", "-Xlinker", "-Bsymbolic,-zdefs"),
        *map(str, _sources()),
        *(str(Path(__file__).with_name("recorded_launches.cpp")), f"-L{root / 'lib'}", "-ltorch_cpu"),
        *("-o", str(output)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return output


@functools.cache
def library() -> Library:
    """Compiled once a process."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Library(Path(folder.name))


class CudaRun(Runnable):
    """A case of `tests.kernels.ptx.cuda_cases`, compiled for sm_`ARCH`."""

    def __init__(self, case) -> None:
        call = case.call()
        self.recorded = library().record(call.op, case.units, *call.given)
        memory = GlobalMemory(distinct(call.tensors))
        launches = [ready(launch, memory) for launch in self.recorded]
        super().__init__(launches, memory, call.outputs, call.expected)

    @staticmethod
    def same(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """Bits."""
        return got == expected if got.dtype == torch.bool else bits(got) == bits(expected)


def ready(launch: Launch, memory: GlobalMemory) -> Ready:
    """A launch on the tensors of `memory`; raises `BadAccess` for one that a GPU would refuse."""
    name, ptx = library().names[launch.kernel], library().entries[launch.kernel]
    program, _ = prepared(ptx)
    if launch.block != (program.threads, 1, 1):
        raise BadAccess(
            f"{name}: launched with blocks of {launch.block}, compiled for {program.threads} threads"
        )
    own = sum(variable.size for variable in program.shared.values() if variable.size > 0)
    if own + launch.shared > PLAIN_SHARED and launch.asked < launch.shared:
        raise BadAccess(
            f"{name}: {launch.shared} bytes of shared memory beside its own {own}, of which it asked for {launch.asked}"
        )
    arguments = [memory.translated(argument) for argument in launch.arguments]
    return Ready(name, ptx, program.static_bytes + launch.shared, launch.grid, arguments, memory)
