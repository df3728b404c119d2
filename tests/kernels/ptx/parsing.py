"""PTX text as a list of instructions, for `tests.kernels.ptx.machine`.

Reads what Triton, LLVM and nvcc emit: one entry, or several in a module, statements, nested scopes of inline assembly
with registers and labels of their own. Source: PTX ISA, chapters 4 (syntax) and 5 (state spaces).
"""

import dataclasses
import re
from typing import NamedTuple

WIDTHS = {"pred": 1, "b8": 1, "b16": 2, "b32": 4, "b64": 8}
GAP = 16
"""Bytes at least between variables in shared memory, so that none is reached from another."""
TYPE = re.compile(r"(?:[subf](?:8|16|32|64)|pred|bf16|f16x2|bf16x2|b128)$")


class NotSupported(Exception):
    """PTX that the runner does not know; names the statement."""


class Register(NamedTuple):
    index: int
    width: int
    """Bytes; 1 for a predicate."""
    predicate: bool


class Immediate(NamedTuple):
    bits: int
    """Two's complement, or the bits of a float."""


class Special(NamedTuple):
    name: str
    """A register that the machine sets, such as %tid.x."""


class Symbol(NamedTuple):
    name: str
    """A variable, a parameter or a label."""


class Address(NamedTuple):
    base: object
    offset: int


class Vector(NamedTuple):
    members: tuple


class Parameter(NamedTuple):
    """Where a kernel finds an argument: its place in order, and its bytes in the space of all."""

    place: int
    offset: int
    size: int


