"""Pickles of arrays, read by a small machine that knows the few opcodes and names such files contain.

Nothing is imported, looked up or called by a name from the file: each allowed name has its own branch here, which
checks its arguments and builds plain values. Arrays become `StoredArray`: where they are, not what they hold.
"""

from __future__ import annotations

import io
import math
import os
import struct
from pathlib import Path
from typing import Any

from lbdt.formats.arrays import Blob, StoredArray
from lbdt.formats.machine import (
    STORAGES,
    Call,
    DType,
    Global,
    Machine,
    Pending,
    Storage,
    Text,
    UnsafePickle,
)
from lbdt.runs.reading import open_regular

__all__ = ["UnsafePickle", "read_pickle"]

_SCALARS = {"f2": "<e", "f4": "<f", "f8": "<d", "i4": "<i", "i8": "<q", "i2": "<h", "u1": "<B", "b1": "<?"}
_FACTORIES = ("builtins.list", "builtins.dict", "__builtin__.list", "__builtin__.dict")
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_TORCH_PROTOCOL = 1001


def read_pickle(path: Path) -> Any:
    """The dictionaries, lists, tuples, strings, numbers and `StoredArray`s of a pickle of protocol 2 to 5.

    NumPy arrays and scalars and dense CPU-loadable torch tensors are understood, float16, bfloat16, float32 and
    float64 in C order. Memory does not grow with the arrays.

    Raises:
        UnsafePickle: any other name, opcode or argument; it is named, and nothing was run.
        ValueError: no such file, a truncated or inconsistent one.
    """
    with open_regular(path, "a pickle such as cls_latents_dict_HOOKPOINT.pkl") as file:
        size = os.fstat(file.fileno()).st_size
        machine = Machine(file, size, path, _CALLS)
        value = machine.run()
        if file.tell() != size:
            raise machine.refused(f"expected nothing after the pickle's end, got {size - file.tell()} bytes")
    return value


def _load_from_bytes(machine: Machine, arguments: tuple[Any, ...]) -> Storage | None:
    """What `torch.save(storage, _use_new_zipfile_serialization=False)` wrote: five pickles, then the values."""
    match arguments:
        case (bytes() as data,):
            file, start, end = io.BytesIO(data), 0, len(data)
        case (Blob(latin1=False) as data,):
            file, start, end = machine.file, data.offset, data.offset + data.length
        case (Blob(),):
            raise machine.refused("a torch tensor in a pickle of protocol 2; pickle it with protocol 4")
        case _:
            return None
    if machine.nested:
        raise machine.refused("a torch storage inside of a torch storage")
    back = machine.file.tell()
    file.seek(start)
    parts = [Machine(file, end, machine.path, _CALLS, machine).run() for _ in range(5)]
    magic, protocol, system, storage, keys = parts
    if magic != _TORCH_MAGIC or protocol != _TORCH_PROTOCOL or type(storage) is not Storage:
        raise machine.refused("a torch storage with another beginning than torch.save writes")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise machine.refused("a torch storage of a big-endian machine")
    if type(keys) is not list or len(keys) != 1:
        raise machine.refused("a torch storage of several parts")
    size = storage.numel * storage.dtype.itemsize
    numel = Machine(file, end, machine.path, _CALLS, machine).number("<q")
    if numel != storage.numel or end - file.tell() != size:
        raise machine.refused(f"a torch storage of {storage.numel} values and {end - file.tell()} bytes")
    storage.data, storage.start = data, file.tell() - start
    machine.file.seek(back)
    return storage


def _rebuild_tensor(machine: Machine, arguments: tuple[Any, ...]) -> StoredArray | None:
    match arguments:
        case (Storage() as storage, int() as offset, size, tuple() as stride, bool(), {}):
            sizes = machine.sizes(size)
        case _:
            return None
    expected, step = [], 1
    for n in reversed(sizes):
        expected.insert(0, step)
        step *= max(n, 1)
    if len(stride) != len(sizes) or any(
        n > 1 and not (type(s) is int and s == e) for n, s, e in zip(sizes, stride, expected, strict=True)
    ):
        raise machine.refused("a tensor with strides of its own; save tensor.contiguous() instead")
    if not 0 <= offset <= storage.numel - math.prod(sizes):
        raise machine.refused(f"a tensor of shape {list(sizes)} outside of its storage")
    start = storage.start + offset * storage.dtype.itemsize
    return StoredArray(machine.path, sizes, storage.dtype, storage.data, start)


def _reconstruct(machine: Machine, arguments: tuple[Any, ...]) -> Pending | None:
    match arguments:
        case (Global(name="numpy.ndarray"), (0,), b"b"):
            return Pending()
    return None


def _dtype(machine: Machine, arguments: tuple[Any, ...]) -> DType | None:
    match arguments:
        case (str() as code, False | 0, True | 1) if code in _SCALARS:
            return DType(code)
        case (str() as code, *_):
            raise machine.refused(f"expected numbers, got dtype {code[:20]!r}")
    return None


def _scalar(machine: Machine, arguments: tuple[Any, ...]) -> Any:
    match arguments:
        case (DType(code=code), bytes() as data) if len(data) == struct.calcsize(_SCALARS[code]):
            return struct.unpack(_SCALARS[code], data)[0]
    return None


def _frombuffer(machine: Machine, arguments: tuple[Any, ...]) -> StoredArray | None:
    match arguments:
        case (data, dtype, shape, "C" | "F" as order):
            return machine.array(shape, dtype, data, order == "F")
    return None


def _encode(machine: Machine, arguments: tuple[Any, ...]) -> bytes | Blob | None:
    match arguments:
        case (Text() as text, "latin1" | "latin-1"):
            return Blob(text.offset, text.length, latin1=True)
        case (str() as text, "latin1" | "latin-1") if all(ord(letter) < 256 for letter in text):
            return text.encode("latin-1")
    return None


def _ordered(machine: Machine, arguments: tuple[Any, ...]) -> dict | None:
    return None if arguments else {}


def _default(machine: Machine, arguments: tuple[Any, ...]) -> dict | None:
    match arguments:
        case (Global(name=name),) if name in _FACTORIES:
            return {}
    return None


_CALLS: dict[str, Call | None] = {
    "numpy.ndarray": None,
    **dict.fromkeys(_FACTORIES),
    **dict.fromkeys(name for name, dtype in STORAGES.items() if dtype.is_floating_point),
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _frombuffer,
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _default,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch.storage._load_from_bytes": _load_from_bytes,
}
