"""Instructions made ready to run: a table from opcode to builder, operands, and control flow.

A builder takes an `Instruction` and its `Program` and returns `run(warp, on)`, `on` being the lanes [32] that take
part, or None for all. Values of registers are unsigned [32] arrays of the register's width, never changed in place.
"""

import functools
from collections.abc import Callable

import numpy as np

from tests.kernels.ptx import machine
from tests.kernels.ptx.memory import LOCAL, SHARED
from tests.kernels.ptx.parsing import (
    Address,
    Immediate,
    Instruction,
    NotSupported,
    Program,
    Register,
    Special,
    Symbol,
    Vector,
)

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOATS = {2: np.float16, 4: np.float32, 8: np.float64}
Run = Callable[[machine.Warp, np.ndarray | None], object]
_BUILDERS: dict[str, Callable[[Instruction, Program], Run]] = {}


def builds(*names: str):
    """Registers the builder of the opcodes that begin with one of `names`."""

    def register(builder):
        for name in names:
            _BUILDERS[name] = builder
        return builder

    return register


def prepare(program: Program) -> list[machine.Step]:
    """All of a program; raises `NotSupported` with the text of what the runner does not know."""
    from tests.kernels.ptx import arithmetic, bulk, exchange, matrices, transfers, waits  # noqa: F401

    in_flight = matrices.asynchronous_registers(program)
    return [step(instruction, program, in_flight) for instruction in program.code]


def step(instruction: Instruction, program: Program, in_flight: frozenset[int]) -> machine.Step:
    """One instruction. `in_flight`: registers that matrix products use by themselves."""
    guard = -1 if instruction.guard is None else instruction.guard.index
    if instruction.name in ("bra", "ret", "exit"):
        target = -1
        if instruction.name == "bra":
            label = instruction.operands[0].name
            if label not in program.labels:
                raise NotSupported(f"{instruction.text}: no such label")
            target = program.labels[label]
        kind = machine.BRANCH if instruction.name == "bra" else machine.EXIT
        return machine.Step(kind, None, guard, instruction.negated, target)
    builder = _BUILDERS.get(instruction.name)
    if builder is None:
        raise NotSupported(f"{instruction.text}: the runner has no {instruction.name}")
    try:
        run = builder(instruction, program)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise NotSupported(f"{instruction.text}: this form of {instruction.name} ({error!r})") from error
    used = instruction.registers() & in_flight
    if used and instruction.name != "wgmma":
        run = _watched(run, used, instruction)
    kind = machine.WAIT if getattr(run, "waits", False) else machine.PLAIN
    return machine.Step(kind, run, guard, instruction.negated, -1)


def _watched(run: Run, used: frozenset[int], instruction: Instruction) -> Run:
    """`run` of an instruction that touches registers of matrix products: none may be in flight."""

    def watched(warp, on):
        if warp.products.pending and not used.isdisjoint(warp.products.pending):
            raise machine.Misuse("a register of a matrix product that was not waited for")
        warp.unfenced |= used
        warp.launch.note(warp, "touch", used)
        return run(warp, on)

    return watched


@functools.cache
def width_of(kind: str) -> int:
    """Bytes of a type such as s32 or f16x2."""
    if kind == "pred":
        return 1
    bits = kind.removesuffix("x2").lstrip("bsuf")
    return int(bits) // 8 * (2 if kind.endswith("x2") else 1)


@functools.cache
def dtype_of(kind: str) -> type:
    """The numpy type in which `kind` is computed; bits and bfloat16 as unsigned integers."""
    if kind == "pred":
        return np.bool_
    if kind.startswith("bf") or kind.endswith("x2"):
        return UNSIGNED[width_of(kind)]
    return {"s": SIGNED, "f": FLOATS}.get(kind[0], UNSIGNED)[width_of(kind)]


