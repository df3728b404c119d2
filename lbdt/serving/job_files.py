"""The folder of a batch job: what is there, what is to be made, and the records of all pictures.

    settings.json    what the pictures follow from, so that a job is not continued by another
    prompts.jsonl    a copy of the job's file
    model.json       the pipeline's fingerprint, which each worker compares with its own
    pictures/        ID.png; in folders of 1000 lines each where there are more than 10,000
    records.jsonl    a line for each picture, in the file's order: what was detected and replaced in each step
    parts/           while a run is on: the records of its batches
    summary.json     in the end

A batch's pictures are written first, each under a temporary name, then their records as one file in `parts`. A picture
without a record is made again, so that a process may be killed at any moment. No file says when or by whom it was made:
the folder of an interrupted job ends with the same bytes as another one's.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbdt.runs.digests import sha256
from lbdt.runs.files import json_bytes, remove_leftovers, write_files
from lbdt.runs.reading import listed, open_regular, parse_json, read_bytes, read_json
from lbdt.runs.settings import keep_settings
from lbdt.serving.audit_lines import OUTCOMES
from lbdt.serving.job_lines import MOST_BYTES, JobLine

FORMAT = 1
SETTINGS, PROMPTS, RECORDS, SUMMARY = "settings.json", "prompts.jsonl", "records.jsonl", "summary.json"
PICTURES, PARTS = "pictures", "parts"
MOST_FLAT = 10_000
"""The most lines whose pictures share one folder."""
_SHARD = 1000
_MADE = ("protected", "unprotected")
_WORDING = (
    "holds pictures of another job: {differences}; give the same settings to continue, or another folder"
)


@dataclass(frozen=True)
class Record:
    """What is known of a picture; `text` is its line of records.jsonl."""

    line: int
    outcome: str
    """One of `lbdt.serving.audit_lines.OUTCOMES`."""
    reason: str | None
    file: str | None
    size: int | None
    """Bytes of the picture's file."""
    concepts: tuple[str, ...]
    text: bytes

    @property
    def made(self) -> bool:
        """Whether there is a picture."""
        return self.outcome in _MADE


