"""The lines of an audit file: what one says of a picture, how it is spelt, and how it is sealed.

A file is UTF-8, one JSON object a line, each line ended by "\\n":

- the header, `{"began": TIME, "chain": SALT, "follows": NAME or null, "hashing": "sha256" or "hmac-sha256",
  "lbdt_audit": 1, "previous": HASH or null, "hash": HASH}`; `follows` and `previous` name the file that this one goes
  on from, and the hash of its last line;
- a line a picture, `{"n": 1, "previous": HASH, "record": {...}, "hash": HASH}`, `n` from 1 in every file;
- where the writer was closed, or went on in another file, the end line `{"end": pictures of the file, "ended": TIME,
  "next": NAME or null, "previous": HASH, "hash": HASH}`.

`hash` is the last field of its line, and is the SHA-256 (with a key: the HMAC-SHA256) of the line's other fields, which
are the bytes before `,"hash"` and a closing brace. Those are in one spelling only: names in order of their letters, no
spaces, characters beyond ASCII as they are.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lbdt.runs.wording import require_unicode, short

SCHEMA = 1
OUTCOMES = ("protected", "unprotected", "refused", "failed")
HASHINGS = ("sha256", "hmac-sha256")
HEADER = frozenset(("began", "chain", "follows", "hashing", "lbdt_audit", "previous"))
PICTURE = frozenset(("n", "previous", "record"))
END = frozenset(("end", "ended", "next", "previous"))
MOST_LINE = 1 << 20
"""The longest line in bytes, its end included."""
MOST_TEXT = 1000
"""The longest text of a field in characters."""
LEAST_KEY = 16
"""The shortest key in bytes."""
NAME = re.compile(r"audit-[0-9]{8}T[0-9]{6}\.[0-9]{6}Z-[0-9a-f]{16}\.jsonl")
HASH = re.compile(r"[0-9a-f]{64}")

_HEX = re.compile(r"[0-9a-f]{16,128}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", re.ASCII)
_ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
_MOST_INTEGER = 2**64
_SEAL = b',"hash":"'


def utc_now() -> str:
    """The time as every line has it: UTC, ISO 8601, six digits of a second."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


