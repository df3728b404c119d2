"""A launch on the machine: blocks of warps of 32 lanes, scheduled at random between synchronisations.

Every warp runs its lanes together; where they part, those at the lowest place of the program go first, so that they
meet again. A warp runs until it has to wait, or for a random number of instructions. Asynchronous copies and matrix
products take effect when a wait forces them, at once, or at either, by the launch's seed.
"""

import random
from typing import NamedTuple

import numpy as np

from tests.kernels.ptx import races
from tests.kernels.ptx.memory import LOCAL, BadAccess, GlobalMemory, parameters, shared_memory
from tests.kernels.ptx.parsing import Instruction, Program, Register

LANES = np.arange(32)
PLAIN, BRANCH, EXIT, WAIT = range(4)
_LONGEST = 400
_NO_END = 1 << 60


class Stuck(Exception):
    """No warp can go on."""


class Misuse(Exception):
    """An instruction that is used against its rules: by a part of a warp, on registers that are in use."""


class Step(NamedTuple):
    """An instruction made ready: what the loop of a warp looks at."""

    kind: int
    run: object
    guard: int
    """Index of the register, -1: none."""
    negated: bool
    target: int


class Warp:
    """32 lanes: registers, place in the program, and what is known of others."""

    def __init__(self, block: "Block", index: int) -> None:
        launch = block.launch
        self.block, self.index, self.launch = block, index, launch
        self.registers = list(launch.poison)
        self.pc, self.on = 0, None
        """The place of the lanes that run, and which they are; None: all."""
        self.apart: list[tuple[int, np.ndarray]] = []
        self.meet = _NO_END
        self.done = False
        self.waiting: str | None = None
        self.vote: np.ndarray | None = None
        """What its lanes brought to the last reduction at a barrier."""
        self.agent = (block.index * launch.warps + index) * races.AGENTS_A_WARP
        self.clock = np.zeros(launch.agents, np.int32)
        self.clock[self.agent] = 1
        self.proxy = np.zeros(launch.agents, np.int32)
        """The part of the clock that a proxy fence has made known to the matrix units."""
        self.copies = _Queue(self, races.COPIES)
        self.products = _Queue(self, races.PRODUCTS)
        self.fenced = False
        self.unfenced: set[int] = set()
        self.local = np.full((32, max(launch.program.local_bytes, 1)), 0xFF, np.uint8)
        self.collective: list[int] = []
        """Places of the matrix products so far: those of a warp group have to be the same."""

    @property
    def epoch(self) -> int:
        return int(self.clock[self.agent])

    def write(self, register: Register, value: np.ndarray, on) -> None:
        """Sets the lanes of `on` (None: all)."""
        if on is not None:
            value = np.where(on, value, self.registers[register.index])
        self.registers[register.index] = value

    def tick(self) -> None:
        """Begins an epoch: what was done before has been made known."""
        self.clock[self.agent] += 1

    def whole(self, on, instruction: Instruction) -> None:
        """Raises `Misuse` unless all lanes take part."""
        if on is not None and not on.all():
            raise Misuse(f"{instruction.text}: reached by a part of the warp's lanes")


class _Queue:
    """Groups of asynchronous work of a warp, in the order of their commits."""

    def __init__(self, warp: Warp, kind: int) -> None:
        self._warp, self.agent = warp, warp.agent + kind
        self._open: list = []
        self._groups: list[list] = []
        self.committed = 0
        self.pending: dict[int, int] = {}
        """Registers in use, with the group that frees them."""

    @property
    def epoch(self) -> int:
        """The group that is open."""
        return self.committed + 1

    def add(self, work) -> None:
        """Takes work that is now issued, to be done some time before its wait ends."""
        self._open.append(work)
        if self._warp.launch.at_once():
            # In their order: products are added up in the same registers.
            for earlier in [*self._groups, self._open]:
                while earlier:
                    earlier.pop(0)()

    def commit(self) -> None:
        self._groups.append(self._open)
        self._open = []
        self.committed += 1
        self._warp.launch.note(self._warp, "commit", self.agent, self.committed)

    def wait(self, left: int, place: int) -> None:
        """Until at most `left` groups are not done."""
        while len(self._groups) > left:
            for work in self._groups.pop(0):
                work()
        done = self.committed - len(self._groups)
        self._warp.launch.note(self._warp, "wait", self.agent, place)
        self._warp.clock[self.agent] = max(self._warp.clock[self.agent], done)
        self.pending = {register: group for register, group in self.pending.items() if group > done}

    def finish(self) -> None:
        for work in [*(work for group in self._groups for work in group), *self._open]:
            work()


