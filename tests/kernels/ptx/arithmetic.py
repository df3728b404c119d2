"""Instructions on registers: integers, floats and predicates.

Source: PTX ISA, chapter 9.7. float32 is computed by numpy (no flush of denormals), fused products in float64.
"""

import numpy as np

from tests.kernels.ptx.exchange import halves
from tests.kernels.ptx.instructions import (
    SIGNED,
    UNSIGNED,
    Run,
    builds,
    dtype_of,
    reader,
    width_of,
    writer,
)
from tests.kernels.ptx.parsing import Instruction, NotSupported, Program, Vector

_BITS = np.array([bin(value).count("1") for value in range(256)], np.uint8)


def _map(instruction: Instruction, program: Program, function, kind: str | None = None) -> Run:
    """An instruction that is `function` of its operands, all of one type."""
    kind = kind or instruction.type
    target, *sources = instruction.operands
    write, reads = writer(target, kind), [reader(source, kind, program) for source in sources]
    if len(reads) == 2:
        first, second = reads
        return lambda warp, on: write(warp, function(first(warp), second(warp)), on)
    return lambda warp, on: write(warp, function(*(read(warp) for read in reads)), on)


def _in_floats(instruction: Instruction, program: Program, function) -> Run:
    """`function` in float32 for half precision, packed or not, in the type itself otherwise."""
    kind = instruction.type
    if kind not in ("f16", "f16x2", "bf16", "bf16x2"):
        return _map(instruction, program, function)
    load, store = halves(kind)

    def packed(*raws):
        values = [load(raw) for raw in raws]
        return store(function(*values)).view(raws[0].dtype)

    return _map(instruction, program, packed)


