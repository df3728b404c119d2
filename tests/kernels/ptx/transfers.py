"""Instructions that move data: loads, stores, atomics, `cp.async`, and 8 x 8 matrices to and from registers.

Source: PTX ISA, 9.7.9 (data movement) and 9.7.13 (atomics). Every access is checked for bounds, alignment and order.
"""

import numpy as np

from tests.kernels.ptx import races
from tests.kernels.ptx.instructions import (
    UNSIGNED,
    Run,
    address_of,
    builds,
    dtype_of,
    members,
    reader,
    width_of,
    writer,
)
from tests.kernels.ptx.machine import LANES, Misuse, Warp, local_lanes
from tests.kernels.ptx.memory import LOCAL, BadAccess
from tests.kernels.ptx.parsing import Immediate, Instruction, NotSupported, Program, Register


def space_of(instruction: Instruction) -> str:
    """global, shared, local, param or generic."""
    for part in instruction.parts[1:]:
        for space in ("global", "shared", "local", "param", "const"):
            if part == space or part.startswith(f"{space}_"):
                return space
    return "generic"


def _without_policy(instruction: Instruction) -> tuple:
    """The operands but that for the cache."""
    return instruction.operands[:-1] if instruction.has("L2_cache_hint") else instruction.operands


def cells_of(offsets: np.ndarray, size: int, granule: int) -> np.ndarray:
    """Cells of accesses of `size` bytes each."""
    first = offsets // granule
    if size <= granule:
        return first
    return (first[:, None] + np.arange(size // granule)).reshape(-1)


def access_shared(
    warp: Warp, offsets, size: int, does: str, kind: int = races.WARP, epoch=None, clock=None, agent=None
) -> None:
    """Has the block's memory note an access ("read", "write", "rewrite" or "add") and check its order."""
    launch = warp.launch
    cells = cells_of(offsets, size, launch.granule)
    access = warp.block.accesses
    if does in ("read", "add") and access.never_written(cells):
        raise BadAccess("shared memory that nobody wrote is read")
    epoch = warp.epoch if epoch is None else epoch
    launch.note(warp, does, "shared", kind, epoch if agent is None else (agent, epoch), cells)
    agent = warp.agent + kind if agent is None else agent
    getattr(access, does)(cells, agent, warp.clock if clock is None else clock, epoch, warp.pc)


def access_global(warp: Warp, offsets, size: int, does: str, kind: int = races.WARP, epoch=None) -> None:
    """As `access_shared`, for global memory: reads are kept until anything is written in their region."""
    launch = warp.launch
    epoch = warp.epoch if epoch is None else epoch
    region = launch.memory.region(int(offsets[0]))
    begin, granule = region.begin, region.granule
    inside = (offsets >= begin) & (offsets < region.end)
    if not inside.all():
        access_global(warp, offsets[~inside], size, does, kind, epoch)
        offsets = offsets[inside]
    cells = cells_of(offsets - begin, size, granule)
    launch.note(warp, does, begin, kind, epoch, cells)
    known = launch.written.get(begin)
    if known is None:
        before = launch.reads.setdefault(begin, [])
        if does == "read":
            before.append((cells, warp.agent + kind, warp.clock.copy(), epoch, warp.pc))
            return
        known = launch.written[begin] = races.Accesses(
            -(-(region.end - begin) // granule), 0, launch.agents, launch.warps
        )
        for read in before:
            known.read(*read)
    getattr(known, does)(cells, warp.agent + kind, warp.clock, epoch, warp.pc)


@builds("ld")
def _load(instruction: Instruction, program: Program) -> Run:
    target, source = _without_policy(instruction)
    kind, space = instruction.type, space_of(instruction)
    targets = members(target)
    writes, width, count = [writer(t, kind) for t in targets], width_of(kind), len(targets)
    dtype = dtype_of(kind)
    address, size = address_of(source, program), width * count
    if space == "param":
        return _load_parameter(address, width, [(write, dtype) for write in writes])
    # Such a load is meant to see what others are writing.
    unordered = instruction.has("volatile") or instruction.has("relaxed")

    def load(warp, on):
        addresses = address(warp)
        if space == "local" or (space == "generic" and (addresses >= LOCAL).any()):
            lanes = local_lanes(warp, addresses, size, on)
            places = np.clip(lanes, 0, warp.local.shape[1] - size)[:, None] + np.arange(size)
            values = warp.local[LANES[:, None], places].view(UNSIGNED[width])
        else:
            if on is not None:
                addresses = addresses[on]
            memory = warp.block.shared if space == "shared" else warp.launch.memory
            offsets = memory.place(addresses, size)
            if space == "shared":
                access_shared(warp, offsets, size, "read")
            elif not unordered:
                access_global(warp, offsets, size, "read")
            values = memory.load(offsets, width, count)
            if on is not None:
                loaded = values
                values = np.zeros((32, count), loaded.dtype)
                values[on] = loaded
        for column, write in enumerate(writes):
            write(warp, np.ascontiguousarray(values[:, column]).view(dtype), on)

    return load


def _load_parameter(address, width: int, targets: list) -> Run:
    """From the space of the kernel's parameters, which nothing writes."""

    def load(warp, on):
        addresses = address(warp)
        if on is not None:
            addresses = np.where(on, addresses, addresses[on.argmax()])
        memory = warp.launch.parameters
        values = memory.load(memory.place(addresses, width * len(targets)), width, len(targets))
        for column, (write, dtype) in enumerate(targets):
            write(warp, values[:, column].copy().view(dtype), on)

    return load


@builds("st")
def _store(instruction: Instruction, program: Program) -> Run:
    target, source = _without_policy(instruction)
    kind, space = instruction.type, space_of(instruction)
    width, sources = width_of(kind), members(source)
    reads, size = [reader(s, f"b{8 * width}", program) for s in sources], width * len(sources)
    address = address_of(target, program)
    # What warps saw of a counter while others added to it: any of their values does.
    unsteady = not program.unsteady.isdisjoint(
        register.index for register in sources if isinstance(register, Register)
    )

    def store(warp, on):
        addresses = address(warp)
        values = np.stack([read(warp) for read in reads], axis=1)
        if space == "local" or (space == "generic" and (addresses >= LOCAL).any()):
            lanes = local_lanes(warp, addresses, size, on)
            for lane in LANES if on is None else LANES[on]:
                warp.local[lane, lanes[lane] : lanes[lane] + size] = values[lane].view(np.uint8)
            return
        if on is not None:
            addresses, values = addresses[on], values[on]
        put(warp, addresses, values, space == "shared", unsteady)

    return store


def put(
    warp: Warp, addresses: np.ndarray, values: np.ndarray, shared: bool, any_will_do: bool = False
) -> None:
    """Stores `values` [lanes, count]; raises `Misuse` where two lanes write different ones to one place.

    `any_will_do`: it does not matter which of the warps' values stays.
    """
    memory = warp.block.shared if shared else warp.launch.memory
    size = values.dtype.itemsize * values.shape[1]
    offsets = memory.place(addresses, size)
    access = access_shared if shared else access_global
    # Layouts with copies have several warps write the same value: it does not matter who comes first.
    same = (memory.load(offsets, values.dtype.itemsize, values.shape[1]) == values).all(axis=1) | any_will_do
    if not same.all():
        access(warp, offsets[~same], size, "write")
    if same.any():
        access(warp, offsets[same], size, "rewrite")
    if not memory.store(offsets, values):
        raise Misuse("two lanes write different values to one place")


_ATOMICS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
}


@builds("atom", "red")
def _atomic(instruction: Instruction, program: Program) -> Run:
    """Lane after lane, in an order drawn for each. Acquires and releases what its qualifiers say."""
    target, address_at, *sources = (
        (None, *instruction.operands) if instruction.name == "red" else instruction.operands
    )
    kind, space = instruction.type, space_of(instruction)
    dtype, width = dtype_of(kind), width_of(kind)
    operation = next((part for part in instruction.parts if part in (*_ATOMICS, "cas")), None)
    if operation is None:
        raise NotSupported(f"{instruction.text}: an atomic that the runner does not have")
    address, reads = address_of(address_at, program), [reader(s, kind, program) for s in sources]
    write = None if target is None else writer(target, kind)
    acquires, releases = (bool({word, "acq_rel"} & set(instruction.parts)) for word in ("acquire", "release"))

    def run(warp, on):
        launch = warp.launch
        memory = warp.block.shared if space == "shared" else launch.memory
        lanes = LANES if on is None else LANES[on]
        places = address(warp)[lanes]
        offsets = memory.place(places, width)
        (access_shared if space == "shared" else access_global)(warp, offsets, width, "add")
        cells = memory.view(width).view(dtype)
        given, old = [read(warp) for read in reads], np.zeros(32, dtype)
        order = list(zip(lanes.tolist(), (offsets // width).tolist(), strict=True))
        launch.random.shuffle(order)
        for lane, cell in order:
            old[lane] = cells[cell]
            if operation == "cas":
                cells[cell] = given[1][lane] if cells[cell] == given[0][lane] else cells[cell]
            else:
                cells[cell] = _ATOMICS[operation](cells[cell], given[0][lane])
        if write is not None:
            write(warp, old, on)
        met = set(places.tolist())
        if acquires:
            for place in met & launch.released.keys():
                warp.clock = np.maximum(warp.clock, launch.released[place])
        if releases:
            for place in met:
                launch.released[place] = np.maximum(launch.released.get(place, races.NEVER), warp.clock)
            warp.tick()

    return run


@builds("cp")
def _copy(instruction: Instruction, program: Program) -> Run:
    """cp.async: 4, 8 or 16 bytes a lane, written to shared memory some time before its group has been waited for."""
    if instruction.has("bulk"):
        from tests.kernels.ptx import bulk

        return bulk.copy(instruction, program)
    if instruction.has("mbarrier") or not instruction.has("async"):
        raise NotSupported(f"{instruction.text}: this form of cp")
    if instruction.has("commit_group"):
        return lambda warp, on: warp.copies.commit()
    if instruction.has("wait_group") or instruction.has("wait_all"):
        left = instruction.operands[0].bits if instruction.operands else 0

        def wait(warp, on):
            if instruction.has("wait_all"):
                warp.copies.commit()
            warp.copies.wait(left, warp.pc)

        return wait
    target, source, size, *given = _without_policy(instruction)
    if not isinstance(size, Immediate) or size.bits not in (4, 8, 16):
        raise NotSupported(f"{instruction.text}: expected 4, 8 or 16 bytes")
    to, of, size = address_of(target, program), address_of(source, program), size.bits
    count = reader(given[0], "u32", program) if given else None

    def copy(warp, on):
        lanes = LANES if on is None else LANES[on]
        shared, memory = warp.block.shared, warp.launch.memory
        targets = shared.place(to(warp)[lanes], size)
        taken = np.full(len(lanes), size) if count is None else count(warp)[lanes].astype(np.int64)
        if not np.isin(taken, (0, size)).all():
            raise Misuse(f"expected to copy 0 or {size} bytes, got {taken}")
        some = taken > 0
        sources = memory.place(of(warp)[lanes][some], size)
        epoch = warp.copies.epoch
        access_shared(warp, targets, size, "write", races.COPIES, epoch)
        if some.any():
            access_global(warp, sources, size, "read", races.COPIES, epoch)

        def done():
            values = np.zeros((len(lanes), size // 4), np.uint32)
            values[some] = memory.load(sources, 4, size // 4)
            shared.store(targets, values)

        warp.copies.add(done)

    return copy


@builds("ldmatrix")
def _load_matrix(instruction: Instruction, program: Program) -> Run:
    """8 x 8 matrices of 16 bits, a row at the address of lane 8 i + row for the i-th."""
    target, source = instruction.operands
    if not instruction.has("m8n8", "b16"):
        raise NotSupported(f"{instruction.text}: expected m8n8 of b16")
    writes, address = [writer(t, "b32") for t in members(target)], address_of(source, program)
    count, across = len(writes), instruction.has("trans")

    def run(warp, on):
        warp.whole(on, instruction)
        offsets = warp.block.shared.place(address(warp)[: 8 * count], 16)
        access_shared(warp, offsets, 16, "read")
        matrices = warp.block.shared.load(offsets, 2, 8).reshape(count, 8, 8)
        if across:
            matrices = np.ascontiguousarray(matrices.swapaxes(1, 2))
        for pairs, write in zip(matrices.view(np.uint32).reshape(count, 32), writes, strict=True):
            write(warp, pairs, on)

    return run


@builds("stmatrix")
def _store_matrix(instruction: Instruction, program: Program) -> Run:
    """The way back of ldmatrix."""
    target, source = instruction.operands
    if not instruction.has("m8n8", "b16"):
        raise NotSupported(f"{instruction.text}: expected m8n8 of b16")
    reads, address = [reader(s, "b32", program) for s in members(source)], address_of(target, program)
    count, across = len(reads), instruction.has("trans")

    def run(warp, on):
        warp.whole(on, instruction)
        pairs = np.stack([read(warp) for read in reads])
        matrices = pairs.view(np.uint16).reshape(count, 8, 8)
        if across:
            matrices = matrices.swapaxes(1, 2)
        rows = np.ascontiguousarray(matrices.reshape(8 * count, 8))
        addresses = address(warp)[: 8 * count]
        warp.block.shared.place(addresses, 16)
        put(warp, addresses, rows, shared=True)

    return run
