"""The machine behind `lbdt.formats.pickles`: pickle opcodes over plain values, no imports, no calls by name."""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lbdt.formats.arrays import Blob, StoredArray

_MAX_OPCODES = 1_000_000
_MAX_INLINE = 1 << 12
"""Longer strings and bytes stay in the file."""
_MAX_KEY = 1 << 16
"""The limit of numbers that are keys of a dictionary, such as an optimizer's; so few cannot collide much."""

FLOATS = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}
STORAGES = {
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
}


class UnsafePickle(ValueError):
    """A pickle that asks for something other than arrays, numbers, strings, lists and dictionaries."""


class Global:
    def __init__(self, name: str) -> None:
        self.name = name


class Text(Blob):
    """A long string, left in the file."""


class DType:
    def __init__(self, code: str) -> None:
        self.code = code


class Pending:
    """An ndarray between `_reconstruct` and BUILD, and the finished one after it."""

    array: StoredArray | None = None


class Storage:
    def __init__(self, dtype: torch.dtype, key: str, numel: int) -> None:
        self.dtype, self.key, self.numel = dtype, key, numel
        self.data: Blob | bytes = b""
        self.start = 0


Call = Callable[["Machine", tuple[Any, ...]], Any]
"""`branch(machine, arguments)`: the value made, or None where the arguments are not those of an array."""