@dataclass(frozen=True, kw_only=True)
class PictureRecord:
    """What was done for one picture. No field holds a prompt, and `reason` must not quote one.

    Raises ValueError, naming the field, for a value of another type or outside of what is said here. Texts have 1 to
    1000 characters.
    """

    request: str
    """The request's id; with `index` it names one picture, for all replicas and all time."""
    index: int
    """The picture's place in the request, from 0."""
    tenant: str
    policy_version: str
    policy_digest: str
    """Lower-case hexadecimal, 16 to 128 digits; so is `eraser`."""
    eraser: str
    """The eraser's fingerprint."""
    concepts: tuple[str, ...]
    """What was to be erased; empty: nothing. A list is taken as well, here and below."""
    seed: int
    """-2^63 to 2^64 - 1, as torch takes them."""
    detected: tuple[int, ...]
    """Patches detected in each step; empty where none was run."""
    replaced: tuple[int, ...]
    """Patches replaced in each step, as many numbers as in `detected`."""
    gated: bool
    """Whether the gate held the picture: too few patches were detected, and so none was replaced in any step."""
    fallback: str | None
    """What was done in place of protecting it, if anything."""
    outcome: str
    """One of `OUTCOMES`. "protected" has an `image`; "refused" and "failed" have a `reason`, and no `image` but that of
    a `fallback`."""
    reason: str | None
    image: str | None
    """SHA-256, hexadecimal, of the bytes that are released; None: nothing is."""
    started: str
    """UTC, such as "2026-01-31T23:59:59.000001+00:00"; `utc_now` says it. `finished` may be earlier: clocks are set."""
    finished: str

    def __post_init__(self) -> None:
        for name in ("request", "tenant", "policy_version"):
            _check_text(name, getattr(self, name))
        for name in ("fallback", "reason"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for name in ("policy_digest", "eraser"):
            _check_match(name, getattr(self, name), _HEX, "16 to 128 lower-case hexadecimal digits")
        if self.image is not None:
            _check_match("image", self.image, HASH, "64 lower-case hexadecimal digits or None")
        for name in ("started", "finished"):
            check_time(name, getattr(self, name))
        _check_integer("index", self.index, 0, 2**31)
        _check_integer("seed", self.seed, -(2**63), _MOST_INTEGER)
        if type(self.gated) is not bool:
            raise ValueError(f"gated: expected True or False, got {_brief(self.gated)}")
        for name in ("concepts", "detected", "replaced"):
            if not isinstance(getattr(self, name), tuple | list):
                raise ValueError(f"{name}: expected a tuple or list, got {_brief(getattr(self, name))}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for concept in self.concepts:
            _check_text("concepts", concept)
        for name in ("detected", "replaced"):
            for count in getattr(self, name):
                _check_integer(name, count, 0, 2**31)
        if len(self.detected) != len(self.replaced):
            raise ValueError(
                f"replaced: expected a number for each of the {len(self.detected)} steps of detected, got "
                f"{len(self.replaced)}"
            )
        if self.gated and any(self.replaced):
            raise ValueError("gated: expected no patch replaced where the gate held the picture; give False")
        self._check_outcome()

    def _check_outcome(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome: expected one of {', '.join(OUTCOMES)}, got {_brief(self.outcome)}")
        if self.outcome == "protected" and self.image is None:
            raise ValueError("image: expected the digest of what is released, as the outcome is protected")
        if self.outcome in ("refused", "failed"):
            if self.reason is None:
                raise ValueError(f"reason: expected why, as the outcome is {self.outcome}")
            if self.image is not None and self.fallback is None:
                raise ValueError(
                    f"image: expected None, as the outcome is {self.outcome} and no fallback is named"
                )

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, with tuples, which JSON spells as lists."""
        return {name: getattr(self, name) for name in FIELDS}

    @classmethod
    def from_dict(cls, values: Any) -> PictureRecord:
        """The record that JSON gives back; ValueError for an unknown or missing field, and as the constructor."""
        if not isinstance(values, dict):
            raise ValueError(f"record: expected an object, got {_brief(values)}")
        if values.keys() != _FIELDS:
            check_names(values, _FIELDS)
        return cls(**values)


FIELDS = tuple(field.name for field in fields(PictureRecord))
_FIELDS = frozenset(FIELDS)


def seal(values: Mapping[str, Any], key: bytes | None) -> tuple[bytes, str]:
    """A line, its end included, and its hash."""
    body = canonical(values)
    digest = hashed(body, key)
    return b'%s%s%s"}\n' % (body[:-1], _SEAL, digest.encode()), digest


def unseal(line: bytes) -> tuple[bytes, str] | None:
    """What a line, without its end, says its hash is of, and that hash; None: it has no hash at its end."""
    cut = len(line) - 66 - len(_SEAL)
    if cut < 1 or line[cut : cut + len(_SEAL)] != _SEAL or line[-2:] != b'"}':
        return None
    return line[:cut] + b"}", line[cut + len(_SEAL) : -2].decode("ascii", "replace")


def canonical(values: Mapping[str, Any]) -> bytes:
    """The one spelling of a JSON object; ValueError for a lone surrogate, NaN or infinity."""
    return _ENCODE(values).encode()


def hashed(body: bytes, key: bytes | None) -> str:
    """SHA-256 of `body`, hexadecimal; with a key HMAC-SHA256."""
    return hashlib.sha256(body).hexdigest() if key is None else hmac.digest(key, body, "sha256").hex()


def hashing_of(key: bytes | None) -> str:
    """What a header calls it."""
    return HASHINGS[key is not None]


def check_key(key: bytes | None) -> None:
    """ValueError unless the key is None or at least 16 bytes."""
    if key is not None and not isinstance(key, bytes):
        raise ValueError(f"key: expected bytes, got {type(key).__name__}")
    if key is not None and len(key) < LEAST_KEY:
        raise ValueError(
            f"key: expected at least {LEAST_KEY} bytes, got {len(key)}; make one of 32 random bytes"
        )


def read_key(path: str | Path) -> bytes:
    """The key in a file: its bytes without line ends after the last; ValueError naming it for one that is too short.

    Writer and check both read it by this, so that a line end which an editor adds makes no other key.
    """
    try:
        key = Path(path).read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise ValueError(f"{path}: the key cannot be read ({error.strerror})") from error
    try:
        check_key(key)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return key


def check_names(values: Mapping[str, Any], names: frozenset[str]) -> None:
    """ValueError unless `values` has exactly these fields."""
    for what, found in (("unknown field", values.keys() - names), ("missing field", names - values.keys())):
        if found:
            listed = ", ".join(ascii(short(name, 60)) for name in sorted(found)[:5])
            raise ValueError(f"{what} {listed}; expected {', '.join(sorted(names))}")


def check_time(name: str, value: Any) -> None:
    """ValueError, beginning with `name`, unless `value` is a time as `utc_now` says it."""
    try:
        if _TIME.fullmatch(value):
            datetime.fromisoformat(value)
            return
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"{name}: expected UTC as in 2026-01-31T23:59:59.000001+00:00 (utc_now()), got {_brief(value)}"
    )


def _check_text(name: str, value: Any) -> None:
    if type(value) is not str or not 0 < len(value) <= MOST_TEXT:
        raise ValueError(f"{name}: expected a text of 1 to {MOST_TEXT} characters, got {_brief(value)}")
    if not value.isascii():
        require_unicode(name, value)


def _check_match(name: str, value: Any, pattern: re.Pattern[str], wanted: str) -> None:
    if type(value) is not str or not pattern.fullmatch(value):
        raise ValueError(f"{name}: expected {wanted}, got {_brief(value)}")


def _check_integer(name: str, value: Any, low: int, end: int) -> None:
    if type(value) is not int or not low <= value < end:
        raise ValueError(f"{name}: expected a whole number from {low} to {end - 1}, got {_brief(value)}")


def _brief(value: Any) -> str:
    if isinstance(value, str):
        return f"{ascii(short(value, 60))} ({len(value)} characters)" if len(value) > 60 else ascii(value)
    if value is None or isinstance(value, bool | float) or (type(value) is int and abs(value) < 10**30):
        return repr(value)
    return type(value).__name__
