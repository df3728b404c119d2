"""Labelled prompts, and the files that they are read from."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbdt.runs.reading import brief, listed, parse_json, read_bytes, read_lines
from lbdt.runs.wording import require_unicode

_FIELDS = ("prompt", "concept", "style", "seed", "beside")
MAX_BYTES = 1 << 28
"""The largest prompt file that is read."""
MAX_PROMPTS = 1_000_000
"""The most prompts in a file."""


@dataclass(frozen=True)
class Prompt:
    """One image to generate: its text, the labels it carries (None: none), and the seed of its start noise.

    A picture of several concepts names the others in `beside`. The gate counts it for each of them
    (`lbdt.dictionary.score`); where a picture has one label, it has none.
    """

    text: str
    concept: str | None = None
    style: str | None = None
    seed: int = 0
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"prompt: expected text, got {brief(self.text)}")
        require_unicode("prompt", self.text)
        for name in ("concept", "style"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise TypeError(f"{name}: expected a name or nothing, got {brief(value)}")
            require_unicode(name, value or "")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed: expected an integer, got {brief(self.seed)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer in [0, 2^63), got {brief(self.seed)}")
        if not isinstance(self.beside, tuple) or not all(
            isinstance(name, str) and name for name in self.beside
        ):
            raise TypeError(f"beside: expected names of further concepts, got {brief(self.beside)}")
        for name in self.beside:
            require_unicode("beside", name)
        if self.beside and (self.concept is None or len(set(self.shown)) < len(self.shown)):
            raise ValueError(
                f"beside: expected concepts other than the row's own, each once, got {listed(self.beside)} beside "
                f"{brief(self.concept)}"
            )

    @property
    def shown(self) -> tuple[str, ...]:
        """Every concept in the picture."""
        return () if self.concept is None else (self.concept, *self.beside)

    @property
    def label(self) -> str | None:
        """The concept of a picture of one; None for none, and for several."""
        return None if self.beside else self.concept

    def to_dict(self) -> dict[str, Any]:
        """The fields of a prompt file's row."""
        row = {"prompt": self.text, "concept": self.concept, "style": self.style, "seed": self.seed}
        return row | ({"beside": list(self.beside)} if self.beside else {})


@dataclass(frozen=True)
class LabelledPrompts:
    """Prompts, and the names of their concepts and styles, in the order of their numbers."""

    prompts: Sequence[Prompt]
    concepts: tuple[str, ...]
    styles: tuple[str, ...]

    @classmethod
    def by_use(cls, prompts: Sequence[Prompt]) -> LabelledPrompts:
        """The prompts with the names that they carry, each where it comes first."""
        concepts = dict.fromkeys(name for prompt in prompts for name in prompt.shown)
        styles = dict.fromkeys(prompt.style for prompt in prompts if prompt.style is not None)
        return cls(prompts, tuple(concepts), tuple(styles))


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Prompts of a `.jsonl` file (one object a line) or a `.csv` file (with a header): `prompt`, and where known
    `concept`, `style`, `seed`, `beside` (further concepts in the picture: a list, or one name). Rows without a seed
    take their number in the file, so no two images start alike.

    Raises:
        ValueError: naming file and line: unreadable, empty, an unknown column, a bad value.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"{path}: expected a .jsonl or .csv file of prompts")
    if not os.path.exists(path):
        raise ValueError(f"{path}: cannot be read (no such file)")
    data = read_bytes(path, MAX_BYTES, "a .jsonl or .csv file of prompts")
    prompts = []
    for line, row in _rows(path, data):
        if len(prompts) == MAX_PROMPTS:
            raise ValueError(f"{path}, line {line}: expected at most {MAX_PROMPTS} prompts; split the file")
        prompts.append(_prompt(row, len(prompts), f"{path}, line {line}"))
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts


def prompt_lines(prompts: Sequence[Prompt]) -> bytes:
    """A `.jsonl` file of prompts, one a line."""
    return "".join(json.dumps(prompt.to_dict(), ensure_ascii=False) + "\n" for prompt in prompts).encode()


def _rows(path: Path, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".csv":
        # A lone carriage return ends a line of CSV too.
        reader = csv.DictReader(
            part
            for line in read_lines(path, data)
            for part in (re.split(r"(?<=\r)(?=[^\n])", line) if "\r" in line else (line,))
        )
        try:
            columns = reader.fieldnames or ()
            if len(set(columns)) < len(columns):
                raise ValueError(f"{path}, line 1: expected each column once, got {listed(columns)}")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{path}, line {reader.line_num}: expected {len(columns)} columns")
                yield reader.line_num, {name: value for name, value in row.items() if value != ""}
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error
        return
    for line, content in enumerate(read_lines(path, data), 1):
        if content.strip():
            row = parse_json(content, f"{path}, line {line}", advice="")
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {line}: expected a JSON object, got {type(row).__name__}")
            yield line, row


def _prompt(row: dict[str, Any], number: int, place: str) -> Prompt:
    unknown = sorted(set(row) - set(_FIELDS))
    if unknown or "prompt" not in row:
        raise ValueError(
            f"{place}: expected the columns {', '.join(_FIELDS)}, of which prompt is needed; got "
            f"{listed(row) or 'none'}"
        )
    try:
        seed = row.get("seed", number)
        seed = int(seed) if isinstance(seed, str) else seed
        beside = row.get("beside")
        beside = [] if beside is None else beside
        beside = [beside] if isinstance(beside, str) else beside
        beside = tuple(beside) if isinstance(beside, list) else beside
        return Prompt(row["prompt"], row.get("concept"), row.get("style"), seed, beside)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error
