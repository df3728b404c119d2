"""Labelled prompts, and the files that they are read from."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FIELDS = ("prompt", "concept", "style", "seed")


@dataclass(frozen=True)
class Prompt:
    """One image to generate: its text, the labels it carries (None: none), and the seed of its start noise."""

    text: str
    concept: str | None = None
    style: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"prompt: expected text, got {self.text!r}")
        for name in ("concept", "style"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise TypeError(f"{name}: expected a name or nothing, got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed: expected an integer, got {self.seed!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer in [0, 2^63), got {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        """The fields of a prompt file's row."""
        return {"prompt": self.text, "concept": self.concept, "style": self.style, "seed": self.seed}


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Prompts of a `.jsonl` file (one object a line) or a `.csv` file (with a header): `prompt`, and where known
    `concept`, `style`, `seed`. Rows without a seed take their number in the file, so no two images start alike.

    Raises:
        ValueError: naming file and line: unreadable, empty, an unknown column, a bad value.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"{path}: expected a .jsonl or .csv file of prompts")
    try:
        # Bytes, as lines end by "\n" only: prompts may hold other line separators. Spreadsheets put a mark in front.
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    prompts = [
        _prompt(row, number, f"{path}, line {line}") for number, (line, row) in enumerate(_rows(path, text))
    ]
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts


def prompt_lines(prompts: Sequence[Prompt]) -> bytes:
    """A `.jsonl` file of prompts, one a line."""
    return "".join(json.dumps(prompt.to_dict(), ensure_ascii=False) + "\n" for prompt in prompts).encode()


def _rows(path: Path, text: str):
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, line {reader.line_num}: expected {len(reader.fieldnames)} columns"
                    )
                yield reader.line_num, {name: value for name, value in row.items() if value != ""}
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error
        return
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                row = json.loads(content)
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {line}: expected a JSON object, got {type(row).__name__}")
            yield line, row


def _prompt(row: dict[str, Any], number: int, place: str) -> Prompt:
    unknown = sorted(set(row) - set(_FIELDS))
    if unknown or "prompt" not in row:
        raise ValueError(
            f"{place}: expected the columns {', '.join(_FIELDS)}, of which prompt is needed; got "
            f"{', '.join(map(str, row)) or 'none'}"
        )
    try:
        seed = row.get("seed", number)
        seed = int(seed) if isinstance(seed, str) else seed
        return Prompt(row["prompt"], row.get("concept"), row.get("style"), seed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error
