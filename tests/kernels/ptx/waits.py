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
    if not instruction.has("sync"):
        raise NotSupported(f"{instruction.text}: expected bar.sync")
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
