"""Matrix instructions: mma.sync, and wgmma with operands in shared memory.

Source: PTX ISA, 9.7.14 (mma: fragments) and 9.7.15 (wgmma: descriptors, swizzles, core matrices). Products are summed
in float64 within an instruction and rounded to float32 when they are added, which no hardware promises: tests take
numbers whose sums are exact.

The warps of a wgmma group run it each for itself: every warp reads its 16 rows of A and all of B. That is the weakest
reading of the rules, in which nothing holds the four together.

Registers that are written between wgmma.fence and the product, as LLVM does where it moves constants, are against the
rules; ptxas sees them and waits for every product (its message C7519). `Launch.serialised` tells of such places.
"""

import functools
import re

import numpy as np

from tests.kernels.ptx import races
from tests.kernels.ptx.exchange import halves
from tests.kernels.ptx.instructions import Run, builds, members, reader
from tests.kernels.ptx.machine import LANES, Misuse, Warp
from tests.kernels.ptx.memory import SHARED, BadAccess
from tests.kernels.ptx.parsing import Instruction, NotSupported, Program, Vector
from tests.kernels.ptx.transfers import access_shared

_ROW, _COLUMN = LANES // 4, LANES % 4
_SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes of a row of a core matrix by the descriptor's code."""
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def asynchronous_registers(program: Program) -> frozenset[int]:
    """Registers that wgmma reads and writes by itself."""
    found: set[int] = set()
    for instruction in program.code:
        if instruction.name == "wgmma" and instruction.has("mma_async"):
            for operand in instruction.operands[:2]:
                if isinstance(operand, Vector):
                    found |= {register.index for register in operand.members}
    return frozenset(found)