def reader(operand, kind: str, program: Program) -> Callable[[machine.Warp], np.ndarray]:
    """What gives the operand's value, [32] of `dtype_of(kind)`."""
    dtype, width = dtype_of(kind), width_of(kind)
    match operand:
        case Register(index, has, predicate):
            if predicate or has == width:
                if predicate or dtype is UNSIGNED[width]:
                    return lambda warp: warp.registers[index]
                return lambda warp: warp.registers[index].view(dtype)
            raw = UNSIGNED[width]
            return lambda warp: warp.registers[index].astype(raw).view(dtype)
        case Immediate(bits):
            if kind == "pred":
                value = np.full(32, bool(bits))
            else:
                value = np.full(32, bits & ((1 << 8 * width) - 1), UNSIGNED[width]).view(dtype)
            return lambda warp: value
        case Special(name):
            return _special(name, UNSIGNED[width])
        case Symbol(name):
            offset = program.local(name)
            if offset is None and name in program.parameters:
                offset = program.parameters[name].offset
            elif offset is None:
                offset = program.shared[name].offset + SHARED
            value = np.full(32, offset, UNSIGNED[width])
            return lambda warp: value
    raise NotSupported(f"{operand}: an operand of type {kind}")


def _special(name: str, raw: type) -> Callable[[machine.Warp], np.ndarray]:
    axis = "xyz".find(name[-1]) if "." in name else 0
    lanes = machine.LANES.astype(raw)
    match name.partition(".")[0]:
        case "%tid":
            if axis:
                return lambda warp: np.zeros(32, raw)
            return lambda warp: lanes + raw(warp.index * 32)
        case "%laneid":
            return lambda warp: lanes
        case "%ctaid":
            return lambda warp: np.full(32, warp.block.position[axis], raw)
        case "%nctaid":
            return lambda warp: np.full(32, warp.launch.grid[axis], raw)
        case "%ntid":
            return lambda warp: np.full(32, warp.launch.program.threads if axis == 0 else 1, raw)
    raise NotSupported(f"{name}: a special register that the runner does not have")


def writer(operand, kind: str) -> Callable[[machine.Warp, np.ndarray, np.ndarray | None], None]:
    """What writes a value [32] of `dtype_of(kind)` to a register, of whatever width that has."""
    if isinstance(operand, Symbol) and operand.name == "_":
        return lambda warp, value, on: None
    index, has, predicate = operand
    if predicate:
        return lambda warp, value, on: warp.write(operand, value, on)
    raw, own = UNSIGNED[width_of(kind)], UNSIGNED[has]
    # Into a wider register loads and conversions extend by the sign of their type.
    extended = SIGNED[has] if kind[0] == "s" else own
    signed = dtype_of(kind)

    def write(warp, value, on):
        value = value.view(raw)
        if raw is not own:
            value = value.view(signed if kind[0] == "s" else raw).astype(extended).view(own)
        if on is not None:
            value = np.where(on, value, warp.registers[index])
        warp.registers[index] = value

    return write


def members(operand) -> tuple:
    """The registers of a vector, or the one."""
    return operand.members if isinstance(operand, Vector) else (operand,)


def address_of(operand: Address, program: Program) -> Callable[[machine.Warp], np.ndarray]:
    """What gives the addresses [32], int64."""
    offset = operand.offset
    if isinstance(operand.base, Register) and operand.base.width == 4:
        read = reader(operand.base, "u32", program)
        return lambda warp: read(warp).astype(np.int64) + offset
    read = reader(operand.base, "u64", program)
    return lambda warp: read(warp).view(np.int64) + offset


@builds("cvta")
def _cvta(instruction: Instruction, program: Program) -> Run:
    """Generic addresses: those of local memory lie apart."""
    target, source = instruction.operands
    read, write = reader(source, "u64", program), writer(target, "u64")
    if instruction.has("param"):
        raise NotSupported(f"{instruction.text}: generic addresses of parameters")
    offset = np.uint64(LOCAL if instruction.has("local") else 0)
    if instruction.has("to"):
        return lambda warp, on: write(warp, read(warp) - offset, on)
    return lambda warp, on: write(warp, read(warp) + offset, on)


@builds("createpolicy", "nanosleep", "prefetch", "discard", "griddepcontrol", "setmaxnreg")
def _nothing(instruction: Instruction, program: Program) -> Run:
    """Changes no value."""
    return lambda warp, on: None