class Variable(NamedTuple):
    """One in shared memory."""

    offset: int
    size: int
    """-1: as many bytes as the launch says."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    text: str
    name: str
    """The opcode up to its first dot."""
    parts: tuple[str, ...]
    """All of the opcode, split at its dots."""
    operands: tuple
    guard: Register | None = None
    negated: bool = False

    @property
    def types(self) -> tuple[str, ...]:
        """The types in the opcode, in its order."""
        return tuple(part for part in self.parts if TYPE.match(part))

    @property
    def type(self) -> str:
        """The last type, which is that of the operands."""
        if not self.types:
            raise NotSupported(f"{self.text}: expected a type in the opcode")
        return self.types[-1]

    def has(self, *parts: str) -> bool:
        """Whether all of `parts` are in the opcode."""
        return set(parts) <= set(self.parts)

    def registers(self) -> frozenset[int]:
        """Indices of all registers that are read or written."""
        return frozenset(_registers(self.operands, self.guard))


def _registers(operands, guard: Register | None) -> set[int]:
    found: set[int] = set() if guard is None else {guard.index}
    for operand in operands:
        match operand:
            case Register():
                found.add(operand.index)
            case Vector():
                found |= _registers(operand.members, None)
            case Address():
                found |= _registers([operand.base], None)
    return found


_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
_SPECIAL = re.compile(r"%(?:tid|ntid|ctaid|nctaid|laneid|warpid|clock|globaltimer|lanemask_\w+)\b")
_MEMORY = re.compile(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]$")


def entries(module: str) -> dict[str, str]:
    """The kernels of a module by name, each with what the module declares for all of them."""
    body = re.compile(r"^(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+).*?^\}", flags=re.MULTILINE | re.DOTALL)
    shared = body.sub("", module)
    return {found[1]: f"{shared}\n{found[0]}\n" for found in body.finditer(module)}


class Program:
    """One kernel: `code`, `labels` (name to place in `code`), its parameters and the memory that it declares."""

    def __init__(self, ptx: str) -> None:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
        text = re.sub(r"^\s*\.(?:loc|file)\b[^\n]*$", "", text, flags=re.MULTILINE)
        head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, flags=re.DOTALL)
        if head is None:
            raise NotSupported("expected a kernel (.entry) in the PTX, found none")
        self.name = head[1]
        self.parameters = _parameters(head[2])
        self.parameter_bytes = max((p.offset + p.size for p in self.parameters.values()), default=0)
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
        self.threads = int(threads[1]) if threads else 32
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.widths: list[Register] = []
        self.local_bytes = 0
        self.shared: dict[str, Variable] = {}
        """The variables in shared memory; that of unknown size comes last."""
        self.static_bytes = 0
        """Where that of unknown size begins."""
        self._dynamic_align = GAP
        self._declared: list[dict[str, object]] = [{}]
        for line in re.findall(
            r"^[^\n{]*\.shared\s+\.align[^\n;]*;", text[: head.start()], flags=re.MULTILINE
        ):
            self._declare(line.rstrip("; ").strip())
        self._read(text[head.end() :])
        self.static_bytes = -(-self.static_bytes // self._dynamic_align) * self._dynamic_align
        for name, variable in self.shared.items():
            if variable.size < 0:
                self.shared[name] = Variable(self.static_bytes, -1)
        self.unsteady = self._unsteady() if any(i.has("volatile") for i in self.code) else frozenset()

    def _read(self, text: str) -> None:
        place, depth = 0, 0
        statement = re.compile(r"\s*(?:([{}])|([$\w]+):(?!:)|([^;{}]*(?:\{[^{};]*\}[^;{}]*)*);)")
        while found := statement.match(text, place):
            place = found.end()
            brace, label, plain = found.groups()
            if brace == "{":
                depth += 1
                self._declared.append({})
            elif brace == "}":
                depth -= 1
                if depth < 0:
                    return
                self._declared.pop()
            elif label:
                self.labels[self._scoped(label)] = len(self.code)
            elif plain.lstrip().startswith("."):
                self._declare(plain.strip())
            elif plain.strip():
                self.code.append(self._instruction(" ".join(plain.split())))
        raise NotSupported(f"expected a statement, got {text[place : place + 60].strip()!r}")

    def _scoped(self, label: str) -> str:
        """A label's name; that of an inner scope is its own, under the place where it was first met."""
        if len(self._declared) == 1:
            return label
        return self._declared[-1].setdefault(f"label {label}", f"{label} at {len(self.code)}")

    def _declare(self, text: str) -> None:
        if found := re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text):
            for name in found[2].split(","):
                self._declared[-1][re.sub(r"<\d+>", "", name).strip()] = found[1]
        elif found := re.match(r"\.local\b.*?(\w+)\[(\d+)\]$", text):
            self._declared[-1][found[1]] = self.local_bytes
            self.local_bytes += int(found[2])
        elif found := re.search(r"\.shared\s+\.align\s+(\d+)\s+\.[a-z](\d+)\s+([\w$]+)(\[(\d*)\])?$", text):
            if found[4] == "[]":
                self.shared[found[3]] = Variable(0, -1)
                self._dynamic_align = max(self._dynamic_align, int(found[1]))
                return
            align, size = max(int(found[1]), GAP), int(found[2]) // 8 * int(found[5] or 1)
            self.static_bytes = -(-self.static_bytes // align) * align
            self.shared[found[3]] = Variable(self.static_bytes, size)
            self.static_bytes += size + GAP
        elif not re.match(r"\.(pragma|section|align)", text):
            raise NotSupported(f"{text}: a declaration that the runner does not know")

    def _instruction(self, text: str) -> Instruction:
        found = re.match(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
        if not found:
            raise NotSupported(f"{text}: expected an instruction")
        opcode = found[3].replace("::", "_")
        parts = tuple(opcode.split("."))
        guard = self._operand(found[2]) if found[2] else None
        operands = tuple(self._operand(part) for part in _split(found[4]))
        return Instruction(text, parts[0], parts, operands, guard, bool(found[1]))

    def _register(self, name: str) -> Register | None:
        for scope, declared in enumerate(reversed(self._declared)):
            kind = declared.get(name) or declared.get(name.rstrip("0123456789"))
            if not isinstance(kind, str):
                continue
            known = self._declared[len(self._declared) - 1 - scope]
            key = f"register {name}"
            if key not in known:
                width = WIDTHS.get(kind) or int(kind[1:]) // 8
                known[key] = Register(len(self.widths), width, kind == "pred")
                self.widths.append(known[key])
            return known[key]
        return None

    def _operand(self, text: str):
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self._operand(member) for member in _split(text[1:-1])))
        if found := _MEMORY.match(text):
            return Address(self._operand(found[1]), int((found[2] or "0").rstrip("U"), 0))
        if text.startswith("["):  # several: the coordinates of a tensor
            return Vector(tuple(self._operand(member) for member in _split(text[1:-1])))
        if "|" in text:
            return Vector(tuple(self._operand(member) for member in text.split("|")))
        if _SPECIAL.match(text):
            return Special(text)
        if found := re.match(r"0[fFdD]([0-9a-fA-F]{8,16})$", text):
            return Immediate(int(found[1], 16))
        if _NUMBER.match(text):
            return Immediate(int(text.rstrip("U"), 0))
        if register := self._register(text):
            return register
        if text.startswith("%"):
            raise NotSupported(f"{text}: a register that was not declared")
        return Symbol(self._label(text))

    def _label(self, name: str) -> str:
        for declared in reversed(self._declared[1:]):
            if f"label {name}" in declared:
                return declared[f"label {name}"]
        return name

    def _unsteady(self) -> frozenset[int]:
        """Registers computed from what a volatile load gave, by way of registers: each warp can have another value.

        Without regard to the order of instructions, so some more than that.
        """
        found: set[int] = set()
        while True:
            before = len(found)
            for instruction in self.code:
                if instruction.name in ("bra", "st", "red", "cp", "bar", "wgmma") or not instruction.operands:
                    continue
                target, *sources = instruction.operands
                if instruction.has("volatile") or (
                    instruction.name != "ld" and found & _registers(sources, instruction.guard)
                ):
                    found |= _registers([target], None)
            if len(found) == before:
                return frozenset(found)

    def local(self, name: str) -> int | None:
        """Offset of a variable in local memory."""
        offset = self._declared[0].get(name)
        return offset if isinstance(offset, int) else None


def _parameters(text: str) -> dict[str, Parameter]:
    """Parameters by name; one that is passed by value, such as a struct, is an array of bytes."""
    found: dict[str, Parameter] = {}
    end = 0
    for place, declared in enumerate(_split(text)):
        known = re.match(
            r"\s*\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z](\d+)\s.*?([\w$]+)(?:\[(\d+)\])?\s*$",
            declared,
            re.DOTALL,
        )
        if known is None:
            raise NotSupported(f"{declared.strip()}: a parameter that the runner does not know")
        size = int(known[2]) // 8
        align = int(known[1] or size)
        begin = -(-end // align) * align
        found[known[3]] = Parameter(place, begin, size * int(known[4] or 1))
        end = begin + size * int(known[4] or 1)
    return found


def _split(text: str) -> list[str]:
    """`text` at the commas outside of brackets."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        depth += letter in "{["
        depth -= letter in "}]"
        if letter == "," and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    return [part for part in [*parts, text[begin:]] if part.strip()]
