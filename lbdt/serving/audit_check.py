"""Checks the files that `lbdt.serving.audit` writes: spelling, order, hashes, and what one file says of another."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lbdt.runs.wording import printable, short
from lbdt.serving.audit_lines import (
    END,
    HASH,
    HASHINGS,
    HEADER,
    OUTCOMES,
    PICTURE,
    SCHEMA,
    PictureRecord,
    check_key,
    hashed,
    hashing_of,
)
from lbdt.serving.audit_reading import (
    Wrong,
    brief,
    is_hash,
    is_name,
    lines_of,
    opened,
    parsed,
    require,
    require_names,
    require_time,
    shown_hash,
)

MOST_FAULTS = 20
"""The most that are told; the others are counted."""
_STEP = 1 << 22  # bytes between two movements of the bar


class Fault(NamedTuple):
    """One thing that is wrong. `line` counts from 1; 0: it is of the file as a whole."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        place = f", line {self.line}" if self.line else ""
        return f"{self.file}{place}: {self.what}"


class AuditFault(ValueError):
    """The audit is not what its writer wrote: the first 20 `faults`, how many there are, and what was read."""

    def __init__(self, faults: tuple[Fault, ...], count: int, summary: AuditSummary) -> None:
        self.faults, self.count, self.summary = faults, count, summary
        more = [f"{count - len(faults)} more faults"] if count > len(faults) else []
        super().__init__("\n".join([*map(str, faults), *more]))


@dataclass
class FileSummary:
    """One file. Pictures of lines with a fault in their text are not among the `outcomes`."""

    name: str
    lines: int = 0
    """Whole lines, header and end line among them."""
    finished: bool = False
    """Whether it has an end line: if not, its writer is at work, or was killed."""
    torn: int = 0
    """Bytes after the last whole line: what a killed writer has left, or is being written. Its picture had not been
    released, if no one else has cut it."""
    last: str | None = None
    """The hash that the last whole line has."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Pictures by outcome."""