class Block:
    """Its warps, shared memory and barriers."""

    def __init__(self, launch: "Launch", index: int, position: tuple[int, int, int]) -> None:
        self.launch, self.index, self.position = launch, index, position
        self.shared = shared_memory(list(launch.program.shared.values()), launch.shared_bytes)
        first = index * launch.warps * races.AGENTS_A_WARP
        cells = -(-launch.shared_bytes // launch.granule)
        self.accesses = races.Accesses(cells, first, launch.warps * races.AGENTS_A_WARP, launch.warps)
        self.warps = [Warp(self, i) for i in range(launch.warps)]
        self.barriers: dict[int, list[Warp]] = {}
        self.mailboxes: dict[int, object] = {}
        """mbarrier objects by address."""
        self.ended: dict[int, tuple[int, int]] = {}
        """Of places without an object: the agent of its copies, and the phases that have ended there."""
        self.maps: dict[int, dict] = {}

    def arrive(self, warp: Warp, barrier: int, threads: int) -> list[Warp]:
        """`warp` waits at a barrier for `threads` threads; the last one lets all go on, which are returned."""
        here = self.barriers.setdefault(barrier, [])
        here.append(warp)
        if len(here) * 32 < threads:
            warp.waiting = f"barrier {barrier}"
            return []
        code = self.launch.program.code
        if len({other.pc if code[other.pc].has("red") else -1 for other in here}) > 1:
            raise Misuse(f"a reduction at barrier {barrier} that other warps wait at with other instructions")
        clock = np.maximum.reduce([other.clock for other in here])
        proxy = np.maximum.reduce([other.proxy for other in here])
        for other in here:
            other.clock, other.proxy = clock.copy(), proxy.copy()
            other.tick()
            other.waiting = None
            self.launch.note(other, "barrier", barrier, other.pc)
            other.pc += 1
        self.barriers[barrier] = []
        return here

    def finish(self) -> None:
        """Raises `Misuse` where the warps of a group ran different matrix products."""
        for warp in self.warps:
            warp.copies.finish()
            warp.products.finish()
            if warp.collective != self.warps[warp.index // 4 * 4].collective:
                raise Misuse(
                    f"warp {warp.index} of block {self.index} ran other matrix products than its group"
                )


class Launch:
    """One kernel, its grid and its arguments, ready to run.

    `steps`: the program as `tests.kernels.ptx.instructions.prepare` gives it. `arguments`: in the order of the kernel's
    parameters, as `tests.kernels.ptx.memory.parameters` takes them. `seed`: of the schedule. `copies_need_fence`:
    whether a matrix product that reads what `cp.async` wrote needs a proxy fence. `journal`: gets every access and
    synchronisation, for `tests.kernels.ptx.footprints`.
    """

    def __init__(
        self,
        program: Program,
        steps: list[Step],
        grid: tuple[int, ...],
        shared_bytes: int,
        arguments: list[int | bytes],
        memory: GlobalMemory,
        seed: int = 0,
        copies_need_fence: bool = True,
        journal: list | None = None,
    ) -> None:
        self.program, self.memory, self.journal = program, memory, journal
        self.grid = (*grid, 1, 1)[:3]
        self.warps = -(-program.threads // 32)
        self.shared_bytes = max(shared_bytes, program.static_bytes, 16)
        self.blocks = self.grid[0] * self.grid[1] * self.grid[2]
        self.agents = self.blocks * self.warps * races.AGENTS_A_WARP
        self.parameters = parameters(program, arguments)
        self.random = random.Random(seed)
        self._early = (0.0, 1.0, 0.5)[seed % 3]
        self.copies_need_fence = copies_need_fence
        self.granule = _granule(program)
        noise = np.random.default_rng(seed)
        self.poison = [_poison(register, noise) for register in program.widths]
        self.steps = steps
        self.written: dict[int, races.Accesses] = {}
        self.reads: dict[int, list] = {}
        self.released: dict[int, np.ndarray] = {}
        """What atomics have made known, by address."""
        self.maps: dict[int, dict] = {}
        """Tensor maps by address, those of blocks in shared memory."""
        self.serialised: set[int] = set()
        """Places of matrix products whose registers are written behind their fence."""
        self.executed = self.spins = 0

    def at_once(self) -> bool:
        """Whether the next asynchronous work takes effect when it is issued."""
        return self.random.random() < self._early

    def note(self, warp: Warp, *event) -> None:
        if self.journal is not None:
            self.journal.append((warp.block.index, warp.index, *event))

    def run(self, concurrent: int = 3) -> None:
        """Runs all blocks, a few at a time."""
        width, height, _ = self.grid
        todo = [(i, (i % width, i // width % height, i // width // height)) for i in range(self.blocks)]
        live: list[Block] = []
        with np.errstate(all="ignore"):
            while todo or live:
                while todo and len(live) < concurrent:
                    live.append(Block(self, *todo.pop(self.random.randrange(len(todo)))))
                self._turn(live)

    def _turn(self, live: list[Block]) -> None:
        ready = [w for block in live for w in block.warps if not w.done and w.waiting is None]
        if not ready:
            raise Stuck(
                "; ".join(
                    f"warp {w.index} of block {w.block.index} "
                    + ("is done" if w.done else f"waits at {self.program.code[w.pc].text}: {w.waiting}")
                    for block in live
                    for w in block.warps
                )
            )
        warp = self.random.choice(ready)
        self._run(warp, self.random.randint(1, _LONGEST))
        block = warp.block
        if warp.done and all(w.done for w in block.warps):
            block.finish()
            live.remove(block)

    def _run(self, warp: Warp, instructions: int) -> None:
        """`warp` until it waits, is done, or has had its turn."""
        steps, registers = self.steps, warp.registers
        left = instructions
        try:
            while left:
                left -= 1
                kind, run, guard, negated, target = steps[warp.pc]
                on = warp.on
                if guard >= 0:
                    holds = ~registers[guard] if negated else registers[guard]
                    holds = holds if on is None else holds & on
                    some = np.count_nonzero(holds)
                    if some == 0:
                        on = holds
                    elif some < 32:
                        on = holds
                else:
                    some = 32
                if kind == PLAIN:
                    if some:
                        run(warp, on)
                    warp.pc += 1
                elif kind == WAIT:
                    if some and not run(warp, on):
                        break
                    warp.pc += 1
                elif some:
                    self._jump(warp, on, target if kind == BRANCH else -1)
                    if warp.done:
                        break
                else:
                    warp.pc += 1
                if warp.pc >= warp.meet:
                    self._rejoin(warp)
            self.executed += instructions - left
        except (races.Race, BadAccess, Misuse) as error:
            places = getattr(error, "places", []) or [warp.pc]
            lines = "; ".join(dict.fromkeys(self.program.code[at].text for at in places))
            raise type(error)(f"{self.program.name}: {error} [{lines}]") from error

    def _jump(self, warp: Warp, taken, target: int) -> None:
        """The lanes of `taken` (None: all) go to `target` (-1: they exit), the others on."""
        if target >= 0 and warp.on is None and (taken is None or taken.all()):
            warp.pc = target
            return
        here = np.ones(32, bool) if warp.on is None else warp.on
        left = here & ~taken if taken is not None else np.zeros(32, bool)
        if not left.any() and target >= 0:
            warp.pc = target
        else:
            if target >= 0:
                warp.apart.append((target, taken))
            if left.any():
                warp.apart.append((warp.pc + 1, left))
            warp.pc = _NO_END
        self._rejoin(warp)

    def _rejoin(self, warp: Warp) -> None:
        """The lanes at the lowest place run, all that are there."""
        parts = list(warp.apart)
        if warp.pc != _NO_END:
            parts.append((warp.pc, np.ones(32, bool) if warp.on is None else warp.on))
        if not parts:
            warp.done = True
            return
        warp.pc = min(place for place, _ in parts)
        on = np.logical_or.reduce([lanes for place, lanes in parts if place == warp.pc])
        warp.on = None if on.all() else on
        warp.apart = [part for part in parts if part[0] != warp.pc]
        warp.meet = min((place for place, _ in warp.apart), default=_NO_END)


def _granule(program: Program) -> int:
    """The narrowest access of shared memory: accesses are told apart by cells of so many bytes."""
    narrowest = 16
    for instruction in program.code:
        if any("shared" in part for part in instruction.parts) and instruction.types:
            narrowest = min(narrowest, 4, int(instruction.type.lstrip("bsuf").removesuffix("x2")) // 8)
    return narrowest


def _poison(register: Register, noise: np.random.Generator) -> np.ndarray:
    """What stands in a register that nobody wrote."""
    if register.predicate:
        return noise.integers(0, 2, 32).astype(bool)
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[register.width]
    return noise.integers(0, 256, (32, register.width), np.uint8).view(kind)[:, 0]


def local_lanes(warp: Warp, addresses: np.ndarray, size: int, on) -> np.ndarray:
    """Offsets into the lanes' local memory; raises `BadAccess`."""
    offsets = np.where(addresses >= LOCAL, addresses - LOCAL, addresses)
    lanes = LANES if on is None else LANES[on]
    if (offsets[lanes] < 0).any() or (offsets[lanes] + size > warp.local.shape[1]).any():
        raise BadAccess(f"{size} bytes outside of the {warp.local.shape[1]} of local memory")
    return offsets
