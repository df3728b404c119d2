"""Instructions that order others: barriers, fences, and mbarrier objects.

Source: PTX ISA, 9.7.12 (synchronisation) and 8 (memory consistency). A proxy fence makes what is known to its warp
known to the matrix units as well, wherever on the way from the write to the product it stands.
"""

import dataclasses

import numpy as np

from tests.kernels.ptx.instructions import Run, address_of, builds, reader, writer
from tests.kernels.ptx.machine import Stuck, Warp
from tests.kernels.ptx.parsing import Immediate, Instruction, NotSupported, Program
from tests.kernels.ptx.transfers import access_shared

_PATIENCE = 20000


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
        if not instruction.has("async"):
            raise NotSupported(f"{instruction.text}: a proxy other than async")

        def run(warp, on):
            warp.launch.note(warp, "fence", warp.pc)
            warp.proxy = np.maximum(warp.proxy, warp.clock)
            warp.tick()

        return run
    return lambda warp, on: None


class Mailbox:
    """An mbarrier: a phase ends when all have arrived and all announced bytes have come."""

    def __init__(self, expected: int, agents: int) -> None:
        self.expected = self.left = expected
        self.phase = 0
        self.gathered = np.zeros(agents, np.int32)
        self.clock = np.zeros(agents, np.int32)
        """What is known to who sees the last phase end."""

    def arrive(self, warp: Warp, times: int) -> None:
        self.gathered = np.maximum(self.gathered, warp.clock)
        warp.tick()
        self.left -= times
        if self.left < 0:
            raise Stuck(f"more than {self.expected} arrivals at an mbarrier in one phase")
        if self.left == 0:
            self.clock = np.maximum(self.clock, self.gathered)
            self.left, self.phase = self.expected, self.phase + 1
            warp.launch.spins = 0


@builds("mbarrier")
def _mailbox(instruction: Instruction, program: Program) -> Run:
    """init, arrive, test_wait and try_wait by parity, inval; no bytes are awaited, as there are no bulk copies."""
    if instruction.has("expect_tx"):
        raise NotSupported(f"{instruction.text}: bulk copies")
    action = instruction.parts[1]
    operands = list(instruction.operands)
    target = operands.pop(0) if action in ("arrive", "try_wait", "test_wait") else None
    address = address_of(operands.pop(0), program)
    numbers = [reader(operand, "u32", program) for operand in operands]
    tell = writer(target, "pred") if action.endswith("wait") else None
    if tell and not instruction.has("parity"):
        raise NotSupported(f"{instruction.text}: expected to wait by parity")
    if action not in ("init", "arrive", "try_wait", "test_wait", "inval"):
        raise NotSupported(f"{instruction.text}: this form of mbarrier")

    def run(warp, on):
        lanes = np.ones(32, bool) if on is None else on
        at = warp.block.shared.place(address(warp)[lanes], 8)
        place, boxes = int(at[0]), warp.block.mailboxes
        if (at != place).any():
            raise NotSupported(f"{instruction.text}: several objects at once")
        access_shared(warp, at[:1], 8, "write" if action in ("init", "inval") else "read")
        if action == "init":
            boxes[place] = Mailbox(int(numbers[0](warp)[lanes][0]), warp.launch.agents)
        elif action == "inval":
            del boxes[place]
        elif action == "arrive":
            times = int(numbers[0](warp)[lanes].sum()) if numbers else int(lanes.sum())
            boxes[place].arrive(warp, times)
        else:
            box, parity = boxes[place], int(numbers[0](warp)[lanes][0])
            ended = box.phase % 2 != parity
            if ended:
                warp.clock = np.maximum(warp.clock, box.clock)
            else:
                warp.launch.spins += 1
                if warp.launch.spins > _PATIENCE:
                    raise Stuck(f"{instruction.text}: the phase does not end")
            tell(warp, np.full(32, ended), on)

    return run


def always(instruction: Instruction, program: Program) -> Run:
    """A wait by parity that does not wait, for mutants."""
    write = writer(instruction.operands[0], "pred")
    return lambda warp, on: write(warp, np.full(32, True), on)


def weakened(instruction: Instruction) -> Instruction:
    """The wait for groups of `instruction` with one more that may be left."""
    (left,) = instruction.operands
    return dataclasses.replace(instruction, operands=(Immediate(left.bits + 1),))