class Machine:
    """Runs one pickle that lies in `file` between its position and `end`."""

    def __init__(
        self,
        file: BinaryIO,
        end: int,
        path: Path,
        calls: Mapping[str, Call | None],
        outer: Machine | None = None,
    ) -> None:
        """`calls`: every name that may occur, with the branch that stands for calling it (None: never called)."""
        self.file, self.end, self.path, self.calls = file, end, path, calls
        self.nested = self.stores = outer is not None
        self.budget: list[int] = [_MAX_OPCODES] if outer is None else outer.budget
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def refused(self, reason: str) -> UnsafePickle:
        return UnsafePickle(
            f"{self.path}: byte {self.file.tell()}: {reason}; refused, and nothing in it was run"
        )

    def read(self, count: int) -> bytes:
        if count > self.end - self.file.tell():
            raise ValueError(f"{self.path}: ends in the middle of a value; it is truncated, get it again")
        return self.file.read(count)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.read(struct.calcsize(form)))[0]

    def run(self) -> Any:
        while self.budget[0] > 0:
            self.budget[0] -= 1
            code = self.read(1)
            if code == b".":
                value = self.pop()
                if self.stack or self.marks:
                    raise self.refused("expected one value at the end, got more")
                return self.plain(value)
            handler = _HANDLERS.get(code)
            if handler is None:
                known = pickletools.code2op.get(code.decode("latin-1"))
                raise self.refused(f"opcode {known.name if known else repr(code)} has no place in arrays")
            handler(self)
        raise self.refused(f"expected at most {_MAX_OPCODES} opcodes")

    def plain(self, value: Any) -> Any:
        """What may be stored or returned: not the machine's own half-made things."""
        if isinstance(value, (Global, DType, Pending, Text, Blob)) or (
            isinstance(value, Storage) and not self.nested
        ):
            raise self.refused(f"expected arrays and numbers as values, got {kind_of(value)}")
        return value

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.refused("takes a value that is not there")
        return self.stack.pop()

    def protocol(self) -> None:
        version = self.number("<B")
        if version > 5:
            raise self.refused(f"a pickle of protocol {version}, expected 2 to 5")

    def skip_frame(self) -> None:
        self.number("<Q")

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self.refused("takes a mark that is not there")
        start = self.marks.pop()
        values, self.stack[start:] = self.stack[start:], []
        return values

    def top(self, kind: type, what: str) -> Any:
        value = self.pop()
        if type(value) is not kind:
            raise self.refused(f"expected {what}, got {kind_of(value)}")
        self.stack.append(value)
        return value

    def text(self, length: int) -> None:
        if length > _MAX_INLINE:
            self.push(Text(*self.skip(length)))
            return
        try:
            self.push(self.read(length).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise self.refused("a string that is not UTF-8") from error

    def blob(self, length: int) -> None:
        self.push(Blob(*self.skip(length)) if length > _MAX_INLINE else self.read(length))

    def skip(self, length: int) -> tuple[int, int]:
        start = self.file.tell()
        if length > self.end - start:
            raise ValueError(f"{self.path}: ends in the middle of an array; it is truncated, get it again")
        self.file.seek(length, io.SEEK_CUR)
        return start, length

    def integer(self, length: int) -> None:
        if not 0 <= length <= 16:
            raise self.refused(f"an integer of {length} bytes")
        self.push(int.from_bytes(self.read(length), "little", signed=True))

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def append(self, values: list[Any]) -> None:
        self.top(list, "a list").extend(self.plain(value) for value in values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top(dict, "a dictionary")
        if len(values) % 2:
            raise self.refused("a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Hashing a tuple of tuples of tuples could take for ever, and so could many integers of one hash.
            if type(key) is not str and (type(key) is not int or not 0 <= key < _MAX_KEY):
                raise self.refused(f"expected names as keys, got {kind_of(key)}")
            target[key] = self.plain(value)

    def remember(self, index: int) -> None:
        value = self.pop()
        self.push(value)
        self.memo[index] = value

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.refused("recalls a value that was never stored")
        value = self.memo[index]
        finished = value.array if type(value) is Pending else None
        self.push(value if finished is None else finished)

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise self.refused("a name that is not two strings")
        full = f"{module}.{name}"
        canonical = full.replace("numpy.core.", "numpy._core.", 1) if full.startswith("numpy.core.") else full
        if canonical not in self.calls:
            raise self.refused(f"asks for {full[:200]!r}, which is not part of an array")
        self.push(Global(canonical))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def line(self) -> str:
        raw = self.file.readline(300)
        if not raw.endswith(b"\n") or self.file.tell() > self.end:
            raise self.refused("a name without an end")
        return raw[:-1].decode("utf-8", "replace")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not Global or type(arguments) is not tuple:
            raise self.refused(f"calls {kind_of(function)} with {kind_of(arguments)}")
        branch = self.calls[function.name]
        made = None if branch is None else branch(self, arguments)
        if made is None:
            kinds = ", ".join(kind_of(argument) for argument in arguments[:8])
            raise self.refused(f"calls {function.name} with ({kinds}), which makes no array")
        self.push(made)

    def build(self) -> None:
        state, target = self.pop(), self.pop()
        if type(target) is DType and matches(state, (3, "<", None, None, None, -1, -1, 0)):
            self.push(target)
        elif type(target) is DType and matches(state, (3, "|", None, None, None, -1, -1, 0)):
            self.push(target)
        elif type(target) is Pending and type(state) is tuple and len(state) == 5 and state[0] == 1:
            if type(state[4]) is list:
                raise self.refused("an array of Python objects")
            target.array = self.array(state[1], state[2], state[4], state[3] is not False)
            self.push(target.array)
        else:
            raise self.refused(f"sets the state of {kind_of(target)} to {kind_of(state)}")

    def array(self, shape: Any, dtype: Any, data: Any, fortran: bool) -> StoredArray:
        sizes = self.sizes(shape)
        if type(dtype) is not DType or dtype.code not in FLOATS:
            got = dtype.code if type(dtype) is DType else kind_of(dtype)
            raise self.refused(f"expected an array of float16, float32 or float64, got dtype {got!r}")
        if type(data) not in (bytes, Blob):
            raise self.refused(f"expected an array's bytes, got {kind_of(data)}")
        if fortran and sum(size > 1 for size in sizes) > 1:
            raise self.refused("an array in Fortran order; save numpy.ascontiguousarray(array) instead")
        array = StoredArray(self.path, sizes, FLOATS[dtype.code], data)
        length = len(data) if isinstance(data, bytes) else data.length
        text = isinstance(data, Blob) and data.latin1
        if not (length == array.nbytes or (text and array.nbytes <= length <= 2 * array.nbytes)):
            raise self.refused(f"an array of shape {list(sizes)} and {array.nbytes} bytes holds {length}")
        return array

    def sizes(self, shape: Any) -> tuple[int, ...]:
        if (
            type(shape) is not tuple
            or not len(shape) <= 8
            or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
        ):
            raise self.refused(f"expected a shape of non-negative integers, got {kind_of(shape)}")
        return shape

    def persistent(self) -> None:
        """A storage of torch's older file format, which a tensor's pickle embeds, or of an entry of a zip file."""
        given = self.pop()
        fields = 6 if self.nested else 5  # the older format's views, always None
        if not self.stores or type(given) is not tuple or len(given) != fields:
            raise self.refused("a persistent id outside of a torch storage")
        tag, kind, key, _, numel, view = (*given, None)[:6]
        if tag != "storage" or type(kind) is not Global or kind.name not in STORAGES or view is not None:
            raise self.refused("a persistent id that is no plain float storage")
        if type(key) is not str or type(numel) is not int or not 0 <= numel < 1 << 40:
            raise self.refused("a storage without a name or a size")
        self.push(Storage(STORAGES[kind.name], key, numel))


def matches(value: Any, wanted: tuple[Any, ...]) -> bool:
    """Equal in values and types, looking no deeper than `wanted`."""
    return (
        type(value) is tuple
        and len(value) == len(wanted)
        and all(type(v) is type(w) and v == w for v, w in zip(value, wanted, strict=True))
    )


def kind_of(value: Any) -> str:
    return value.name if type(value) is Global else type(value).__name__.lstrip("_")


_HANDLERS: dict[bytes, Callable[[Machine], None]] = {
    b"\x80": lambda m: m.protocol(),
    b"\x95": lambda m: m.skip_frame(),
    b"(": lambda m: m.marks.append(len(m.stack)),
    b")": lambda m: m.push(()),
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push({}),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_mark()),
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.pop_mark()),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"J": lambda m: m.push(m.number("<i")),
    b"G": lambda m: m.push(m.number(">d")),
    b"\x8a": lambda m: m.integer(m.number("<B")),
    b"\x8b": lambda m: m.integer(m.number("<i")),
    b"\x8c": lambda m: m.text(m.number("<B")),
    b"X": lambda m: m.text(m.number("<I")),
    b"\x8d": lambda m: m.text(m.number("<Q")),
    b"C": lambda m: m.blob(m.number("<B")),
    b"B": lambda m: m.blob(m.number("<I")),
    b"\x8e": lambda m: m.blob(m.number("<Q")),
    b"\x96": lambda m: m.blob(m.number("<Q")),
    b"q": lambda m: m.remember(m.number("<B")),
    b"r": lambda m: m.remember(m.number("<I")),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"h": lambda m: m.recall(m.number("<B")),
    b"j": lambda m: m.recall(m.number("<I")),
    b"c": lambda m: m.name(m.line(), m.line()),
    b"\x93": lambda m: m.stack_global(),
    b"R": lambda m: m.reduce(),
    b"b": lambda m: m.build(),
    b"Q": lambda m: m.persistent(),
}