@dataclass
class AuditSummary:
    """What was read."""

    files: list[FileSummary]

    @property
    def lines(self) -> int:
        """Whole lines of all files."""
        return sum(file.lines for file in self.files)

    @property
    def finished(self) -> bool:
        """Whether every file has its end line."""
        return all(file.finished for file in self.files)

    @property
    def outcomes(self) -> dict[str, int]:
        """Pictures by outcome, each of `OUTCOMES`."""
        return {name: sum(file.outcomes[name] for file in self.files) for name in OUTCOMES}

    @property
    def pictures(self) -> int:
        """Pictures of all files."""
        return sum(self.outcomes.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `lbdt audit verify --json` prints them."""
        files = [
            {
                "name": file.name,
                "lines": file.lines,
                "finished": file.finished,
                "torn_bytes": file.torn,
                "last_hash": file.last,
                "outcomes": {name: file.outcomes[name] for name in OUTCOMES},
            }
            for file in self.files
        ]
        return {
            "files": files,
            "lines": self.lines,
            "finished": self.finished,
            "pictures": self.pictures,
            "outcomes": self.outcomes,
        }


def verify(
    path: str | os.PathLike[str],
    *,
    key: bytes | None = None,
    expect: str | None = None,
    strict: bool = False,
    progress: bool = False,
) -> AuditSummary:
    """Reads an audit file, or all `*.jsonl` of a folder, and says what is in it; a line is in memory at a time.

    Of all pictures' (request, index) digests of 16 bytes are kept, about 100 MB for a million. A file that another one
    goes on from is looked for in a folder only. `lbdt.serving.audit` says what can be found at all.

    Args:
        key: that the writer had. With one, a file whose header says that it was written without is a fault.
        expect: a hash kept elsewhere, which has to be that of the last whole line of one file.
        strict: whether a file without an end line, or cut off in a line, is a fault: all writers were closed.
        progress: whether a bar on stderr shows the bytes read, from the third second on.

    Raises:
        AuditFault: it is not what was written.
        ValueError: no such file, none in the folder, one that cannot be read, one that was written with a key where
            none is given, or a bad argument.
    """
    check_key(key)
    if expect is not None and not (isinstance(expect, str) and HASH.fullmatch(expect)):
        raise ValueError(f"expect: expected 64 lower-case hexadecimal digits, got {short(str(expect), 80)!r}")
    place = Path(path)
    paths = _paths(place)
    check = _Check(key, expect)
    with _bar(paths, progress) as bar:
        files = [_FileCheck(check, each) for each in paths]
        for file in files:
            file.run(bar, strict)
    if place.is_dir():
        _check_links(check, files, place)
    summary = AuditSummary([file.summary for file in files])
    if expect is not None and expect not in {file.last for file in summary.files}:
        check.fault(str(place), 0, _unexpected(check, summary))
    if check.count:
        raise AuditFault(tuple(check.faults), check.count, summary)
    return summary


def _paths(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    try:
        paths = sorted(place / name for name in os.listdir(place) if name.endswith(".jsonl"))
    except OSError as error:
        raise ValueError(f"{place}: cannot be read ({error.strerror})") from error
    if not paths:
        raise ValueError(f"{place}: no audit in it; expected files named audit-*.jsonl")
    return paths


class _Check:
    """What the files of one check share."""

    def __init__(self, key: bytes | None, expect: str | None) -> None:
        self.key, self.expect = key, expect
        self.faults: list[Fault] = []
        self.count = 0
        self.pictures: set[bytes] = set()
        self.expected_at: tuple[str, int] | None = None

    def fault(self, file: str, line: int, what: str) -> None:
        self.count += 1
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(Fault(file, line, printable(what)))


class _FileCheck:
    """One file, from its first line to its last; every line is held against the one before as it is written there, so
    that one fault does not bring on others."""

    def __init__(self, check: _Check, path: Path) -> None:
        self.check, self.path = check, path
        self.summary = FileSummary(path.name)
        self.header: dict[str, Any] | None = None
        self.end: dict[str, Any] | None = None
        self._pictures: int | None = None  # the last number; None: the line before has none that can be read

    def run(self, bar: Any, strict: bool) -> None:
        """Reads the file; what is wrong is told to the check."""
        with opened(self.path) as file:
            done = 0
            for number, line in enumerate(lines_of(self.path, file), 1):
                if line.endswith(b"\n"):
                    self.summary.lines = number
                    try:
                        self._line(number, line[:-1])
                    except Wrong as error:
                        self._fault(number, str(error))
                elif self.end is not None:
                    self._fault(number, "trailing bytes after the end line")
                else:
                    self.summary.torn += len(line)
                done += len(line)
                if done >= _STEP:
                    bar.update(done)
                    done = 0
            bar.update(done)
        self.summary.finished = self.end is not None
        if strict and not self.summary.finished:
            torn = (
                f", and its last line is cut off after {self.summary.torn} bytes" if self.summary.torn else ""
            )
            self._fault(0, f"unfinished: it has no end line{torn}")

    def _fault(self, number: int, what: str) -> None:
        self.check.fault(str(self.path), number, what)

    def _line(self, number: int, line: bytes) -> None:
        """Raises Wrong with what is wrong."""
        before, self.summary.last = self.summary.last, None
        pictures, self._pictures = self._pictures, None
        values, body, said = parsed(line)
        self.summary.last = said
        if said == self.check.expect:
            self.check.expected_at = str(self.path), number
        if number == 1:
            self._header(values)
        elif self.end is not None:
            raise Wrong("a line after the end line")
        elif "record" in values:
            self._picture(values, pictures)
        elif "end" in values:
            self._end(values, pictures)
        else:
            raise Wrong("neither a picture's line nor an end line")
        if number > 1 and before is not None and values["previous"] != before:
            got = shown_hash(values["previous"])
            raise Wrong(f"previous: expected {shown_hash(before)}, that of the line before, got {got}")
        if hashed(body, self.check.key) != said:
            key = " under this key" if self.check.key is not None else ""
            raise Wrong(f"hash: the line is not what {shown_hash(said)} was made of{key}")

    def _header(self, values: dict[str, Any]) -> None:
        if "lbdt_audit" not in values:
            raise Wrong("expected a header, got another line")
        self._pictures = 0
        if values["lbdt_audit"] != SCHEMA or type(values["lbdt_audit"]) is not int:
            raise Wrong(f"lbdt_audit: expected {SCHEMA}, got {brief(values['lbdt_audit'])}")
        require_names(values, HEADER)
        require_time("began", values)
        require("chain", values, is_hash(values["chain"]), "64 hexadecimal digits")
        require("hashing", values, values["hashing"] in HASHINGS, " or ".join(HASHINGS))
        follows, previous = values["follows"], values["previous"]
        require("follows", values, follows is None or is_name(follows), "an audit file's name or null")
        require("previous", values, previous is None or is_hash(previous), "a hash or null")
        if (follows is None) != (previous is None):
            raise Wrong("expected follows and previous both to be null, or neither")
        if values["hashing"] != hashing_of(self.check.key):
            if self.check.key is None:
                raise ValueError(f"{self.path}: was written with a key; give that key (--key-file)")
            raise Wrong(
                f"hashing: expected {hashing_of(self.check.key)}, as a key is given, got {values['hashing']}"
            )
        self.header = values

    def _picture(self, values: dict[str, Any], pictures: int | None) -> None:
        require_names(values, PICTURE)
        got = values["n"]
        require("n", values, type(got) is int and 0 < got < 2**63, "a whole number from 1")
        self._pictures = got
        try:
            record = PictureRecord.from_dict(values["record"])
        except ValueError as error:
            raise Wrong(f"record: {error}") from error
        self.summary.outcomes[record.outcome] += 1
        picture = hashlib.blake2b(f"{record.index} {record.request}".encode(), digest_size=16).digest()
        known = picture in self.check.pictures
        self.check.pictures.add(picture)
        if pictures is not None and got != pictures + 1:
            raise Wrong(f"n: expected {pictures + 1}, got {got}: lines are missing, put in or out of order")
        require("previous", values, is_hash(values["previous"]), "a hash")
        if known:
            raise Wrong(f"request {brief(record.request)}, index {record.index}: has a line already")

    def _end(self, values: dict[str, Any], pictures: int | None) -> None:
        require_names(values, END)
        self.end = values
        require_time("ended", values)
        require("previous", values, is_hash(values["previous"]), "a hash")
        following = values["next"]
        require("next", values, following is None or is_name(following), "an audit file's name or null")
        count = values["end"]
        require("end", values, type(count) is int and 0 <= count < 2**63, "a whole number from 0")
        if pictures is not None and count != pictures:
            raise Wrong(f"end: says {count} pictures, got {pictures}: lines are missing or put in")


def _check_links(check: _Check, files: list[_FileCheck], folder: Path) -> None:
    """Every file that another one names has to be there, and has to name that one."""
    by_name = {file.path.name: file for file in files}
    for file in files:
        following = file.end and file.end["next"]
        if file.end and is_name(following):
            after = by_name.get(following)
            if after is None:
                if not (folder / following).exists():  # a service went on to it while others were read
                    check.fault(str(file.path), file.summary.lines, f"next: {following} is not in the folder")
            elif after.header is not None:  # without one the writer was killed before it
                mine = file.header or {"chain": after.header["chain"]}
                wanted = (mine["chain"], file.path.name, file.summary.last)
                got = tuple(after.header[name] for name in ("chain", "follows", "previous"))
                if got != wanted:
                    check.fault(
                        str(after.path), 1, f"does not go on from the end of {file.path.name}, which names it"
                    )
        if file.header and file.header["follows"] is not None:
            before = by_name.get(file.header["follows"])
            if before is None:
                check.fault(str(file.path), 1, f"follows: {file.header['follows']} is not in the folder")
            elif not before.end or before.end["next"] != file.path.name:
                check.fault(str(file.path), 1, f"follows: {before.path.name} does not end by naming it")


def _unexpected(check: _Check, summary: AuditSummary) -> str:
    wanted = shown_hash(check.expect or "")
    if check.expected_at is not None:
        file, line = check.expected_at
        return f"expected the last hash to be {wanted}, which is that of line {line} of {file}: lines came after it"
    last = ", ".join(shown_hash(file.last or "none") for file in summary.files[:3])
    return f"expected the last hash to be {wanted}, which no line has; got {last}{', ...' * (len(summary.files) > 3)}"


def _bar(paths: list[Path], progress: bool) -> Any:
    from tqdm import tqdm

    total = sum(path.stat().st_size for path in paths if path.is_file())
    scale = {"unit": "B", "unit_scale": True}
    return tqdm(total=total, desc="verify", delay=2, file=sys.stderr, disable=not progress, **scale)
