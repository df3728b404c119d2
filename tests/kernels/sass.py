"""Machine code of a kernel as `cuobjdump -sass` shows it: what its inner loop multiplies with, loads and waits for."""

import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_PRODUCT = re.compile(r"(?:HGMMA|IGMMA|HMMA|IMMA)\.[\w.]+|FFMA\b")
_LOAD = re.compile(r"LDG\.E(?:\.(?:CONSTANT|STRONG|SYS|GPU|EF|EL|LTC\d*B?))*(?:\.(U8|S8|U16|S16))?(?![.\w])")
# NVIDIA H100 (CUDA C++ programming guide, table of capabilities): registers, bytes of shared memory, threads.
_REGISTERS, _SHARED, _THREADS = 65536, 228 * 1024, 2048


class Code(NamedTuple):
    """Counts of the innermost loop that has products, of several the one with the largest; of the whole kernel where
    none has."""

    products: dict[str, int]
    element_loads: int
    """Loads of 4 bytes or less from global memory into registers, each of one element."""
    products_in_flight: int
    """Groups of HGMMA that the loop's wait leaves; 0 also where there is none."""
    copies_in_flight: int
    """Groups of asynchronous copies that the loop's wait leaves, -1: no wait."""


def disassembled(cubin: bytes) -> list[tuple[int, str]]:
    """(address, instruction) of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # It runs its neighbour nvdisasm.
        path = {"PATH": f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"}
        command = [TOOLS / "cuobjdump", "-sass", file.name]
        text = subprocess.run(
            command, env=os.environ | path, capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text)
    return [(int(address, 16), instruction) for address, instruction in found]


def read(code: list[tuple[int, str]]) -> Code:
    """What is counted in the innermost loop of `code`."""
    loops = []
    for address, instruction in code:
        if found := re.search(r"\bBRA(?:\.\w+)* (?:\w+, )?0x([0-9a-f]+)", instruction):
            begin = int(found[1], 16)
            inside = [text for at, text in code if begin <= at <= address]
            if begin < address and any(_PRODUCT.search(text) for text in inside):
                loops.append(inside)
    inner = min(loops, key=lambda loop: (-_largest(loop), len(loop)), default=[text for _, text in code])
    products = Counter(found[0] for text in inner if (found := _PRODUCT.search(text)))
    waits = [int(n, 0) for text in inner for n in re.findall(r"\bDEPBAR\.LE SB0, (\w+)", text)]
    flight = [int(n, 0) for text in inner for n in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb\d, (\w+)", text)]
    return Code(
        dict(products),
        sum(bool(_LOAD.search(text)) for text in inner),
        min(flight, default=0),
        min(waits, default=-1),
    )


def _largest(loop: list[str]) -> int:
    """Multiplications of the largest product of a loop, by its name: HGMMA.64x256x16, HMMA.16816."""
    names = [found[0] for text in loop if (found := _PRODUCT.search(text))]
    sizes = [re.search(r"\.(\d+)x(\d+)x(\d+)|\.(16)(8)(\d+)", name) for name in names]
    return max(math.prod(int(n) for n in size.groups() if n) if size else 1 for size in sizes)


def blocks(registers: int, warps: int, shared: int) -> int:
    """Blocks that fit an H100's multiprocessor at a time."""
    a_warp = -(-registers * 32 // 256) * 256
    return min(_REGISTERS // (a_warp * warps), _SHARED // (shared + 1024), _THREADS // (32 * warps))
