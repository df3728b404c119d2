"""Reading what others wrote: regular files of a bounded size, and strict JSON."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lbdt.runs.wording import require_unicode

_MAX_JSON = 1 << 25
_MAX_LINES = 1 << 21
_MAX_LINE = 1 << 20
_MAX_DEPTH = 64
_LONGEST_REASON = 300
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
MAX_FLOAT = (2 - 2**-23) * 2.0**127
"""The largest number that is computed with in float32."""


def open_regular(path: Path, expected: str = "a readable file") -> BinaryIO:
    """A regular file, or a link to one, for reading; never waits, as opening a FIFO or a device might.

    Raises:
        ValueError: no such file (`expected` says of what), another kind of file, one that cannot be read.
    """
    try:
        # Without O_NONBLOCK a FIFO would be waited for, and it may take the place of a file looked at before.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, ValueError) or error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise ValueError(f"{path}: no such file; expected {expected}") from error
        raise ValueError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path}: cannot be read (not a regular file); expected {expected}")
    return os.fdopen(handle, "rb")


def read_bytes(path: Path, most: int = _MAX_JSON, expected: str = "a readable file") -> bytes:
    """A whole file of at most `most` bytes; ValueError as `open_regular`, and for a larger one."""
    with open_regular(path, expected) as file:
        try:
            # Files of /proc say that they have no bytes.
            large = os.fstat(file.fileno()).st_size > most
            data = b"" if large else file.read(most + 1)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if large or len(data) > most:
        raise ValueError(
            f"{path}: expected at most {most} bytes, got more; refused, it could fill the memory"
        )
    return data


def read_lines(path: Path, data: bytes) -> Iterator[str]:
    """UTF-8 lines with their ends, after a byte order mark if any. They end by "\\n" only.

    Raises:
        ValueError: naming file and line: bytes that are not UTF-8, a line that is too long, too many of them.
    """
    for number, line in enumerate(io.BytesIO(data), 1):
        if number > _MAX_LINES or len(line) > _MAX_LINE:
            what = f"{_MAX_LINES} lines" if number > _MAX_LINES else f"{_MAX_LINE} bytes in a line"
            raise ValueError(f"{path}, line {number}: expected at most {what}; split the file")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: cannot be read ({error})") from error


def read_json(path: Path) -> Any:
    """The parsed JSON file; ValueError naming it, as `parse_json`."""
    data = read_bytes(path, expected="a folder written by save_pretrained (or SAeUron's)")
    return parse_json(data, str(path))


def parse_json(data: bytes | str, place: str, advice: str = "; the file is damaged, get it again") -> Any:
    """The value of JSON text: UTF-8, after a byte order mark if any.

    Raises:
        ValueError: beginning with `place`: not JSON, a name that comes twice in an object, NaN, infinity or a number
            that overflows to it, an integer of more than 64 bits, half of a surrogate pair, more
            than 64 levels.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = _DECODER.decode(text)
        _check(value, bool(_SURROGATE.search(text)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error}){advice}") from error
    return value


def brief(value: Any, most: int = 80) -> str:
    """A value for a message, in one line, cut where it is long."""
    if isinstance(value, str):
        return repr(value) if len(value) <= most else f"{value[:most]!r}..."
    if isinstance(value, (int, float)) or value is None:
        return repr(value) if not isinstance(value, int) or abs(value) < 10**most else "a huge integer"
    return type(value).__name__


def reason(error: Exception) -> str:
    """What a library's exception says, in one line, cut where it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


def listed(names: Any, most: int = 12) -> str:
    """Names for a message, a bounded number of bounded length, in one line."""
    names = list(names)
    shown = [
        name if name.isprintable() and len(name) <= 80 else brief(name) for name in map(str, names[:most])
    ]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check(value: Any, escaped: bool) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        if escaped:
            for item in level:
                for text in item if isinstance(item, dict) else [item]:
                    if isinstance(text, str):
                        require_unicode("a string", text)
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise ValueError(f"more than {_MAX_DEPTH} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{brief(twice)} comes twice in an object")
    return found


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 21 else 2**64
    if abs(value) >= 2**64:  # of these some cannot become a float, which callers do not expect
        raise ValueError(f"an integer of {len(text)} digits")
    return value


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"a number that overflows, {brief(text)}")
    return value


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON; expected a finite number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
)
