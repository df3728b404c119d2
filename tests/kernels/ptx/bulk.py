"""mbarrier objects, and the copies of tiles that they wait for: TMA by tensor maps that the kernel itself makes.

Source: PTX ISA, 9.7.13 (mbarrier), 9.7.9.27 (cp.async.bulk.tensor, tensormap.replace). Tensor maps are kept as their
fields beside the bytes of memory. A tile arrives when it is issued or when a warp would wait for it in vain. It is
known to whoever saw its mbarrier's phase end.
"""

import numpy as np

from tests.kernels.ptx import races
from tests.kernels.ptx.instructions import Run, address_of, builds, members, reader, writer
from tests.kernels.ptx.machine import Misuse, Stuck, Warp
from tests.kernels.ptx.parsing import Address, Instruction, NotSupported, Program
from tests.kernels.ptx.transfers import access_global, access_shared

_PATIENCE = 20000
_SIZES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 10: 2}
"""Bytes by elemtype."""
_SWIZZLES = {0: 0, 1: 1, 2: 3, 3: 7}
"""Bits of the address that the swizzle changes, by swizzle_mode."""


class Mailbox:
    """An mbarrier: a phase ends when all have arrived and all announced bytes have come."""

    def __init__(self, expected: int, agents: int, agent: int, phases: int) -> None:
        self.expected = self.left = expected
        self.phase = self.bytes = 0
        self.agent, self.phases = agent, phases
        """Whose work the copies are, and the phases that have ended at this place, also before the object was made."""
        self.under_way: list = []
        self.gathered = np.zeros(agents, np.int32)
        self.clock = np.zeros(agents, np.int32)
        """What is known to who sees the last phase end."""

    def arrive(self, warp: Warp, times: int, announced: int = 0) -> None:
        self.gathered = np.maximum(self.gathered, warp.clock)
        warp.tick()
        self.left -= times
        self.bytes += announced
        if self.left < 0:
            raise Stuck(f"more than {self.expected} arrivals at an mbarrier in one phase")
        self._end(warp)

    def deliver(self, warp: Warp) -> None:
        """All copies that are under way."""
        while self.under_way:
            self.bytes -= self.under_way.pop(0)()
        self._end(warp)

    def _end(self, warp: Warp) -> None:
        if self.left == 0 and self.bytes == 0 and not self.under_way:
            self.phases += 1
            self.gathered[self.agent] = self.phases
            self.clock = np.maximum(self.clock, self.gathered)
            self.left, self.phase = self.expected, self.phase + 1
            warp.launch.spins = 0


@builds("mbarrier")
def _mailbox(instruction: Instruction, program: Program) -> Run:
    """init, arrive, arrive.expect_tx, test_wait and try_wait by parity, inval."""
    action = instruction.parts[1]
    if action not in ("init", "arrive", "try_wait", "test_wait", "inval"):
        raise NotSupported(f"{instruction.text}: this form of mbarrier")
    operands = list(instruction.operands)
    target = operands.pop(0) if action in ("arrive", "try_wait", "test_wait") else None
    address = address_of(operands.pop(0), program)
    numbers = [reader(operand, "u32", program) for operand in operands]
    tell = writer(target, "pred") if action.endswith("wait") else None
    if tell and not instruction.has("parity"):
        raise NotSupported(f"{instruction.text}: expected to wait by parity")

    def run(warp, on):
        lanes = np.ones(32, bool) if on is None else on
        at = warp.block.shared.place(address(warp)[lanes], 8)
        place, boxes = int(at[0]), warp.block.mailboxes
        if (at != place).any():
            raise NotSupported(f"{instruction.text}: several objects at once")
        access_shared(warp, at[:1], 8, "write" if action in ("init", "inval") else "read")
        given = [number(warp)[lanes] for number in numbers]
        if action == "init":
            boxes[place] = _made(warp, place, int(given[0][0]))
        elif action == "inval":
            box = boxes.pop(place)
            warp.block.ended[place] = box.agent, box.phases
        elif instruction.has("expect_tx"):
            boxes[place].arrive(warp, int(lanes.sum()), int(given[0].sum()))
        elif action == "arrive":
            boxes[place].arrive(warp, int(given[0].sum()) if given else int(lanes.sum()))
        else:
            tell(warp, np.full(32, _ended(warp, boxes[place], int(given[0][0]), instruction)), on)

    return run


def _made(warp: Warp, place: int, expected: int) -> Mailbox:
    """A new object at `place`, whose copies are the work of an agent of the block."""
    launch, block = warp.launch, warp.block
    if place not in block.ended:
        if len(block.ended) + len(block.mailboxes) >= launch.warps:
            raise NotSupported(f"more than {launch.warps} mbarriers in a block of as many warps")
        number = block.index * launch.warps + len(block.ended) + len(block.mailboxes)
        block.ended[place] = number * races.AGENTS_A_WARP + races.BULK, 0
    return Mailbox(expected, launch.agents, *block.ended.pop(place))


