"""Small jobs, and what their folders hold."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from lbdt import canvas, cli
from lbdt.serving.jobs import PictureJob

BROKEN = "An image of Sea in Neon style."
"""What `spoiled` cannot make."""


def prompt(*names: str) -> str:
    return canvas.prompt(list(names), "Sketch")


SMALL = ("--kind", "sdxl", "--steps", "2", "--batch", "2", "--threads", "1", "--device", "cpu")
"""The options of `small_job`."""

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


def begin(whole: Path, out: Path, lines: list[int]) -> None:
    """As an interrupted run left it: the pictures of these lines."""
    shutil.copytree(whole, out)
    (out / "summary.json").unlink()
    kept = [row for row in records(out) if row["line"] in lines]
    for row in records(out):
        if row not in kept:
            (out / row["file"]).unlink()
    write(out / "records.jsonl", kept)


def lbdt(*arguments: object) -> Any:
    """`lbdt generate`, in this process."""
    return CliRunner().invoke(cli.app, ["generate", *map(str, arguments)])
