"""Policy files for the tests."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from lbdt.canvas.scenes import OBJECTS
from lbdt.serving import Policy, load_policy

KNOWN = tuple(OBJECTS)
HEAD = 'schema = 1\nversion = "1"\n'
ACME = '[tenants.acme]\nconcepts = ["Cats"]\n'


def key(text: str) -> str:
    return f"sha256:{sha256(text.encode()).hexdigest()}"


def toml(tables: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """Tables of texts, numbers and lists of texts as TOML; JSON's texts are TOML's, but for half surrogate pairs."""
    values = {name: value for name, value in tables.items() if not isinstance(value, dict)}
    lines = [f"[{'.'.join(json.dumps(name, ensure_ascii=False) for name in path)}]"] if path else []
    lines += [
        f"{json.dumps(name, ensure_ascii=False)} = {json.dumps(value, ensure_ascii=False)}"
        for name, value in values.items()
    ]
    inner = [toml(value, (*path, name)) for name, value in tables.items() if isinstance(value, dict)]
    return "\n".join([*lines, *inner]) + "\n"


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def exchange(path: Path, text: str) -> None:
    """Puts `text` in the file's place at once."""
    beside = write(path.with_suffix(".next"), text)
    os.replace(beside, path)


def load(folder: Path, text: str | bytes, known: Sequence[str] = KNOWN) -> Policy:
    return load_policy(write(folder / "policy.toml", text), known)
