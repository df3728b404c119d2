"""Memory of the machine: bounds, alignment, and the accesses of 32 lanes at once.

Addresses lie in one range a space: global memory from `GLOBAL`, shared memory from `SHARED`, local memory, which every
lane has for itself, from `LOCAL` where it is addressed generically.
"""

from typing import NamedTuple

import numpy as np
import torch

from tests.kernels.ptx.parsing import Program, Variable

SHARED = 1024
LOCAL = 1 << 40
GLOBAL = 1 << 20
_GAP = 512
_VIEWS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class BadAccess(Exception):
    """An access outside of what was allocated, one that is not aligned, or a read of what nobody wrote."""


class Memory:
    """Bytes from address `base` on, with views of every width."""

    def __init__(self, base: int, size: int, name: str) -> None:
        self.base, self.size, self.name = base, size, name
        self.bytes = np.full(-(-size // 16) * 16, 0xFF, np.uint8)  # NaN in every float
        self._views = {width: self.bytes.view(kind) for width, kind in _VIEWS.items()}
        self.valid: np.ndarray | None = None
        """Which bytes belong to something; None: all."""
        self.outside = "outside of every argument of the kernel"
        """What is said of others."""

    def place(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Offsets of accesses of `size` bytes; raises `BadAccess`."""
        offsets = addresses - self.base
        if (offsets & (size - 1)).any():
            wrong = int(addresses[(offsets & (size - 1)) != 0][0])
            raise BadAccess(f"address {wrong:#x} in {self.name} memory is not a multiple of {size}")
        if offsets.size and (offsets.min() < 0 or offsets.max() + size > self.size):
            raise BadAccess(
                f"{size} bytes at {int(offsets.min()):+d} to {int(offsets.max()):+d} from the begin of {self.name} "
                f"memory, which has {self.size}"
            )
        if self.valid is not None and not (self.valid[offsets] & self.valid[offsets + size - 1]).all():
            inside = self.valid[offsets] & self.valid[offsets + size - 1]
            raise BadAccess(f"{size} bytes at {self.where(int(offsets[~inside][0]))}: {self.outside}")
        return offsets

    def where(self, offset: int) -> str:
        """An offset in words."""
        return f"offset {offset} of {self.name} memory"

    def load(self, offsets: np.ndarray, width: int, count: int) -> np.ndarray:
        """[n, count] values of `width` bytes."""
        return self._views[width][(offsets // width)[:, None] + np.arange(count)]

    def store(self, offsets: np.ndarray, values: np.ndarray) -> bool:
        """Writes [n, count]; whether what stands there then is what every lane wrote."""
        width, count = values.dtype.itemsize, values.shape[1]
        places = (offsets // width)[:, None] + np.arange(count)
        view = self._views[width]
        view[places] = values
        return np.array_equal(view[places], values)

    def view(self, width: int) -> np.ndarray:
        """All of it as values of `width` bytes."""
        return self._views[width]


def shared_memory(variables: list[Variable], size: int) -> Memory:
    """A block's, of `size` bytes: what lies between its variables is nobody's."""
    memory = Memory(SHARED, size, "shared")
    if len(variables) > 1:
        memory.outside = "outside of every variable"
        memory.valid = np.zeros(size, bool)
        for offset, length in variables:
            memory.valid[offset : size if length < 0 else offset + length] = True
    return memory


def parameters(program: Program, arguments: list[int | bytes]) -> Memory:
    """The space of a kernel's parameters: integers and addresses, or the bytes of what is passed by value; absent ones
    at the end are 0. Raises `BadAccess` where the bytes are not as many as the parameter has."""
    memory = Memory(0, max(program.parameter_bytes, 1), "parameter")
    for place, offset, size in program.parameters.values():
        given = arguments[place] if place < len(arguments) else 0
        if isinstance(given, int):
            given = (given & (1 << 8 * size) - 1).to_bytes(size, "little")
        if len(given) != size:
            raise BadAccess(f"parameter {place} has {size} bytes, got {len(given)}")
        memory.bytes[offset : offset + size] = np.frombuffer(given, np.uint8)
    return memory


class Region(NamedTuple):
    """Some tensors' part of global memory: offsets, and the bytes of its smallest element."""

    begin: int
    end: int
    granule: int


class GlobalMemory(Memory):
    """What the recorded launches of an op are given: every tensor in a region of its own between gaps.

    Tensors that overlap share a region. Each begins at the address that it has modulo 256 on the host, as the kernels
    are compiled for its alignment.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._regions: list[list] = []  # [begin, end] on the host, offset here, bytes of an element
        for begin, end, size in sorted(_extent(tensor) for tensor in tensors if tensor.numel()):
            if self._regions and begin < self._regions[-1][1]:
                last = self._regions[-1]
                last[1], last[3] = max(last[1], end), min(last[3], size)
            else:
                self._regions.append([begin, end, 0, size])
        size = _GAP
        for region in self._regions:
            size = -(-size // 256) * 256 + region[0] % 256
            region[2] = size
            size += region[1] - region[0] + _GAP
        super().__init__(GLOBAL, size, "global")
        self.valid = np.zeros(size, bool)
        self._tensors = tensors
        for tensor in tensors:
            if tensor.numel():
                places = self._places(tensor)
                self.bytes[places] = _raw(tensor)
                self.valid[places] = True

    def address(self, tensor: torch.Tensor) -> int:
        """Where the kernel finds `tensor`; 0 for an empty one."""
        return self.base + self._offset(tensor.data_ptr()) if tensor.numel() else 0

    def translated(self, argument: bytes) -> bytes:
        """An argument as the host has it, every address of a tensor made the one of it here.

        An address is a word of 8 bytes at a multiple of 8 that lies in a tensor.
        """
        whole = len(argument) // 8 * 8
        words = [
            self.base + self._offset(word) if any(r[0] <= word < r[1] for r in self._regions) else word
            for word in np.frombuffer(argument[:whole], np.uint64).tolist()
        ]
        return np.array(words, np.uint64).tobytes() + argument[whole:]

    def _offset(self, pointer: int) -> int:
        begin, _, offset, _ = next(r for r in self._regions if r[0] <= pointer < r[1])
        return offset + pointer - begin

    def _places(self, tensor: torch.Tensor) -> np.ndarray:
        """Offsets [elements, bytes] of a tensor's elements in the order of its dimensions."""
        offsets = np.zeros(1, np.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(size) * stride).reshape(-1)
        size = tensor.element_size()
        return self._offset(tensor.data_ptr()) + (offsets * size)[:, None] + np.arange(size)

    def region(self, offset: int) -> Region:
        """The region that holds `offset`."""
        begin, end, place, size = next(r for r in reversed(self._regions) if r[2] <= offset)
        return Region(place, place + end - begin, size)

    def copy_back(self) -> None:
        """Writes what the kernels left into the tensors."""
        for tensor in self._tensors:
            if tensor.numel():
                for axis, stride in enumerate(tensor.stride()):
                    tensor = tensor if stride else tensor.narrow(axis, 0, 1)  # elements that share memory
                raw = torch.from_numpy(self.bytes[self._places(tensor)].copy())
                tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))


def _extent(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Begin and end on the host, and the bytes of an element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = tensor.element_size()
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * size, size


def _raw(tensor: torch.Tensor) -> np.ndarray:
    """[elements, bytes]"""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).reshape(-1, tensor.element_size()).numpy()