class _Shape:
    """m, n, k and the types of an instruction's operands."""

    def __init__(self, instruction: Instruction) -> None:
        shape = re.match(
            r"m(\d+)n(\d+)k(\d+)$",
            next(p for p in instruction.parts if p.startswith("m") and "n" in p and "k" in p),
        )
        self.m, self.n, self.k = (int(number) for number in shape.groups())
        kinds = instruction.types
        self.to, self.a, self.b = kinds[0], kinds[1], kinds[2]
        if self.to not in ("f32", "s32") or self.a != self.b or self.a not in ("f16", "bf16", "s8", "u8"):
            raise NotSupported(f"{instruction.text}: products of {self.a} and {self.b} to {self.to}")
        self.bytes = 1 if self.a.endswith("8") else 2
        self.accumulator = np.float32 if self.to == "f32" else np.int32

    def values(self, raw: np.ndarray) -> np.ndarray:
        """Raw elements as float64, which holds them and their sums exactly."""
        if self.a in ("f16", "bf16"):
            return halves(self.a)[0](np.ascontiguousarray(raw)).astype(np.float64)
        return raw.view(np.int8 if self.a == "s8" else np.uint8).astype(np.float64)

    def fragment(self, warp: Warp, registers: list[int], rows: int) -> np.ndarray:
        """[rows, k] of A's, or of B's columns [n, k], from a warp's registers."""
        each = 4 // self.bytes
        raw = np.stack([warp.registers[index] for index in registers])
        values = self.values(raw.view(_RAW[self.bytes])).reshape(len(registers), 32, each)
        matrix = np.zeros((rows, self.k))
        for i, value in enumerate(values):
            down, right = (i % 2, i // 2) if rows == 16 else (0, i)
            for j in range(each):
                matrix[_ROW + 8 * down, _COLUMN * each + j + 4 * each * right] = value[:, j]
        return matrix


@builds("mma")
def _mma(instruction: Instruction, program: Program) -> Run:
    """16 x 8, of a warp."""
    shape = _Shape(instruction)
    if (shape.m, shape.n) != (16, 8) or not instruction.has("row", "col"):
        raise NotSupported(f"{instruction.text}: expected m16n8, row by column")
    target, a, b, source = (
        [register.index for register in members(operand)] for operand in instruction.operands
    )

    def run(warp, on):
        warp.whole(on, instruction)
        product = shape.fragment(warp, a, 16) @ shape.fragment(warp, b, 8).T
        for i, (to, of) in enumerate(zip(target, source, strict=True)):
            before = warp.registers[of].view(shape.accumulator)
            after = before + product[_ROW + 8 * (i // 2), _COLUMN * 2 + i % 2]
            warp.registers[to] = after.astype(shape.accumulator).view(np.uint32)

    return run


@functools.lru_cache(maxsize=256)
def _tile(first: int, rows: int, k: int, size: int, layout: int, across: bool) -> np.ndarray:
    """Offsets [rows, k] of a tile in shared memory from its begin, before the swizzle; `layout`: of its descriptor."""
    leading, stride = ((layout >> shift & 0x3FFF) << 4 for shift in (16, 32))
    width = _SWIZZLES[layout >> 62]
    row, column = np.meshgrid(np.arange(first, first + rows), np.arange(k), indexing="ij")
    if across:
        a_row = width // size
        return row % a_row * size + row // a_row * leading + column % 8 * width + column // 8 * stride
    along = column * size
    if width == 16:
        return row // 8 * stride + row % 8 * 16 + along // 16 * leading + along % 16
    return row // 8 * stride + row % 8 * width + along


def _swizzled(addresses: np.ndarray, layout: int) -> np.ndarray:
    bits = {128: 7, 64: 3, 32: 1, 16: 0}[_SWIZZLES[layout >> 62]]
    return addresses ^ ((addresses >> 7 & bits) << 4)


class _InShared:
    """An operand that a descriptor places in shared memory."""

    def __init__(self, operand, program: Program, shape: _Shape, rows: int, across: bool) -> None:
        self._descriptor, self._shape = reader(operand, "u64", program), shape
        self._rows, self._across = rows, across

    def places(self, warp: Warp, first: int) -> np.ndarray:
        """Offsets [rows, k] in the block's shared memory of the rows from `first` on; checks bounds and order."""
        descriptors = self._descriptor(warp)
        if (descriptors != descriptors[0]).any():
            raise Misuse("a descriptor that is not the same in all lanes")
        descriptor = int(descriptors[0])
        if descriptor >> 49 & 7:
            raise NotSupported("a matrix descriptor with a base offset")
        layout = descriptor & ~0x3FFF
        begin = (descriptor & 0x3FFF) << 4
        shape = self._shape
        offsets = _tile(first, self._rows, shape.k, shape.bytes, layout, self._across)
        places = _swizzled(begin + offsets, layout) - SHARED
        if places.min() < 0 or places.max() + shape.bytes > warp.launch.shared_bytes:
            raise BadAccess(
                f"a matrix operand outside of the {warp.launch.shared_bytes} bytes of shared memory"
            )
        return places

    def load(self, warp: Warp, places: np.ndarray) -> np.ndarray:
        raw = warp.block.shared.view(self._shape.bytes)[places // self._shape.bytes]
        return self._shape.values(raw).reshape(places.shape)


@builds("wgmma")
def _wgmma(instruction: Instruction, program: Program) -> Run:
    if instruction.has("fence"):

        def fence(warp, on):
            warp.whole(on, instruction)
            warp.launch.note(warp, "register fence", warp.pc, not warp.fenced or bool(warp.unfenced))
            warp.fenced = True
            warp.unfenced.clear()

        return fence
    if instruction.has("commit_group"):
        return lambda warp, on: warp.products.commit()
    if instruction.has("wait_group"):
        left = instruction.operands[0].bits
        return lambda warp, on: warp.products.wait(left, warp.pc)
    if not instruction.has("mma_async") or instruction.has("sp"):
        raise NotSupported(f"{instruction.text}: this form of wgmma")
    return _product(instruction, program)


def _product(instruction: Instruction, program: Program) -> Run:
    shape = _Shape(instruction)
    target, a, b, scale, *flags = instruction.operands
    flags = [flag.bits for flag in flags]
    signs, across = flags[:2] or [1, 1], flags[2:]
    across = [0, *across] if isinstance(a, Vector) else across
    a_across, b_across = across or (0, 0)
    accumulators = [register.index for register in target.members]
    a_registers = [register.index for register in a.members] if isinstance(a, Vector) else []
    a_shared = None if a_registers else _InShared(a, program, shape, 16, bool(a_across))
    b_shared = _InShared(b, program, shape, shape.n, bool(b_across))
    scaled = reader(scale, "pred", program)
    sign = signs[0] * signs[1]
    used = frozenset([*accumulators, *a_registers])
    index = np.arange(len(accumulators))[:, None]
    rows, columns = _ROW + 8 * (index % 4 // 2), index // 4 * 8 + _COLUMN * 2 + index % 2

    def run(warp, on):
        warp.whole(on, instruction)
        if not warp.fenced:
            raise Misuse("registers of a matrix product that no wgmma.fence orders")
        if not used.isdisjoint(warp.unfenced):
            warp.launch.serialised.add(warp.pc)
        warp.collective.append(warp.pc)
        queue = warp.products
        known = warp.proxy if warp.launch.copies_need_fence else _with_copies(warp)
        # Other asynchronous work is known as it is to the warp.
        kinds = np.arange(len(known)) % races.AGENTS_A_WARP
        known = np.where((kinds == races.PRODUCTS) | (kinds == races.BULK), warp.clock, known)
        places = []
        for operand, first in ((a_shared, warp.index % 4 * 16), (b_shared, 0)):
            if operand is not None:
                at = operand.places(warp, first)
                access_shared(
                    warp, at.reshape(-1), shape.bytes, "read", races.PRODUCTS, queue.epoch, clock=known
                )
                places.append(at)
        keep = scaled(warp)

        def done():
            if a_shared is None:
                left = shape.fragment(warp, a_registers, 16)
            else:
                left = a_shared.load(warp, places[0])
            product = (left @ b_shared.load(warp, places[-1]).T)[rows, columns] * sign
            before = np.stack([warp.registers[at] for at in accumulators]).view(shape.accumulator)
            after = (np.where(keep, before, 0) + product).astype(shape.accumulator).view(np.uint32)
            for at, value in zip(accumulators, after, strict=True):
                warp.registers[at] = value

        warp.launch.note(warp, "use", queue.epoch, used)
        for at in used:
            queue.pending[at] = queue.epoch
        queue.add(done)

    return run


def _with_copies(warp: Warp) -> np.ndarray:
    """What the matrix units know if copies need no proxy fence."""
    copies = np.arange(len(warp.clock)) % races.AGENTS_A_WARP == races.COPIES
    return np.where(copies, warp.clock, warp.proxy)
