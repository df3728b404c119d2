"""Small jobs, and what their folders hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lbdt import canvas
from lbdt.serving.jobs import PictureJob

BROKEN = "An image of Sea in Neon style."
"""What `spoiled` cannot make."""


def prompt(*names: str) -> str:
    return canvas.prompt(list(names), "Sketch")


LINES = [
    {"prompt": prompt("Cats", "Dogs")},
    {"prompt": prompt("Cats", "Dogs"), "seed": 1, "id": "dogs.1", "concepts": ["Dogs", "Towers"]},
    {"prompt": prompt("Towers"), "concepts": [], "seed": 2**63 - 1},
    {"prompt": prompt("Towers"), "size": "64x64", "id": "A_small-one"},
    {"prompt": prompt("Human"), "concepts": ["Human"]},
]


def write(path: Path, rows: list[Any]) -> Path:
    """A file of JSON lines; texts as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def small_job(prompts: Path, out: Path, **settings: Any) -> PictureJob:
    """Two steps, two rows a call, one thread."""
    given = {"concepts": ["Cats"], "kind": "sdxl", "steps": 2, "batch": 2, "threads": 1, "device": "cpu"}
    return PictureJob(prompts, out, **(given | {"progress": False} | settings))


def files(folder: Path) -> dict[str, bytes]:
    """All of a folder's files, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def records(folder: Path) -> list[dict[str, Any]]:
    """The records; each picture has the size and the digest that they say."""
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for row in rows:
        if row["file"] is not None:
            data = (folder / row["file"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (row["bytes"], row["image"])
    return rows


def content(folder: Path) -> dict[str, Any]:
    """All that a finished job's folder holds, without the digests and sizes, which `records` has compared."""
    found: dict[str, Any] = files(folder)
    for name in ("bytes", "image"):
        assert all(name in row for row in records(folder))
    found["records.jsonl"] = [
        {name: value for name, value in row.items() if name not in ("bytes", "image")}
        for row in records(folder)
    ]
    summary = json.loads(found["summary.json"])
    assert summary.pop("records") == hashlib.sha256((folder / "records.jsonl").read_bytes()).hexdigest()
    return found | {"summary.json": summary}
