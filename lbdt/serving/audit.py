"""The audit's writer: a line for every picture, on the disk before the picture is released.

    with AuditLog("audit", key=read_key("audit.key")) as log:
        log.write([record])  # AuditError: release nothing
        release(picture)

Every writer, be it a thread's or a replica's, has a file of its own in the folder, and its lines are a chain: each
holds the hash of the one before. `lbdt.serving.audit_lines` says how they are spelt, `lbdt audit verify` checks them.

What the chain shows without a key: a disk's or an editor's fault, and lines that were changed, put in, taken out or
reordered, as long as the later hashes were not made anew; a missing file that another one names; a picture that has two
lines. What it does not: whoever may write the file can rewrite it from any line to its end. With a key (HMAC-SHA256)
that takes the key, which those who may write the folder should not have; the serving process has it, so that a process
that is taken over can still forge what it writes from then on, and all that its own files hold.

What no chain shows: lines cut off the end of a file that its writer did not finish (a killed writer leaves the same),
an unfinished file that is gone as a whole, and a picture that was released without a line. Against the first, keep
`last_hash` where the folder's owner cannot reach, and compare: `lbdt audit verify FILE_OR_FOLDER --expect HASH`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lbdt.runs.writable import unwritable
from lbdt.serving.audit_lines import MOST_LINE, SCHEMA, check_key, hashing_of, seal, utc_now
from lbdt.serving.audit_lines import OUTCOMES as OUTCOMES
from lbdt.serving.audit_lines import PictureRecord as PictureRecord
from lbdt.serving.audit_lines import read_key as read_key

_REFUSE = "release none of these pictures"
_ANEW = "find out who did it, then close this log and make another, which begins a file of its own"


class AuditError(RuntimeError):
    """None of a call's lines can be relied on, so none of its pictures may be released; the text says why, and what to
    do."""


class AuditLog:
    """Appends pictures' lines to a file of its own in `folder`, which is made if needed.

    Threads may share it. A process that was forked off may not: it makes its own. Whatever fails leaves none of a
    call's lines: what part of them was written is cut off again, if not at once then before the next call's. So a call
    that is tried again writes all of its lines or raises. A file that others have written to, cut, moved or removed is
    left as it is found, and takes no line any more.

    Args:
        folder: for the files of all replicas, `audit-<UTC time>-<random>.jsonl`, mode 0600.
        key: at least 16 bytes, such as from `read_key`: hashes are HMAC-SHA256; None: SHA-256.
        sync: whether lines are on the disk, not only with the operating system, when `write` returns. A killed process
            loses none either way, a machine without power does without `sync`.
        max_lines: pictures in a file; the chain goes on in another one. A call's lines are never divided.
        max_bytes: the same in bytes, the end line not counted.

    Raises:
        ValueError: an argument out of range.
        AuditError: no file can be written there.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        key: bytes | None = None,
        sync: bool = True,
        max_lines: int = 1_000_000,
        max_bytes: int = 1 << 30,
    ) -> None:
        check_key(key)
        for name, value in (("max_lines", max_lines), ("max_bytes", max_bytes)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a whole number from 1, got {value!r}")
        self._folder, self._key, self._sync = Path(folder), key, sync
        self._max_lines, self._max_bytes = max_lines, max_bytes
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._chain = secrets.token_hex(32)
        self._closed = False
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise AuditError(f"{self._folder}: cannot be made: {unwritable(error)}; {_REFUSE}") from error
        self._file = _AuditFile(self._folder, sync)
        self._next: _AuditFile | None = None  # made for a change of files that has not come to its end
        try:
            self._begin()
        except BaseException:
            self._file.discard()
            raise

    @property
    def path(self) -> Path:
        """The file that is written to."""
        return self._file.path

    @property
    def last_hash(self) -> str:
        """The hash of the last line, which no later change of any line before it leaves as it is."""
        with self._lock:
            return self._file.last or ""

    def write(self, records: Sequence[PictureRecord]) -> str:
        """Appends a line for each record, in one write; returns the last one's hash. Without records it only looks
        whether the file is as it was left.

        Raises:
            ValueError: not a sequence of records, or one of more than 1 MiB.
            AuditError: they could not be written, or the file is gone, renamed, cut or written to by others. The
                pictures must not be released. What was written before is left alone.
        """
        if not isinstance(records, Sequence):
            raise ValueError(f"records: expected a sequence of PictureRecord, got {type(records).__name__}")
        for record in records:
            if not isinstance(record, PictureRecord):
                raise ValueError(f"records: expected PictureRecord, got {type(record).__name__}")
        with self._held():
            # A change of files that was interrupted, or failed, goes on.
            if self._file.ended:
                self._go_on()
            if self._file.size == 0:
                self._begin()
            data, last = self._sealed(records)
            lines, size = self._file.lines + len(records), self._file.size + len(data)
            if self._file.lines and (lines > self._max_lines or size > self._max_bytes):
                self._go_on()
                data, last = self._sealed(records)
            self._file.append(data, self._file.lines + len(records), last)
            return last

    def close(self) -> None:
        """Writes the end line, by which a finished file is told from one that was cut off, and closes the file.

        Raises AuditError where that cannot be written; the file is closed all the same. A second call does nothing.
        """
        if self._process != os.getpid():  # a child, which may have got the lock as it was held
            self._file.close()
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                if self._file.ended:
                    self._go_on()
                if self._file.size == 0:
                    self._begin()
                self._end(None)
            finally:
                self._file.close()
                if self._next is not None:
                    self._next.discard()

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        # Before the lock: it may have been held when the process was forked, and would be waited for without end.
        if self._process != os.getpid():
            raise AuditError(
                f"{self._file.path}: is the file of process {self._process}, not of its child {os.getpid()}; make an "
                f"AuditLog in each process"
            )
        with self._lock:
            if self._closed:
                raise AuditError(f"{self._file.path}: is closed; make another AuditLog; {_REFUSE}")
            yield

    def _sealed(self, records: Sequence[PictureRecord]) -> tuple[bytes, str]:
        """The records' lines, and the last one's hash."""
        lines, last = [], self._file.last or ""
        for number, record in enumerate(records, self._file.lines + 1):
            line, last = seal({"n": number, "previous": last, "record": record.as_dict()}, self._key)
            if len(line) > MOST_LINE:
                raise ValueError(
                    f"records: expected at most {MOST_LINE} bytes a line, got {len(line)} for request "
                    f"{record.request!r}; it has {len(record.concepts)} concepts and {len(record.detected)} steps"
                )
            lines.append(line)
        return b"".join(lines), last

    def _begin(self) -> None:
        """The header."""
        header = {
            "lbdt_audit": SCHEMA,
            "began": utc_now(),
            "chain": self._chain,
            "hashing": hashing_of(self._key),
            "follows": self._file.follows,
            "previous": self._file.last,
        }
        line, last = seal(header, self._key)
        self._file.append(line, 0, last)

    def _end(self, following: str | None) -> None:
        lines = self._file.lines
        end = {"end": lines, "ended": utc_now(), "next": following, "previous": self._file.last}
        line, last = seal(end, self._key)
        self._file.append(line, lines, last, ended=True)

    def _go_on(self) -> None:
        """Ends the file, and begins the one that its end line names: in this order, as a header holds the end's hash.

        Each step is taken once, however often it has to be tried.
        """
        if self._next is None:
            self._next = _AuditFile(self._folder, self._sync)
        before, after = self._file, self._next
        if not before.ended:
            self._end(after.path.name)
        after.follows, after.last = before.path.name, before.last
        self._file, self._next = after, None
        before.close()
        self._begin()


class _AuditFile:
    """A new file that is only appended to. `size`: its bytes, all of whole lines; `lines`: the pictures among them;
    `last`: the last line's hash, in a file without lines that of the one it `follows`."""

    def __init__(self, folder: Path, sync: bool) -> None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        self.path = folder / f"audit-{stamp}-{secrets.token_hex(8)}.jsonl"
        self.size, self.lines, self.ended = 0, 0, False
        self.last: str | None = None
        self.follows: str | None = None
        self._sync = sync
        self._tried = 0  # bytes that may have been written after `size`
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC
            self._handle: int | None = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise AuditError(f"{self.path}: cannot be made: {unwritable(error)}; {_REFUSE}") from error
        try:
            about = os.fstat(self._handle)
            self._identity = about.st_dev, about.st_ino
            if sync:
                _sync_folder(folder)
        except OSError as error:
            self.discard()
            raise AuditError(f"{self.path}: cannot be made: {unwritable(error)}; {_REFUSE}") from error

    def append(self, data: bytes, lines: int, last: str, ended: bool = False) -> None:
        """All of `data`, after which the file is as said, or AuditError and none of it."""
        size = self.size + len(data)
        try:
            self._cut()
            self._check(self.size)
            self._tried = len(data)
            written = os.write(self._handle, data)
            if written != len(data):
                raise AuditError(
                    f"{self.path}: only {written} of {len(data)} bytes were written, as on a full disk; make room "
                    f"there, then try again; {_REFUSE}"
                )
            if self._sync:
                os.fsync(self._handle)
            self._check(size)
        except BaseException as error:
            # Also at an interruption: whoever gets it releases nothing. What cannot be cut off here is cut off by the
            # next call, or its check fails.
            with contextlib.suppress(OSError):
                self._cut()
            if isinstance(error, OSError):
                raise AuditError(f"{self.path}: cannot be written: {unwritable(error)}; {_REFUSE}") from error
            raise
        # No call is among these, and so no interruption: all of them are, or none.
        self.size, self.lines, self.last, self.ended, self._tried = size, lines, last, ended, 0

    def _cut(self) -> None:
        """Takes off what a call that failed has left, but nothing that others may have written."""
        if self._tried and self.size < os.fstat(self._handle).st_size <= self.size + self._tried:
            os.ftruncate(self._handle, self.size)
            if self._sync:
                os.fsync(self._handle)
        self._tried = 0

    def _check(self, size: int) -> None:
        """AuditError unless the path is this file's, and it has `size` bytes."""
        here = os.fstat(self._handle)
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            there = None
        if there is None:
            what = "was removed or renamed while it was written"
        elif (there.st_dev, there.st_ino) != self._identity:
            what = "was replaced by another file while it was written"
        elif here.st_size < size:
            what = f"was cut by others to {here.st_size} of {size} bytes"
        elif here.st_size > size:
            what = f"was written to by others: expected {size} bytes, got {here.st_size}"
        else:
            return
        raise AuditError(f"{self.path}: {what}; {_ANEW}; {_REFUSE}")

    def close(self) -> None:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            os.close(handle)

    def discard(self) -> None:
        """Closes the file and removes it, where it has no whole line."""
        with contextlib.suppress(OSError):
            self.close()
        with contextlib.suppress(OSError):
            if self.size == 0:
                self.path.unlink()


def _sync_folder(folder: Path) -> None:
    """The folder's list of names on the disk: without it a file may be gone after a power cut, for all its fsync."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