def record_of(text: bytes) -> Record:
    """The record of a line of text; ValueError where it is none."""
    row = parse_json(text, "a record")
    try:
        values = [row[name] for name in ("line", "outcome", "reason", "file", "bytes")]
        concepts = tuple(row["concepts"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"no record: {error!r}") from error
    if type(values[0]) is not int or values[1] not in OUTCOMES:
        raise ValueError("no record: expected a line's number and an outcome")
    return Record(*values, concepts, text.rstrip(b"\n") + b"\n")


def picture_file(line: JobLine, lines: int) -> str:
    """Where the picture is, as a path below the job's folder."""
    shard = f"{line.number // _SHARD:04}/" if lines > MOST_FLAT else ""
    return f"{PICTURES}/{shard}{line.id}.png"


def write_batch(
    folder: Path, first: JobLine, pictures: Mapping[str, bytes], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Writes pictures, by their paths below `folder`, then the records of the batch whose first line is `first`."""
    places: dict[Path, dict[str, bytes]] = {}
    for name, data in pictures.items():
        path = folder / name
        places.setdefault(path.parent, {})[path.name] = data
    for place, files in places.items():
        write_files(place, files)
    for row in rows:
        if row["file"] is None:  # what a damaged disk or another hand left there is not this picture
            (folder / row["path"]).unlink(missing_ok=True)
    text = "".join(
        json.dumps({name: value for name, value in row.items() if name != "path"}, ensure_ascii=False) + "\n"
        for row in rows
    )
    write_files(_part(folder, first).parent, {_part(folder, first).name: text.encode()})


def _part(folder: Path, first: JobLine) -> Path:
    return folder / PARTS / f"{first.number // _SHARD:04}" / f"{first.number:07}.jsonl"


class JobFolder:
    """The folder of a job, held by the process that runs it."""

    def __init__(self, folder: Path, lines: Sequence[JobLine]) -> None:
        self.folder, self.lines = folder, lines
        self._place = {line.number: place for place, line in enumerate(lines)}
        self._records: list[Record | None] = [None] * len(lines)

    def begin(self, settings: Mapping[str, Any], prompts: bytes) -> None:
        """Keeps the settings and the job's file, or compares them with those of an earlier run; reads what is there.

        Raises:
            ValueError: a folder of other settings, naming which, or of other files.
        """
        others = sorted(
            path.name for path in self.folder.iterdir() if path.name[0] != "." and path.name != PROMPTS
        )
        if not (self.folder / SETTINGS).is_file():
            if others:
                raise ValueError(
                    f"{self.folder}: holds other files ({', '.join(others[:3])}); give a folder of its own"
                )
            write_files(self.folder, {PROMPTS: prompts})
        else:
            self._compare_prompts(prompts)
        given = {"format": FORMAT, **settings, "lines": len(self.lines), "prompts": sha256(prompts)}
        keep_settings(self.folder, SETTINGS, given, _WORDING)
        for place in (self.folder, *self.folder.glob(f"{PICTURES}/"), *self.folder.glob(f"{PICTURES}/*/")):
            remove_leftovers(place)
        self.gather()

    def missing(self) -> list[JobLine]:
        """The lines without a picture, or with one whose file is not there whole (which stderr says)."""
        lines = []
        for line, record in zip(self.lines, self._records, strict=True):
            if record is None or not record.made:
                lines.append(line)
            elif not self._whole(record):
                sys.stderr.write(
                    f"lbdt: {self.folder / record.file}: not as it was written; making it again\n"
                )
                lines.append(line)
        return lines

    def gather(self) -> None:
        """Moves what `parts` holds to records.jsonl."""
        self._read(self.folder / RECORDS)
        parts = sorted(self.folder.glob(f"{PARTS}/*/*.jsonl"))
        for part in parts:
            self._read(part)
        if parts:
            write_files(self.folder, {RECORDS: self._text()})
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)

    def reopen(self) -> None:
        """Removes the summary, which what is made from here on makes untrue."""
        (self.folder / SUMMARY).unlink(missing_ok=True)

    def finish(self) -> dict[str, Any]:
        """Writes summary.json, and returns what it says.

        Raises:
            RuntimeError: a line has no record.
        """
        lost = [line.id for line, record in zip(self.lines, self._records, strict=True) if record is None]
        if lost:
            raise RuntimeError(f"{self.folder}: no record of {listed(lost)}; the same command makes them")
        summary = self.summary()
        write_files(self.folder, {SUMMARY: json_bytes(summary)})
        return summary

    def summary(self) -> dict[str, Any]:
        """How many pictures are there; which are unprotected, and which were refused, and why."""
        known = [(line, record) for line, record in zip(self.lines, self._records, strict=True) if record]
        return {
            "lines": len(self.lines),
            "pictures": sum(record.made for _, record in known),
            "protected": sum(record.outcome == "protected" and bool(record.concepts) for _, record in known),
            "without_concepts": sum(record.made and not record.concepts for _, record in known),
            "unprotected": [line.id for line, record in known if record.outcome == "unprotected"],
            "refused": {line.id: record.reason for line, record in known if not record.made},
            "records": sha256(self._text()),
        }

    @property
    def finished(self) -> bool:
        """Whether an earlier run came to its end, whatever was refused."""
        return (self.folder / SUMMARY).is_file()

    def _text(self) -> tuple[bytes, ...]:
        return tuple(record.text for record in self._records if record is not None)

    def _whole(self, record: Record) -> bool:
        path = self.folder / str(record.file)
        return path.is_file() and path.stat().st_size == record.size

    def _read(self, path: Path) -> None:
        for number, record in enumerate(_records_of(path), 1):
            if record is None or record.line not in self._place:
                sys.stderr.write(
                    f"lbdt: {path}, line {number}: no record of this job; making its picture again\n"
                )
                continue
            place = self._place[record.line]
            before = self._records[place]
            # A process of an earlier run, on another machine, may come late: a picture that is there stays.
            if before is None or record.made or not before.made:
                self._records[place] = record

    def _compare_prompts(self, prompts: bytes) -> None:
        path = self.folder / PROMPTS
        there = read_bytes(path, MOST_BYTES)
        if there == prompts:
            return
        before, after = there.split(b"\n"), prompts.split(b"\n")
        both = zip(before, after, strict=False)
        shorter = min(len(before), len(after))
        number = next((n for n, (old, new) in enumerate(both, 1) if old != new), shorter + 1)
        raise ValueError(
            f"{self.folder}: holds pictures of another file of prompts, which differs from line {number} on (it is "
            f"kept as {path.name}); give that one to continue, or another folder"
        )


def begun_with(folder: Path, name: str) -> Any:
    """A setting of the job that was begun in the folder; None where none was."""
    path = folder / SETTINGS
    settings = read_json(path) if path.is_file() else {}
    return settings.get(name) if isinstance(settings, dict) else None


def _records_of(path: Path) -> Iterator[Record | None]:
    if not path.is_file():
        return
    with open_regular(path) as file:
        for text in file:
            try:
                yield record_of(text)
            except ValueError:
                yield None