@builds("add", "sub", "mul", "min", "max", "neg", "abs", "div", "rem", "sqrt")
def _arithmetic(instruction: Instruction, program: Program) -> Run:
    if instruction.name == "mul" and not instruction.type.startswith(("f", "bf")):
        return _product(instruction, program)
    if instruction.has("cc") or instruction.has("sat"):
        raise NotSupported(f"{instruction.text}: carries and saturation")
    floating = instruction.type.startswith(("f", "bf"))
    nan = instruction.has("NaN")
    function = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "neg": np.negative,
        "abs": np.abs,
        "min": np.minimum if nan or not floating else np.fmin,
        "max": np.maximum if nan or not floating else np.fmax,
        "div": np.divide if floating else _quotient,
        "rem": _remainder,
        "sqrt": np.sqrt,
    }[instruction.name]
    return _in_floats(instruction, program, function)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cut off towards zero; all ones by 0."""
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _quotient(a, b) * b


def _product(instruction: Instruction, program: Program) -> Run:
    """mul and mad of integers: lo, hi or wide."""
    kind = instruction.type
    target, first, second, *third = instruction.operands
    a, b = reader(first, kind, program), reader(second, kind, program)
    signed, width = kind[0] == "s", width_of(kind)
    wide = (SIGNED if signed else UNSIGNED)[min(2 * width, 8)]
    if instruction.has("wide"):
        result = f"{kind[0]}{16 * width}"

        def product(warp):
            return a(warp).astype(wide) * b(warp).astype(wide)

    elif instruction.has("hi"):
        if width == 8:
            raise NotSupported(f"{instruction.text}: the upper half of 128 bits")
        result = kind

        def product(warp):
            whole = a(warp).astype(wide) * b(warp).astype(wide)
            return (whole >> (8 * width)).astype(dtype_of(kind))

    else:
        result = kind

        def product(warp):
            return a(warp) * b(warp)

    write = writer(target, result)
    if not third:
        return lambda warp, on: write(warp, product(warp), on)
    c = reader(third[0], result, program)
    return lambda warp, on: write(warp, product(warp) + c(warp), on)


@builds("mad")
def _mad(instruction: Instruction, program: Program) -> Run:
    return _product(instruction, program)


@builds("fma")
def _fma(instruction: Instruction, program: Program) -> Run:
    """Rounded once, up to the rounding of the sum to float64."""

    def fused(a, b, c):
        return (a.astype(np.float64) * b + c).astype(a.dtype)

    return _in_floats(instruction, program, fused)


@builds("and", "or", "xor", "not", "cnot")
def _logic(instruction: Instruction, program: Program) -> Run:
    function = {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "not": np.invert,
        "cnot": lambda a: (a == 0).astype(a.dtype),
    }[instruction.name]
    return _map(instruction, program, function)


@builds("lop3")
def _lop3(instruction: Instruction, program: Program) -> Run:
    target, *sources, table = instruction.operands
    reads, write = [reader(source, "b32", program) for source in sources], writer(target, "b32")
    minterms = [index for index in range(8) if table.bits >> index & 1]

    def run(warp, on):
        values = [read(warp) for read in reads]
        result = np.zeros(32, np.uint32)
        for index in minterms:
            a, b, c = (v if index >> (2 - i) & 1 else ~v for i, v in enumerate(values))
            result |= a & b & c
        write(warp, result, on)

    return run


@builds("shl", "shr")
def _shift(instruction: Instruction, program: Program) -> Run:
    """Shifts by the width or more leave nothing, or the sign."""
    kind = instruction.type
    target, source, amount = instruction.operands
    value, by, write = reader(source, kind, program), reader(amount, "u32", program), writer(target, kind)
    bits, left = 8 * width_of(kind), instruction.name == "shl"
    dtype = dtype_of(kind)

    def run(warp, on):
        x, n = value(warp), by(warp)
        far = n >= bits
        n = np.minimum(n, bits - 1).astype(dtype)
        result = x << n if left else x >> n
        if far.any():
            result = np.where(
                far, -(x < 0).astype(dtype) if kind[0] == "s" and not left else dtype(0), result
            )
        write(warp, result.astype(dtype), on)

    return run


@builds("shf")
def _funnel(instruction: Instruction, program: Program) -> Run:
    target, *sources = instruction.operands
    low, high, by = (reader(source, "u32", program) for source in sources)
    write, left, wrap = writer(target, "b32"), instruction.has("l"), instruction.has("wrap")

    def run(warp, on):
        n = by(warp) & 31 if wrap else np.minimum(by(warp), 32)
        whole = high(warp).astype(np.uint64) << np.uint64(32) | low(warp)
        shifted = (whole << n.astype(np.uint64)) >> np.uint64(32) if left else whole >> n.astype(np.uint64)
        write(warp, shifted.astype(np.uint32), on)

    return run


@builds("bfe")
def _extract(instruction: Instruction, program: Program) -> Run:
    kind = instruction.type
    target, source, *places = instruction.operands
    value, write = reader(source, kind, program), writer(target, kind)
    begin, size = (reader(place, "u32", program) for place in places)
    bits, dtype = 8 * width_of(kind), dtype_of(kind)

    def run(warp, on):
        first, count = np.minimum(begin(warp) & 255, bits), size(warp) & 255
        count = np.minimum(count, bits - first)
        # To the top, and down again: the sign follows.
        up, down = bits - first - count, bits - count
        x = value(warp) << np.minimum(up, bits - 1).astype(dtype)
        write(warp, np.where(count == 0, dtype(0), x >> np.minimum(down, bits - 1).astype(dtype)), on)

    return run


@builds("bfi")
def _insert(instruction: Instruction, program: Program) -> Run:
    kind = instruction.type
    target, source, into, *places = instruction.operands
    value, base, write = reader(source, kind, program), reader(into, kind, program), writer(target, kind)
    begin, size = (reader(place, "u32", program) for place in places)
    dtype = dtype_of(kind)

    def run(warp, on):
        first, count = begin(warp).astype(np.uint64), size(warp).astype(np.uint64)
        mask = (((np.uint64(1) << count) - np.uint64(1)) << first).astype(dtype)
        write(warp, (base(warp) & ~mask) | ((value(warp) << first.astype(dtype)) & mask), on)

    return run


@builds("bfind")
def _highest_bit(instruction: Instruction, program: Program) -> Run:
    """The place of the highest bit that is set, with `shiftamt` how far it is from the top; all ones where none is."""
    kind = instruction.type
    if kind[0] != "u":
        raise NotSupported(f"{instruction.text}: the highest bit of a signed value")
    target, source = instruction.operands
    read, write = reader(source, kind, program), writer(target, "u32")
    top = 8 * width_of(kind) - 1

    def place(value: int) -> int:
        highest = int(value).bit_length() - 1
        if highest < 0:
            return 0xFFFFFFFF
        return top - highest if instruction.has("shiftamt") else highest

    return lambda warp, on: write(warp, np.array([place(v) for v in read(warp)], np.uint32), on)


@builds("popc", "clz", "brev")
def _bits(instruction: Instruction, program: Program) -> Run:
    target, source = instruction.operands
    read, write = reader(source, instruction.type, program), writer(target, "u32")
    if instruction.name == "popc":
        return lambda warp, on: write(
            warp, _BITS[read(warp).view(np.uint8).reshape(32, -1)].sum(axis=1).astype(np.uint32), on
        )
    digits = 8 * width_of(instruction.type)
    if instruction.name == "clz":

        def zeros(value: int) -> int:
            return digits - int(value).bit_length()

    else:

        def zeros(value: int) -> int:
            return int(f"{int(value):0{digits}b}"[::-1], 2)

    return lambda warp, on: write(warp, np.array([zeros(v) for v in read(warp)], np.uint32), on)


@builds("prmt")
def _permute(instruction: Instruction, program: Program) -> Run:
    target, *sources = instruction.operands
    a, b, selector = (reader(source, "b32", program) for source in sources)
    write = writer(target, "b32")

    def run(warp, on):
        pool = np.stack([a(warp), b(warp)], axis=1).view(np.uint8)  # [32, 8]
        nibbles = (selector(warp)[:, None] >> np.array([0, 4, 8, 12], np.uint32)) & 15
        picked = np.take_along_axis(pool, (nibbles & 7).astype(np.int64), axis=1)
        sign = np.where(picked & 0x80, 0xFF, 0).astype(np.uint8)
        write(warp, np.ascontiguousarray(np.where(nibbles & 8, sign, picked)).view(np.uint32)[:, 0], on)

    return run


_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "equ": lambda a, b: ~(np.not_equal(a, b) & (a == a) & (b == b)),
    "neu": lambda a, b: ~np.equal(a, b),
    "ltu": lambda a, b: ~np.greater_equal(a, b),
    "leu": lambda a, b: ~np.greater(a, b),
    "gtu": lambda a, b: ~np.less_equal(a, b),
    "geu": lambda a, b: ~np.less(a, b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}


@builds("setp")
def _setp(instruction: Instruction, program: Program) -> Run:
    kind = instruction.type
    load = halves(kind)[0] if kind in ("f16", "bf16") else None
    compare = _COMPARISONS[instruction.parts[1]]
    if kind[0] == "f" and instruction.parts[1] == "ne":  # ordered, as numpy's is not
        compare = lambda a, b: np.not_equal(a, b) & (a == a) & (b == b)  # noqa: E731
    target, first, second, *with_ = instruction.operands
    a, b = reader(first, kind, program), reader(second, kind, program)
    if isinstance(target, Vector):
        raise NotSupported(f"{instruction.text}: two predicates")
    write = writer(target, "pred")
    if load is not None:
        return lambda warp, on: write(warp, compare(load(a(warp)), load(b(warp))), on)
    if not with_:
        return lambda warp, on: write(warp, compare(a(warp), b(warp)), on)
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[instruction.parts[2]]
    other = reader(with_[0], "pred", program)
    return lambda warp, on: write(warp, join(compare(a(warp), b(warp)), other(warp)), on)


@builds("selp")
def _selp(instruction: Instruction, program: Program) -> Run:
    kind = instruction.type
    target, first, second, which = instruction.operands
    a, b = reader(first, kind, program), reader(second, kind, program)
    choose, write = reader(which, "pred", program), writer(target, kind)
    return lambda warp, on: write(warp, np.where(choose(warp), a(warp), b(warp)), on)


@builds("mov")
def _mov(instruction: Instruction, program: Program) -> Run:
    """A copy; between a register and the vector of its parts, packing and unpacking."""
    kind = instruction.type
    target, source = instruction.operands
    if isinstance(source, Vector):
        width = width_of(kind) // len(source.members)
        reads = [reader(member, f"b{8 * width}", program) for member in source.members]
        write = writer(target, kind)
        whole = UNSIGNED[width_of(kind)]
        return lambda warp, on: write(
            warp, np.stack([read(warp) for read in reads], axis=1).view(whole)[:, 0], on
        )
    read = reader(source, kind, program)
    if isinstance(target, Vector):
        width = width_of(kind) // len(target.members)
        writes = [writer(member, f"b{8 * width}") for member in target.members]

        def unpack(warp, on):
            parts = read(warp).view(UNSIGNED[width]).reshape(32, -1)
            for place, write in enumerate(writes):
                write(warp, parts[:, place].copy(), on)

        return unpack
    write = writer(target, kind)
    return lambda warp, on: write(warp, read(warp), on)
