"""The shape of a policy file: its sections, the types of their values, and what is said of others.

Needs pydantic: `pip install lbdt[serve]`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any, Literal

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError
except ImportError as error:
    raise ImportError("a policy needs pydantic: pip install lbdt[serve]") from error

from lbdt.runs.reading import brief, listed, reason
from lbdt.runs.wording import nearest

OnFailure = Literal["refuse", "unprotected"]
"""What becomes of a picture that could not be protected: it is refused, or delivered all the same."""
FORMAT = 1
"""The format of policy files that is read."""
REFUSE = "refuse"

_MOST_ERRORS = 20_000
"""pydantic takes a kilobyte for each to say what it is."""
_EXPECTED = {
    "string_type": "text in quotes",
    "list_type": 'a list of texts, as in ["A", "B"]',
    "int_type": "a whole number",
    "literal_error": '"refuse" or "unprotected"',
}
_A_TABLE = "a table"


class _Section(BaseModel):
    """A table of the file, in which there are no other names, and no type becomes another."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PolicyDefaults(_Section):
    """`[defaults]`."""

    unknown_tenant: str = REFUSE
    """ "refuse", or the tenant whose rules are those of unknown ones."""
    on_failure: OnFailure = "refuse"


class TenantSection(_Section):
    """`[tenants.NAME]`."""

    concepts: list[str] | None = None
    """None: the section does not say; that is not the same as no concepts."""
    groups: list[str] = []
    allow: list[str] = []
    on_failure: OnFailure | None = None
    """None: the one of `[defaults]`."""
    keys: list[str] = []


class PolicyFile(_Section):
    """The whole file."""

    format: int = Field(alias="schema")
    """The name `schema` is one that pydantic's models have."""
    version: str
    groups: dict[str, list[str]] = {}
    defaults: PolicyDefaults = PolicyDefaults()
    tenants: dict[str, TenantSection]


_FIELDS = {
    (): ("schema", "version", "groups", "defaults", "tenants"),
    ("defaults",): tuple(PolicyDefaults.model_fields),
    ("tenants",): tuple(TenantSection.model_fields),
}


def parse_toml(data: bytes) -> dict[str, Any]:
    """The tables of a TOML file: UTF-8, after a byte order mark if any.

    Raises:
        ValueError: bytes that are not UTF-8, or no TOML, and where.
    """
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, got other bytes ({error})") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError also: a number of more digits than Python reads
        raise ValueError(f"not valid TOML ({reason(error)})") from error


def checked_shape(tables: Mapping[str, Any]) -> tuple[PolicyFile | None, list[str]]:
    """The file as a model; or None and what is wrong, a line for each fault."""
    try:
        return PolicyFile.model_validate(tables), []
    except ValidationError as error:
        if (count := error.error_count()) > _MOST_ERRORS:
            return None, [
                f"expected a policy of format {FORMAT}, got {count} values of a wrong type or unknown name"
            ]
        return None, [_fault(found) for found in error.errors(include_url=False, include_context=False)]


def place(*names: str | int) -> str:
    """Where in the file, as TOML would name it: `tenants.acme.concepts[0]`; quotes where a name needs them."""
    shown = ""
    for name in names:
        if isinstance(name, int):
            shown += f"[{name}]"
        else:
            shown += ("." if shown else "") + (name if re.fullmatch(r"[\w-]{1,80}", name) else brief(name))
    return shown


def meant(name: str, known: Any) -> str:
    """The end of a fault about an unknown name: the nearest known one, or all of them."""
    near = nearest(name, known)
    return f"; did you mean {brief(near)}?" if near else f": {listed(known) or 'there are none'}"


def _fault(found: Mapping[str, Any]) -> str:
    """One of pydantic's errors in this library's words. No value of a key or of an unknown field is shown: it may be
    a secret."""
    path, kind = tuple(found["loc"]), found["type"]
    where = place(*path)
    if kind == "missing":
        return f"{where}: missing; expected {_missing(path)}"
    if kind == "extra_forbidden":
        names = _FIELDS[path[:1] if len(path) > 1 else ()]
        return f"{where}: unknown field; expected one of {', '.join(names)}{_hint(str(path[-1]), names)}"
    if path[0] == "tenants" and len(path) > 2 and path[2] == "keys":
        got = f"something else ({type(found['input']).__name__}, not shown: it may be a key)"
        return f'{where}: expected a list of digests, as in ["sha256:<64 hex digits>"], got {got}'
    return f"{where}: expected {_EXPECTED.get(kind, _A_TABLE)}, got {_given(found['input'])}"


def _missing(path: tuple[str | int, ...]) -> str:
    return {
        "schema": f"schema = {FORMAT}",
        "version": 'a name of this version, as in version = "2026-11-30.1"',
        "tenants": "a section [tenants.NAME] for each tenant; for none at all, an empty [tenants]",
    }[str(path[0])]


def _hint(name: str, known: tuple[str, ...]) -> str:
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else ""


def _given(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else brief(value)
