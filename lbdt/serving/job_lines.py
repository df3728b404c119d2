"""The file of a batch job: a picture a line, read strictly, so that a job which begins does not end by a bad line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbdt.runs.limits import MOST_SEED
from lbdt.runs.reading import brief, listed, parse_json, read_bytes, read_lines
from lbdt.runs.wording import nearest, printable
from lbdt.serving.sizes import pixels_of

MOST_BYTES = 1 << 28
"""The largest file that is read."""
MOST_LINES = 1_000_000
"""The most pictures of a job."""
_MOST_FAULTS = 20
_LEAST_DIGITS = 6
_FIELDS = ("prompt", "seed", "concepts", "id", "size")
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


class JobLinesError(ValueError):
    """A job's file that is refused as a whole.

    Attributes:
        faults: a text for each: the line, what was given, what was expected.
    """

    def __init__(self, path: Path, faults: Sequence[str]) -> None:
        self.path, self.faults = path, tuple(faults)
        file, lines = printable(str(path)), list(self.faults[:_MOST_FAULTS])
        if len(self.faults) > 1:
            more = len(self.faults) - len(lines)
            lines = [f"refused, {len(self.faults)} faults", *(f"  {fault}" for fault in lines)]
            lines += [f"  and {more} more"] if more else []
            super().__init__(f"{file}: " + "\n".join(lines))
        else:
            super().__init__(f"{file}, {lines[0]}")


@dataclass(frozen=True)
class JobLine:
    """One picture of a job."""

    number: int
    """Its line in the file, from 1."""
    id: str
    """The picture's name, without .png."""
    prompt: str
    seed: int
    concepts: tuple[str, ...]
    """What is erased; none: nothing."""
    size: tuple[int, int] | None = None
    """(width, height) in pixels; None: the pipeline's own."""


def read_job(
    path: Path, known: Iterable[str], concepts: Sequence[str] | None = None, seed: int = 0
) -> tuple[bytes, list[JobLine]]:
    """The file's bytes, and its pictures in order. Empty lines are left out, and counted.

    Args:
        path: one JSON object a line, `{"prompt": "...", "seed": 1, "concepts": ["Cats"], "id": "a1", "size":
            "512x512"}`, of which only the prompt is needed.
        known: the names of the concepts that may be erased.
        concepts: what is erased where a line does not say; None: each line has to.
        seed: a line without one has this plus its number.

    Raises:
        JobLinesError: all that is wrong in the lines. ValueError: no such file, or a larger one.
    """
    data = read_bytes(path, MOST_BYTES, 'a file of JSON lines such as {"prompt": "a cat on a sofa"}')
    faults: list[str] = []
    rows: list[tuple[int, dict[str, Any]]] = []
    try:
        for number, text in enumerate(read_lines(path, data), 1):
            if text.strip():
                rows += _row(number, text, faults)
            if len(rows) > MOST_LINES:
                faults.append(f"line {number}: expected at most {MOST_LINES} pictures; split the file")
                break
    except ValueError as error:  # no UTF-8, or too long: what follows cannot be told
        faults.append(str(error).removeprefix(f"{path}, "))
    if not rows and not faults:
        raise ValueError(f'{path}: holds no line; expected one such as {{"prompt": "a cat on a sofa"}}')
    reader = _Reader(
        frozenset(known), concepts, seed, max(_LEAST_DIGITS, len(str(rows[-1][0] if rows else 0)))
    )
    lines = [reader.line(number, row, faults) for number, row in rows]
    if faults:
        raise JobLinesError(path, sorted(faults, key=_number))
    return data, [line for line in lines if line is not None]


def _number(fault: str) -> int:
    found = re.match(r"line (\d+)", fault)
    return int(found[1]) if found else 0


def _row(number: int, text: str, faults: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The line's object, if it is one."""
    try:
        row = parse_json(text, f"line {number}", advice="")
        if not isinstance(row, dict):
            raise ValueError(f"line {number}: expected a JSON object, got {_given(row)}")
        yield number, row
    except ValueError as error:
        faults.append(str(error))


class _Reader:
    """Lines from objects; `ids` are those so far, with their lines."""

    def __init__(self, known: frozenset[str], concepts: Sequence[str] | None, seed: int, digits: int) -> None:
        self.known, self.seed, self.digits = known, seed, digits
        self.concepts = None if concepts is None else tuple(concepts)
        self.ids: dict[str, int] = {}

    def line(self, number: int, row: dict[str, Any], faults: list[str]) -> JobLine | None:
        """The line; None where it has faults, of which the first of each field is told."""
        before = len(faults)

        def read(field, *given):
            try:
                return field(number, row, *given)
            except ValueError as error:
                faults.append(f"line {number}: {error}")

        read(self._names)
        values = [read(field) for field in (self._id, self._prompt, self._seed, self._concepts, self._size)]
        return None if len(faults) > before else JobLine(number, *values)

    def _names(self, number: int, row: dict[str, Any]) -> None:
        for name in row:
            if name not in _FIELDS:
                near = nearest(name, _FIELDS)
                hint = f"; did you mean {near!r}?" if near else ""
                raise ValueError(f"unknown field {brief(name)}; expected {', '.join(_FIELDS)}{hint}")

    def _id(self, number: int, row: dict[str, Any]) -> str:
        name = row.get("id")
        name = f"{number:0{self.digits}}" if name is None else name
        if not isinstance(name, str) or not _ID.fullmatch(name):
            raise ValueError(
                f"id: expected at most 100 letters, digits and . _ -, the first no dot, got {_given(name)}"
            )
        if name in self.ids:
            raise ValueError(f"id: {name!r} is that of line {self.ids[name]} too; expected another one")
        self.ids[name] = number
        return name

    def _prompt(self, number: int, row: dict[str, Any]) -> str:
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt: expected text, got {_given(prompt) if 'prompt' in row else 'none'}")
        return prompt

    def _seed(self, number: int, row: dict[str, Any]) -> int:
        seed = row.get("seed")
        seed = self.seed + number if seed is None else seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MOST_SEED:
            raise ValueError(f"seed: expected a whole number from 0 to 2^63 - 1, got {_given(seed)}")
        return seed

    def _concepts(self, number: int, row: dict[str, Any]) -> tuple[str, ...]:
        names = row.get("concepts")
        if names is None:
            if self.concepts is None:
                raise ValueError(
                    "concepts: which concepts? Give a list of names, [] for none; or --concept NAME for all lines "
                    "without one"
                )
            return self.concepts
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'concepts: expected a list of names such as ["Cats"], got {_given(names)}')
        for name in names:
            if name not in self.known:
                raise ValueError(unknown_concept("concepts", name, self.known))
        if len(set(names)) < len(names):
            raise ValueError(f"concepts: expected each name once, got {listed(names)}")
        return tuple(names)

    def _size(self, number: int, row: dict[str, Any]) -> tuple[int, int] | None:
        size = row.get("size")
        if size is None or size == "auto":
            return None
        if not isinstance(size, str):
            raise ValueError(f"size: expected WIDTHxHEIGHT such as 512x512, got {_given(size)}")
        return pixels_of(size)


def unknown_concept(where: str, name: str, known: Iterable[str]) -> str:
    """What is said of a concept that an eraser does not know."""
    near = nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else f"; expected of {listed(sorted(known))}"
    return f"{where}: unknown concept {brief(name)}{hint}"


def _given(value: Any) -> str:
    """A JSON value for a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return {list: "a list", dict: "an object"}.get(type(value)) or brief(value)
