"""Instructions that change what a value is or whose it is: conversions, and the exchange between lanes.

Source: PTX ISA, 9.7.9 (cvt, shfl) and 9.7.13 (redux, vote, elect).
"""

import numpy as np

from tests.kernels.ptx.instructions import Run, builds, dtype_of, members, reader, writer
from tests.kernels.ptx.machine import LANES
from tests.kernels.ptx.parsing import Instruction, NotSupported, Program


def halves(kind: str):
    """Two functions between raw values and float32: of float16 or bfloat16, one or a pair a register."""
    if kind.startswith("f16"):
        return (
            lambda raw: raw.view(np.float16).astype(np.float32),
            lambda value: value.astype(np.float16).view(np.uint16),
        )
    return (lambda raw: (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)), _to_bfloat16


def _to_bfloat16(value: np.ndarray) -> np.ndarray:
    """The upper halves of float32, rounded to the nearest even."""
    bits = value.astype(np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


_ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@builds("cvt")
def _cvt(instruction: Instruction, program: Program) -> Run:
    """Between integers by extension or cut, to integers with saturation, of two floats to a packed pair."""
    if len(instruction.types) != 2:
        raise NotSupported(f"{instruction.text}: expected two types")
    to, of = instruction.types
    target, *sources = instruction.operands
    write = writer(target, to)
    reads = [reader(source, of, program) for source in sources]
    rounding = next((_ROUNDINGS[part] for part in instruction.parts if part in _ROUNDINGS), None)

    def floats(raw):
        return halves(of)[0](raw) if of in ("f16", "bf16") else raw

    if to in ("f16", "bf16", "f16x2", "bf16x2"):
        if not ({"rn"} & set(instruction.parts) or of[0] != "f"):
            raise NotSupported(f"{instruction.text}: expected to round to the nearest")
        store = halves(to)[1]
        # The first source is the upper half.
        return lambda warp, on: write(
            warp,
            np.stack([store(floats(read(warp))) for read in reversed(reads)], axis=1).view(dtype_of(to))[
                :, 0
            ],
            on,
        )
    (read,) = reads
    if instruction.has("sat") or instruction.has("satfinite"):
        raise NotSupported(f"{instruction.text}: saturation where it is not the rule")
    if of[0] not in "fb" or of == "b16":
        return lambda warp, on: write(warp, read(warp).astype(dtype_of(to)), on)
    if to[0] == "f":
        if rounding is None:
            return lambda warp, on: write(warp, floats(read(warp)).astype(dtype_of(to)), on)
        return lambda warp, on: write(warp, rounding(floats(read(warp))).astype(dtype_of(to)), on)
    bounds = np.iinfo(dtype_of(to))

    def to_integer(warp, on):
        value = rounding(floats(read(warp)).astype(np.float64))
        inside = np.clip(np.nan_to_num(value, nan=0.0), bounds.min, float(bounds.max))
        result = np.where(value >= float(bounds.max), bounds.max, inside.astype(dtype_of(to)))
        write(warp, result.astype(dtype_of(to)), on)

    return to_integer


@builds("shfl")
def _shfl(instruction: Instruction, program: Program) -> Run:
    """Values of other lanes; out of a segment the own one."""
    target, source, amount, clamp, _ = instruction.operands
    target, *inside_to = members(target)
    read, by, bound = (reader(o, "b32", program) for o in (source, amount, clamp))
    write, mode = writer(target, "b32"), instruction.parts[2]
    tell = writer(inside_to[0], "pred") if inside_to else None

    def run(warp, on):
        warp.whole(on, instruction)
        n, c = by(warp).astype(np.int64), bound(warp).astype(np.int64)
        segment = c >> 8 & 31
        last = (LANES & segment) | (c & 31 & ~segment)
        lane = {
            "bfly": LANES ^ (n & 31),
            "up": LANES - (n & 31),
            "down": LANES + (n & 31),
            "idx": (LANES & segment) | (n & 31 & ~segment),
        }[mode]
        inside = lane >= last if mode == "up" else lane <= last
        write(warp, read(warp)[np.where(inside, lane, LANES)], on)
        if tell:
            tell(warp, inside, on)

    return run


@builds("redux")
def _redux(instruction: Instruction, program: Program) -> Run:
    target, source, _ = instruction.operands
    read, write = reader(source, instruction.type, program), writer(target, instruction.type)
    combine = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[instruction.parts[2]]

    def run(warp, on):
        warp.whole(on, instruction)
        value = read(warp)
        write(warp, np.full(32, combine.reduce(value, dtype=value.dtype)), on)

    return run


@builds("vote")
def _vote(instruction: Instruction, program: Program) -> Run:
    target, source, _ = instruction.operands
    read = reader(source, "pred", program)
    kind, count = (
        ("b32", lambda votes: np.packbits(votes, bitorder="little").view(np.uint32)[0])
        if instruction.has("ballot")
        else ("pred", {"any": np.any, "all": np.all}[instruction.parts[2]])
    )
    write = writer(target, kind)

    def run(warp, on):
        warp.whole(on, instruction)
        write(warp, np.full(32, count(read(warp))), on)

    return run


@builds("elect")
def _elect(instruction: Instruction, program: Program) -> Run:
    lane, chosen = members(instruction.operands[0])
    write, tell = writer(lane, "b32"), writer(chosen, "pred")

    def run(warp, on):
        warp.whole(on, instruction)
        write(warp, np.zeros(32, np.uint32), on)
        tell(warp, LANES == 0, on)

    return run
