"""Instructions that order others: barriers and fences; what mutants put in place of waits.

Source: PTX ISA, 9.7.12 (synchronisation) and 8 (memory consistency). A proxy fence makes what is known to its warp
known to the matrix units as well, wherever on the way from the write to the product it stands.
"""

import dataclasses

import numpy as np

from tests.kernels.ptx.instructions import Run, builds, reader, writer
from tests.kernels.ptx.parsing import Immediate, Instruction, NotSupported, Program


@builds("bar", "barrier")
def _barrier(instruction: Instruction, program: Program) -> Run:
    if instruction.has("red"):
        return _reduction(instruction, program)
    if not instruction.has("sync"):
        raise NotSupported(f"{instruction.text}: expected bar.sync or bar.red")
    if instruction.has("warp"):
        return lambda warp, on: warp.whole(on, instruction)
    numbers = [reader(operand, "u32", program) for operand in instruction.operands]

    def run(warp, on):
        warp.whole(on, instruction)
        barrier, *threads = (int(number(warp)[0]) for number in numbers)
        warp.block.arrive(warp, barrier, threads[0] if threads else program.threads)
        return False

    run.waits = True
    return run


_JOINS = {"or": np.any, "and": np.all, "popc": np.count_nonzero}


def _reduction(instruction: Instruction, program: Program, alone: bool = False) -> Run:
    """bar.red over all threads of the block. `alone`: of each warp by itself, which waits for nobody."""
    target, barrier, *threads, source = instruction.operands
    join = next((_JOINS[part] for part in instruction.parts if part in _JOINS), None)
    if join is None or threads:
        raise NotSupported(f"{instruction.text}: expected or, and or popc over the whole block")
    kind = "u32" if join is np.count_nonzero else "pred"
    number, read, write = (
        reader(barrier, "u32", program),
        reader(source, "pred", program),
        writer(target, kind),
    )

    def value(votes):
        return np.full(32, join(votes), np.uint32 if kind == "u32" else bool)

    if alone:
        return lambda warp, on: write(warp, value(read(warp)), on)

    def run(warp, on):
        warp.whole(on, instruction)
        warp.vote = read(warp)
        here = warp.block.arrive(warp, int(number(warp)[0]), program.threads)
        for other in here:
            together = value([member.vote for member in here])
            other.launch.note(other, "vote", other.pc - 1, bool((value(other.vote) != together).any()))
            write(other, together, None)
        return False

    run.waits = True
    return run


def by_itself(instruction: Instruction, program: Program) -> Run:
    """A bar.red in which each warp hears of its own lanes alone, for mutants."""
    return _reduction(instruction, program, alone=True)


@builds("fence", "membar")
def _fence(instruction: Instruction, program: Program) -> Run:
    """fence.proxy.async; memory fences change nothing here, as what they order is published by barriers and atomics."""
    if instruction.has("proxy"):
        if instruction.has("tensormap_generic"):  # its maps are no bytes here
            return lambda warp, on: None
        if not instruction.has("async"):
            raise NotSupported(f"{instruction.text}: a proxy other than async")

        def run(warp, on):
            warp.launch.note(warp, "fence", warp.pc)
            warp.proxy = np.maximum(warp.proxy, warp.clock)
            warp.tick()

        return run
    return lambda warp, on: None


def always(instruction: Instruction, program: Program) -> Run:
    """A wait by parity that does not wait, for mutants."""
    write = writer(instruction.operands[0], "pred")
    return lambda warp, on: write(warp, np.full(32, True), on)


def weakened(instruction: Instruction) -> Instruction:
    """The wait for groups of `instruction` with one more that may be left."""
    (left,) = instruction.operands
    return dataclasses.replace(instruction, operands=(Immediate(left.bits + 1),))