def _ended(warp: Warp, box: Mailbox, parity: int, instruction: Instruction) -> bool:
    """Whether the phase of that parity has; copies under way come when they would be waited for in vain."""
    launch = warp.launch
    if box.phase % 2 == parity and box.under_way and launch.random.random() < 0.5:
        box.deliver(warp)
    if box.phase % 2 != parity:
        warp.clock = np.maximum(warp.clock, box.clock)
        launch.note(warp, "arrival", box.agent, box.phases, warp.pc)
        return True
    launch.spins += 1
    if launch.spins > _PATIENCE:
        raise Stuck(f"{instruction.text}: the phase does not end")
    return False


@builds("tensormap")
def _tensor_map(instruction: Instruction, program: Program) -> Run:
    """tensormap.replace in shared memory, and the way of a map to global memory."""
    if instruction.has("cp_fenceproxy"):
        to, of = (address_of(operand, program) for operand in instruction.operands[:2])

        def publish(warp, on):
            lane = 0 if on is None else int(on.argmax())
            warp.launch.maps[int(to(warp)[lane])] = dict(warp.block.maps[int(of(warp)[lane])])

        return publish
    if not instruction.has("replace", "tile"):
        raise NotSupported(f"{instruction.text}: this form of tensormap")
    field, (at, *ordinal, value) = instruction.parts[3], instruction.operands
    address, read = address_of(at, program), reader(value, instruction.type, program)
    key = (field, ordinal[0].bits) if ordinal else field

    def replace(warp, on):
        lane = 0 if on is None else int(on.argmax())
        warp.block.maps.setdefault(int(address(warp)[lane]), {})[key] = int(read(warp)[lane])

    return replace


def copy(instruction: Instruction, program: Program) -> Run:
    """cp.async.bulk.tensor of a tile to shared memory; nothing waits for the groups of bulk copies that way."""
    if instruction.has("commit_group") or instruction.has("wait_group"):
        return lambda warp, on: None
    if not instruction.has("tensor") or not instruction.has("mbarrier_complete_tx_bytes"):
        raise NotSupported(f"{instruction.text}: bulk copies other than of tiles to shared memory")
    target, tile, box_at = instruction.operands[:3]
    map_register, coordinates = tile.members
    to, at = address_of(target, program), address_of(box_at, program)
    map_at = address_of(Address(map_register, 0), program)
    reads = [reader(operand, "s32", program) for operand in members(coordinates)]

    def run(warp, on):
        for lane in range(32) if on is None else np.flatnonzero(on):
            place = int(at(warp)[lane]) - warp.block.shared.base
            tile_map = warp.launch.maps.get(int(map_at(warp)[lane]))
            if tile_map is None or place not in warp.block.mailboxes:
                raise Misuse("a copy by a tensor map, or to an mbarrier, that was not made")
            _issue(warp, int(to(warp)[lane]), tile_map, [int(r(warp)[lane]) for r in reads], place)

    return run


def _own(warp: Warp) -> np.ndarray:
    """The clocks of the warp's block but those of its warps."""
    kinds = np.arange(len(warp.clock)) % races.AGENTS_A_WARP
    return np.where(kinds == races.WARP, 0, warp.clock)


def _issue(warp: Warp, target: int, tile_map: dict, begin: list[int], place: int) -> None:
    """One tile: what lies outside of the tensor is zero."""
    launch, block, box = warp.launch, warp.block, warp.block.mailboxes[place]
    size, axes = _SIZES[tile_map["elemtype"]], range(len(begin))
    shape = [tile_map["box_dim", axis] for axis in axes]
    indices = np.indices(shape[::-1]).reshape(len(begin), -1)[::-1]  # the first axis runs fastest
    where = indices + np.array(begin)[:, None]
    inside = (
        (where >= 0) & (where < np.array([tile_map["global_dim", axis] for axis in axes])[:, None])
    ).all(axis=0)
    strides = np.array([size, *(tile_map["global_stride", axis] for axis in axes[:-1])])
    sources = tile_map["global_address"] + (where * strides[:, None]).sum(axis=0)
    addresses = target + np.arange(inside.size) * size
    bits = _SWIZZLES[tile_map["swizzle_mode"]]
    if target % (128 * (bits + 1)):
        raise Misuse(f"a tile at {target:#x}, which is not a multiple of {128 * (bits + 1)}")
    addresses ^= (addresses >> 7 & bits) << 4
    offsets = block.shared.place(addresses, size)
    # The object was made by way of another proxy.
    access_shared(warp, np.array([place]), 8, "read", clock=np.maximum(warp.proxy, _own(warp)))
    access_shared(warp, offsets, size, "write", races.BULK, box.phases + 1, agent=box.agent)
    given = launch.memory.place(sources[inside], size)
    if len(given):
        access_global(warp, given, size, "read")

    def done() -> int:
        values = np.zeros((inside.size, 1), block.shared.view(size).dtype)
        values[inside] = launch.memory.load(given, size, 1)
        block.shared.store(offsets, values)
        return inside.size * size

    box.under_way.append(done)
    if launch.at_once():
        box.deliver(warp)
