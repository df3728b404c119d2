"""Records and audit files, as the tests of the audit make them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lbdt.serving.audit import AuditLog, PictureRecord
from lbdt.serving.audit_check import AuditFault, verify
from lbdt.serving.audit_lines import seal

KEY = bytes(range(32))
TIME = "2026-01-31T23:59:59.000001+00:00"


def fields(number: int = 0, **changes: Any) -> dict[str, Any]:
    """What a record of a protected picture is made of; every `number` is another request."""
    return {
        "request": f"request-{number}",
        "index": 0,
        "tenant": "Zoë & Söhne",
        "policy_version": "3",
        "policy_digest": "0123456789abcdef",
        "eraser": "ab" * 32,
        "concepts": ("Cats", "猫"),
        "seed": number,
        "detected": (4, 0, 3),
        "replaced": (6, 0, 5),
        "gated": False,
        "fallback": None,
        "outcome": "protected",
        "reason": None,
        "image": "cd" * 32,
        "started": TIME,
        "finished": TIME,
    } | changes


def record(number: int = 0, **changes: Any) -> PictureRecord:
    return PictureRecord(**fields(number, **changes))


def written(folder: Path, count: int = 4, key: bytes | None = None, **options: Any) -> Path:
    """A finished file of `count` pictures; with `max_lines` the last one of several."""
    with AuditLog(folder, key=key, sync=False, **options) as log:
        for number in range(count):
            log.write([record(number)])
    return log.path


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def values(line: bytes) -> dict[str, Any]:
    """A line's fields but its hash, to be changed and sealed again."""
    found = json.loads(line)
    del found["hash"]
    return found


def rebuilt(every: Iterable[dict[str, Any]], key: bytes | None = None) -> bytes:
    """The lines with their hashes and `previous` made anew from the second on, as a forger would."""
    made, last = [], None
    for each in every:
        line, last = seal(each if last is None else each | {"previous": last}, key)
        made.append(line)
    return b"".join(made)


def faults(path: Path, **options) -> list[str]:
    """The faults, without the file's name."""
    try:
        verify(path, **options)
    except AuditFault as error:
        assert error.count == len(error.faults) and str(error).count("\n") == error.count - 1
        return [f"{fault.line}: {fault.what}" for fault in error.faults]
    return []


def put(path: Path, every: list[bytes]) -> None:
    path.write_bytes(b"".join(every))


def with_record(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Changes a line's record."""
    return lambda found: found | {"record": found["record"] | changes}
